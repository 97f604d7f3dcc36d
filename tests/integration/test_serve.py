"""``coprs-deploy serve`` as a process: results, refusals and shutdown."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from coprs_deploy import CoPRS
from coprs_deploy.cli.main import main
from coprs_deploy.errors import install_hint
from tests import ROOT

SCENE = ROOT / "examples" / "scene.png"
INSTRUCTION = "the largest red circle"


def form(image):
    """Encode a multipart form without a library."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="instruction"\r\n\r\n' + INSTRUCTION.encode(),
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + image,
        b"--x--\r\n",
    ]
    return b"\r\n".join(parts)


@pytest.mark.slow
def test_serve_returns_the_result_of_the_runtime_and_stops_on_sigterm():
    command = [sys.executable, "-m", "coprs_deploy", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            lines = iter(server.stderr.readline, "")
            address = next(line for line in lines if re.match(r"http://127\.0\.0\.1:\d+$", line))
            request = urllib.request.Request(
                f"{address.strip()}/segment",
                form(SCENE.read_bytes()),
                {"Content-Type": "multipart/form-data; boundary=x"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                result = json.load(response)
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 0
            assert server.stderr.read().endswith("stopped\n")
        finally:
            server.kill()
    with CoPRS.load() as coprs:
        expected = coprs.segment(SCENE, INSTRUCTION).to_json()
    assert {**result, "timings": None} == {**expected, "timings": None}


def test_serve_address_in_use_is_refused_before_loading(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "nowhere", "--port", str(port)]) == 2
    message = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in message
    assert "choose another --host or --port" in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--port", "70000"], "--port is 70000; it must be from 0 to 65535"),
        (["--max-upload", "0"], "--max-upload is 0.0; it must be above 0 MiB"),
        (["--timeout", "0"], "timeout_s is 0.0; it must be above 0"),
        (["--max-queue-size", "-1"], "max_queue_size is -1; it must be at least 0"),
        (["--policy", "vlm"], "policy is 'vlm'; accepted: "),
    ],
)
def test_serve_arguments_out_of_range_are_refused(arguments, part, capsys):
    assert main(["serve", *arguments]) == 2
    assert part in capsys.readouterr().err


def test_serve_missing_library_names_the_pip_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.strip().endswith(install_hint("serve"))
