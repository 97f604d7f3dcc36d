"""Transport of hidden states out of the engine's process."""

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
from coprs_deploy.policy.vllm_policy.transport import HiddenStateTransport, append_hidden_state

HIDDEN_SIZE = 4


def state(value):
    return np.full(HIDDEN_SIZE, value, dtype=np.float32)


@pytest.fixture
def opened(tmp_path):
    with HiddenStateTransport(HIDDEN_SIZE, tmp_path) as opened:
        yield opened


def test_take_returns_the_states_ordered_by_position_and_once(opened):
    path = opened.create()
    for position, value in ((7, 1.0), (3, 2.0), (12, 3.0)):
        append_hidden_state(str(path), position, state(value))
    assert len(opened) == 1
    taken = opened.take(path)
    assert taken.dtype == np.float32
    assert taken.tolist() == [[2.0] * HIDDEN_SIZE, [1.0] * HIDDEN_SIZE, [3.0] * HIDDEN_SIZE]
    assert len(opened) == 0
    assert opened.take(path).shape == (0, HIDDEN_SIZE)


def test_take_last_state_of_a_position_counts(opened):
    path = opened.create()
    for value in (1.0, 2.0):
        append_hidden_state(str(path), 5, state(value))
    assert opened.take(path).tolist() == [[2.0] * HIDDEN_SIZE]


def test_create_requests_have_separate_files(opened):
    one, other = opened.create(), opened.create()
    append_hidden_state(str(one), 0, state(1.0))
    assert opened.take(other).shape == (0, HIDDEN_SIZE)
    assert opened.take(one).shape == (1, HIDDEN_SIZE)


def test_append_hidden_state_missing_file_is_not_created(opened):
    path = opened.create()
    path.unlink()
    append_hidden_state(str(path), 0, state(1.0))
    assert not path.exists()


def test_append_hidden_state_from_another_process_is_read(opened):
    path = opened.create()
    code = (
        "import sys, numpy as np\n"
        "from coprs_deploy.policy.vllm_policy.transport import append_hidden_state\n"
        f"append_hidden_state(sys.argv[1], 2, np.arange({HIDDEN_SIZE}, dtype=np.float32))"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert opened.take(path).tolist() == [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize("size", [HIDDEN_SIZE - 1, HIDDEN_SIZE + 1])
def test_take_states_of_another_size_are_refused(opened, size):
    path = opened.create()
    append_hidden_state(str(path), 0, np.zeros(size, dtype=np.float32))
    with pytest.raises(ValueError, match="not a whole number of hidden states of 4 float32"):
        opened.take(path)


@pytest.mark.parametrize("room", [0, 5])
def test_append_hidden_state_without_space_is_logged_and_drops_the_state(
    opened, monkeypatch, caplog, room
):
    path = opened.create()
    append_hidden_state(str(path), 0, state(1.0))
    write = os.write

    def write_what_fits(file, content):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content[:room])

    monkeypatch.setattr(os, "write", write_what_fits)
    append_hidden_state(str(path), 1, state(2.0))
    monkeypatch.undo()
    assert "hidden state lost" in caplog.text and "No space left" in caplog.text
    assert opened.take(path).tolist() == [[1.0] * HIDDEN_SIZE]


def test_for_request_removes_the_file_after_the_block(opened):
    with opened.for_request() as path:
        assert path.exists()
    assert len(opened) == 0
    with pytest.raises(RuntimeError, match="left early"), opened.for_request() as path:
        raise RuntimeError("left early")
    assert len(opened) == 0


def test_create_after_close_is_refused(tmp_path):
    opened = HiddenStateTransport(HIDDEN_SIZE, tmp_path)
    opened.close()
    with pytest.raises(PolicyError, match="the policy was closed"):
        opened.create()


def test_close_removes_unread_files(tmp_path):
    opened = HiddenStateTransport(HIDDEN_SIZE, tmp_path)
    append_hidden_state(str(opened.create()), 0, state(1.0))
    opened.close()
    assert list(tmp_path.iterdir()) == []
    opened.close()


def test_files_are_readable_by_the_owner_only(opened):
    path = opened.create()
    assert path.stat().st_mode & 0o077 == 0
    assert opened.folder.stat().st_mode & 0o077 == 0


def test_transport_without_shared_memory_uses_the_temporary_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with HiddenStateTransport(HIDDEN_SIZE) as opened:
        assert opened.folder.parent == tmp_path


KILLED = """
import os, signal, sys
from pathlib import Path
from coprs_deploy.policy.vllm_policy.transport import HiddenStateTransport
transport = HiddenStateTransport(4, Path(sys.argv[1]))
transport.create()
print(transport.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_transport_removes_the_folder_of_a_killed_process(tmp_path, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    left = Path(done.stdout.strip())
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(left.glob("[!.]*"))) == 1
    with HiddenStateTransport(HIDDEN_SIZE, tmp_path) as young:
        assert left.is_dir()  # its process may not hold the lock yet
        monkeypatch.setattr(transport, "MIN_ABANDONED_AGE_S", -1)
        with HiddenStateTransport(HIDDEN_SIZE, tmp_path) as opened:
            assert not left.exists()
            assert young.folder.is_dir()
            assert opened.folder.is_dir()
    assert list(tmp_path.iterdir()) == []
