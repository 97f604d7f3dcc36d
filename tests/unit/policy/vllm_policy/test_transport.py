"""Vectors on their way out of an engine's process."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from coprs_deploy.errors import PolicyError
from coprs_deploy.policy.vllm_policy import transport
from coprs_deploy.policy.vllm_policy.transport import HiddenStateTransport, append_vector

WIDTH = 4


def vector(value):
    return np.full(WIDTH, value, dtype=np.float32)


@pytest.fixture
def files(tmp_path):
    with HiddenStateTransport(WIDTH, tmp_path) as files:
        yield files


def test_vectors_come_back_in_the_order_of_their_positions_and_once(files):
    path = files.open()
    for position, value in ((7, 1.0), (3, 2.0), (12, 3.0)):
        append_vector(str(path), position, vector(value))
    assert len(files) == 1
    taken = files.take(path)
    assert taken.dtype == np.float32
    assert taken.tolist() == [[2.0] * WIDTH, [1.0] * WIDTH, [3.0] * WIDTH]
    assert len(files) == 0
    assert files.take(path).shape == (0, WIDTH)


def test_the_last_vector_of_a_position_counts(files):
    path = files.open()
    for value in (1.0, 2.0):
        append_vector(str(path), 5, vector(value))
    assert files.take(path).tolist() == [[2.0] * WIDTH]


def test_requests_do_not_share_files(files):
    one, other = files.open(), files.open()
    append_vector(str(one), 0, vector(1.0))
    assert files.take(other).shape == (0, WIDTH)
    assert files.take(one).shape == (1, WIDTH)


def test_a_vector_for_a_file_that_is_gone_goes_nowhere(files):
    path = files.open()
    path.unlink()
    append_vector(str(path), 0, vector(1.0))
    assert not path.exists()


def test_another_process_may_append(files):
    path = files.open()
    code = (
        "import sys, numpy as np\n"
        "from coprs_deploy.policy.vllm_policy.transport import append_vector\n"
        f"append_vector(sys.argv[1], 2, np.arange({WIDTH}, dtype=np.float32))"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert files.take(path).tolist() == [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1])
def test_vectors_of_another_width_are_refused(files, width):
    path = files.open()
    append_vector(str(path), 0, np.zeros(width, dtype=np.float32))
    with pytest.raises(ValueError, match="are no whole vectors of 4 float32"):
        files.take(path)


@pytest.mark.parametrize("room", [0, 5])
def test_a_vector_without_room_is_lost_and_not_the_engine(files, monkeypatch, caplog, room):
    path = files.open()
    append_vector(str(path), 0, vector(1.0))
    write = os.write

    def write_what_fits(file, content):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content[:room])

    monkeypatch.setattr(os, "write", write_what_fits)
    append_vector(str(path), 1, vector(2.0))
    monkeypatch.undo()
    assert "a vector was lost" in caplog.text and "No space left" in caplog.text
    assert files.take(path).tolist() == [[1.0] * WIDTH]


def test_a_file_lasts_as_long_as_its_request(files):
    with files.for_request() as path:
        assert path.exists()
    assert len(files) == 0
    with pytest.raises(RuntimeError, match="left early"), files.for_request() as path:
        raise RuntimeError("left early")
    assert len(files) == 0


def test_a_request_behind_the_end_is_refused(tmp_path):
    files = HiddenStateTransport(WIDTH, tmp_path)
    files.close()
    with pytest.raises(PolicyError, match="the policy was closed"):
        files.open()


def test_closing_removes_what_nobody_took(tmp_path):
    files = HiddenStateTransport(WIDTH, tmp_path)
    append_vector(str(files.open()), 0, vector(1.0))
    files.close()
    assert list(tmp_path.iterdir()) == []
    files.close()


def test_only_the_owner_reads_them(files):
    path = files.open()
    assert path.stat().st_mode & 0o077 == 0
    assert files.folder.stat().st_mode & 0o077 == 0


def test_without_shared_memory_the_folder_for_temporary_files_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with HiddenStateTransport(WIDTH) as files:
        assert files.folder.parent == tmp_path


KILLED = """
import os, signal, sys
from pathlib import Path
from coprs_deploy.policy.vector_files import VectorFiles
files = VectorFiles(4, Path(sys.argv[1]))
files.open()
print(files.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_killed_process_is_removed_by_the_next(tmp_path, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    left = Path(done.stdout.strip())
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(left.glob("[!.]*"))) == 1
    with HiddenStateTransport(WIDTH, tmp_path) as young:
        assert left.is_dir()  # it might still be on its way to its lock
        monkeypatch.setattr(transport, "YOUNG_SECONDS", -1)
        with HiddenStateTransport(WIDTH, tmp_path) as files:
            assert not left.exists()
            assert young.folder.is_dir()
            assert files.folder.is_dir()
    assert list(tmp_path.iterdir()) == []
