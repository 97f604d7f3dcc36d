"""``coprs-deploy``: imports, errors and exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest

from coprs_deploy import demo
from coprs_deploy.cli.main import INTERRUPTED, VERBS, main
from coprs_deploy.errors import BundleIntegrityError, PolicyError, QueueFullError
from coprs_deploy.version import __version__

HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "transformers", "trl", "numpy", "PIL")


@pytest.fixture
def doctor(monkeypatch):
    """Replace what the verb ``doctor`` does."""

    def replace(function):
        monkeypatch.setattr("coprs_deploy.cli.doctor.run", function)

    return replace


def failing(error):
    def run(arguments):
        raise error

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--list"], ["serv"]])
def test_main_without_work_imports_no_heavy_library(arguments):
    program = (
        "import sys\nfrom coprs_deploy.cli.main import main\n"
        f"main({arguments!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_main_help_lists_every_verb_with_its_summary(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb, summary in VERBS.items():
        assert re.search(rf"^    {verb} +{summary}$", shown, re.MULTILINE), verb


def test_main_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"coprs-deploy {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_main_help_of_a_verb_opens_with_its_description(verb, capsys):
    module = __import__(f"coprs_deploy.cli.{verb}", fromlist=["run"])
    assert main([verb, "--help"]) == 0
    assert module.__doc__.strip() in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 1])
def test_main_returns_the_exit_code_of_the_verb(doctor, code):
    doctor(lambda arguments: code)
    assert main(["doctor"]) == code


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (PolicyError("out of memory"), "out of memory", 2),
        (QueueFullError("2 requests are active"), "2 requests are active", 2),
        (BundleIntegrityError("prior.onnx was changed"), "prior.onnx was changed", 1),
        (ValueError("device is 'x'; accepted: cpu"), "device is 'x'; accepted: cpu", 2),
        (FileNotFoundError(2, "No such file", "a.png"), "a.png: No such file", 2),
        (OSError("disk full"), "disk full", 2),
        (KeyboardInterrupt(), "interrupted", INTERRUPTED),
        (MemoryError(), "out of memory: the system refused an allocation", 2),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes\nException raised"),
            "out of memory: DefaultCPUAllocator: can't allocate memory: 8 bytes",
            2,
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            "out of memory: CUDA out of memory. Tried to allocate 2 GiB",
            2,
        ),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_main_turns_an_error_into_a_message_and_an_exit_code(
    doctor, capsys, error, message, code, as_json
):
    doctor(failing(error))
    assert main(["doctor", *(["--json"] if as_json else [])]) == code
    captured = capsys.readouterr()
    assert captured.err == f"coprs-deploy doctor: {message}\n"
    if as_json:
        assert json.loads(captured.out) == {"error": message, "type": type(error).__name__}
    else:
        assert captured.out == ""


@pytest.mark.parametrize("error", [KeyError("name"), RuntimeError("a bug")])
def test_main_does_not_hide_a_bug(doctor, error):
    doctor(failing(error))
    with pytest.raises(type(error)):
        main(["doctor"])


def test_main_warning_is_one_line():
    program = (
        "import sys, warnings\nfrom coprs_deploy.cli import doctor, main\n"
        "doctor.run = lambda arguments: warnings.warn('the cache cannot be written') or 0\n"
        "main.main(['doctor'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == "warning: the cache cannot be written\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("is_ignored", [True, False])
def test_main_signal_ends_the_verb_unless_the_caller_ignores_it(doctor, number, is_ignored):
    doctor(lambda arguments: os.kill(os.getpid(), number) or 0)
    previous = signal.signal(number, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        if is_ignored:  # nohup
            assert main(["doctor"]) == 0
        else:
            with pytest.raises(SystemExit) as stop:
                main(["doctor"])
            assert stop.value.code == 128 + number
        assert signal.getsignal(number) == (signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    finally:
        signal.signal(number, previous)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_main_signal_that_a_library_turns_into_its_own_error_ends_the_verb(doctor, number):
    def library(arguments):
        try:
            os.kill(os.getpid(), number)
        except BaseException:  # as a library in C or Rust does
            raise ValueError("could not determine the shape of object type") from None

    doctor(library)
    previous = signal.signal(number, signal.SIG_DFL)  # a job in the background ignores SIGINT
    try:
        if number == signal.SIGINT:
            assert main(["doctor"]) == INTERRUPTED
        else:
            with pytest.raises(SystemExit) as stop:
                main(["doctor"])
            assert stop.value.code == 128 + number
    finally:
        signal.signal(number, previous)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("as_json", [True, False])
def test_main_prints_paths_that_are_not_utf8(tmp_path, encoding, as_json):
    out = tmp_path / os.fsdecode("größe \xff.png".encode("latin-1"))
    command = ["synth", "--num-examples", "1", "--out", out, *(["--json"] if as_json else [])]
    done = subprocess.run(
        [sys.executable, "-m", "coprs_deploy", *command],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert out.is_file()
    if as_json:
        assert json.loads(done.stdout)["file"] == str(out)
    else:
        assert rb"gr\udcf6\udcdfe \udcff.png" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["nothing", "--json"], ["--json"], ["doctor", "--jso", "--json"]]
)
def test_main_wrong_use_with_json_is_one_object_and_exit_code_2(capsys, arguments):
    assert main(arguments) == 2
    body = json.loads(capsys.readouterr().out)
    assert set(body) == {"error", "type"}
    assert body["type"] == "ArgumentError"


def test_main_broken_pipe_of_another_file_is_an_error(doctor, capfd):
    doctor(failing(BrokenPipeError(32, "Broken pipe")))
    assert main(["doctor"]) == 2
    assert "coprs-deploy doctor: [Errno 32] Broken pipe" in capfd.readouterr().err


@pytest.mark.parametrize(("stream", "code"), [(">&-", 0), ("2>&-", 0)])
def test_main_with_a_closed_stream_ends_with_its_exit_code(stream, code):
    command = f"{sys.executable} -m coprs_deploy inspect {demo.BUNDLE} {stream}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (code, "")


def test_main_error_with_closed_stderr_does_not_go_to_stdout(tmp_path):
    command = f"{sys.executable} -m coprs_deploy inspect {tmp_path} 2>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_main_signal_during_an_export_leaves_nothing_behind(tmp_path, number):
    command = ["export", demo.CHECKPOINT, "--out", tmp_path / "bundle"]
    reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-m", "coprs_deploy", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=reset,  # noqa: PLW1509  # a job in the background ignores SIGINT
    )
    assert b"load checkpoint" in process.stderr.readline()  # the graphs are being written
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr.decode()
    assert list(tmp_path.iterdir()) == []
