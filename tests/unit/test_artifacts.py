"""Atomic directories and files, locks between processes, content hashes."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coprs_deploy.artifacts import (
    FileRecord,
    atomic_write,
    check_replaceable,
    check_writable,
    exclusive,
    fingerprint,
    hash_file,
    make_directory,
    new_directory,
    record_files,
    temporary_directory,
    write_json,
    write_text,
)
from coprs_deploy.errors import ArtifactError

MARKER = "config.json"


def write_kind(path, content="old"):
    path.mkdir(parents=True)
    (path / MARKER).write_text(content)
    (path / "weights").write_text("of the " + content)
    return path


def contents(path):
    """Return the files below a directory, without hidden ones."""
    files = {file.relative_to(path): file for file in path.rglob("[!.]*") if file.is_file()}
    return {
        name.as_posix(): file.read_text()
        for name, file in sorted(files.items())
        if not any(part.startswith(".") for part in name.parts)
    }


def hidden_in(path):
    return [entry.name for entry in path.rglob(".*")]


def names_in(path):
    return sorted(entry.name for entry in path.iterdir())


OLD = {MARKER: "old", "weights": "of the old"}


# Atomic directories


def test_new_directory_appears_when_block_ends(tmp_path):
    target = tmp_path / "deep" / "er" / "model"
    with new_directory(target, MARKER) as partial:
        assert partial.parent.parent == target.parent
        assert partial.parent.name.startswith(".")
        assert not target.exists()
        (partial / MARKER).write_text("new")
        (partial / "folder").mkdir()
        (partial / "folder" / "file").write_text("inside")
    assert contents(target) == {MARKER: "new", "folder/file": "inside"}
    assert names_in(target.parent) == ["model"]


def test_new_directory_is_readable_by_others(tmp_path):
    with new_directory(tmp_path / "model", MARKER):
        pass
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_new_directory_failing_block_leaves_nothing(tmp_path, error):
    with (
        pytest.raises(error, match="the reason"),
        new_directory(tmp_path / "model", MARKER) as partial,
    ):
        (partial / MARKER).write_text("new")
        raise error("the reason")
    assert names_in(tmp_path) == []


def test_new_directory_failing_block_keeps_old_directory(tmp_path):
    target = write_kind(tmp_path / "model")
    with (
        pytest.raises(ValueError, match="the reason"),
        new_directory(target, MARKER, overwrite=True) as partial,
    ):
        (partial / MARKER).write_text("new")
        raise ValueError("the reason")
    assert contents(target) == OLD
    assert names_in(tmp_path) == ["model"]
    assert hidden_in(tmp_path) == []


def test_new_directory_overwrite_replaces_all_files(tmp_path):
    target = write_kind(tmp_path / "model")
    with new_directory(target, MARKER, overwrite=True) as partial:
        (partial / MARKER).write_text("new")
        assert contents(target) == OLD
    assert contents(target) == {MARKER: "new"}
    assert names_in(tmp_path) == ["model"]
    assert hidden_in(tmp_path) == []


def test_new_directory_gives_the_permissions_of_new_files(tmp_path):
    target, source = tmp_path / "model", tmp_path / "source"
    source.mkdir()
    (source / "weights").write_text("x")
    (source / "weights").chmod(0o400)
    source.chmod(0o500)
    with new_directory(target, MARKER) as partial:
        (partial / MARKER).touch(mode=0o600)
        shutil.copytree(source, partial / "policy")
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in target.rglob("*")}
    assert modes == {MARKER: 0o644, "policy": 0o755, "weights": 0o644}


def test_new_directory_read_only_old_directory_is_replaced(tmp_path):
    target = write_kind(tmp_path / "model")
    for path in (target / "weights", target / MARKER, target):
        path.chmod(path.stat().st_mode & 0o555)
    with new_directory(target, MARKER, overwrite=True) as partial:
        (partial / MARKER).write_text("new")
    assert contents(target) == {MARKER: "new"}
    assert names_in(tmp_path) == ["model"]
    assert hidden_in(tmp_path) == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_new_directory_keeps_what_appears_meanwhile(tmp_path, overwrite):
    target = tmp_path / "model"
    with (
        pytest.raises(ArtifactError, match="it is not replaced"),
        new_directory(target, MARKER, overwrite) as partial,
    ):
        (partial / MARKER).write_text("new")
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    assert contents(tmp_path) == {"model/thesis.txt": "mine"}


def test_new_directory_second_writer_is_refused(tmp_path):
    target = tmp_path / "model"
    with new_directory(target, MARKER) as partial:
        (partial / MARKER).write_text("new")
        with (
            pytest.raises(ArtifactError, match="is being written by another process"),
            new_directory(target, MARKER),
        ):
            pass
    assert contents(tmp_path) == {f"model/{MARKER}": "new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_new_directory_fills_an_existing_directory_in_place(tmp_path, overwrite):
    target = tmp_path / "volume"
    if overwrite:
        write_kind(target)
    else:
        target.mkdir()
    (target / "lost+found").mkdir()
    inode = target.stat().st_ino
    with new_directory(target, MARKER, overwrite) as partial:
        assert partial.parent.parent == target
        (partial / MARKER).write_text("new")
        (partial / "folder").mkdir()
    assert target.stat().st_ino == inode
    assert names_in(target) == [MARKER, "folder", "lost+found"]
    assert names_in(tmp_path) == ["volume"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "weights"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
    ],
)
def test_new_directory_full_disk_is_one_os_error(tmp_path, error):
    target = tmp_path / "model"
    with pytest.raises(OSError, match="No space left") as caught, new_directory(target, MARKER):
        raise error
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert names_in(tmp_path) == []


KILLED_WRITER = """
import json, os, sys
from pathlib import Path
from coprs_deploy.artifacts import new_directory

def write(target, last):
    '''Replace the target; end without any cleanup at the given system call.'''
    calls = 0

    def ending(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == last:
                os._exit(9)
            return function(*arguments, **options)
        return call

    with new_directory(target, "config.json", overwrite=True) as partial:
        for name in ("config.json", "graph"):
            (partial / name).write_text("new")
        if last == 0:
            os._exit(9)
        for owner, name in ((Path, "rename"), (os, "unlink"), (os, "rmdir"), (Path, "rmdir")):
            setattr(owner, name, ending(getattr(owner, name)))

codes = []
for target, last in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        write(Path(target), last)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes)
"""


def kill_writers(*targets):
    """Write directories in processes that end at their n-th call; return their exit codes."""
    words = json.dumps([(str(target), last) for target, last in targets])
    command = [sys.executable, "-c", KILLED_WRITER, words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


NEW = {MARKER: "new", "graph": "new"}


@pytest.mark.parametrize("exists", [True, False])
def test_new_directory_killed_process_leaves_target_unchanged(tmp_path, exists):
    target = tmp_path / "model"
    if exists:
        write_kind(target)
    assert kill_writers((target, 0)) == [9]
    assert (contents(target) == OLD) if exists else not target.exists()
    with new_directory(target, MARKER, overwrite=True) as partial:
        (partial / MARKER).write_text("newer")
    assert contents(target) == {MARKER: "newer"}
    assert hidden_in(tmp_path) == []  # what the killed process left is gone


@pytest.mark.parametrize("kind", ["full", "empty", "missing"])
def test_new_directory_killed_at_any_moment_is_old_or_new_after_the_next_run(tmp_path, kind):
    targets = [(tmp_path / str(last) / "model", last) for last in range(1, 40)]
    for target, _ in targets:
        target.parent.mkdir()
        if kind == "full":
            write_kind(target)
        elif kind == "empty":
            target.mkdir()
    before = OLD if kind == "full" else {}
    codes = kill_writers(*targets)
    for target, _ in targets:
        check_replaceable(target, MARKER, overwrite=True)
        with (
            pytest.raises(ValueError, match="the reason"),
            new_directory(target, MARKER, overwrite=True),
        ):
            assert contents(target) in (before, NEW)
            raise ValueError("the reason")
        assert contents(target) in (before, NEW)
        assert names_in(target.parent) in ([], ["model"])
        assert hidden_in(target.parent) == []
    num_calls = codes.index(0)
    assert codes == [9] * num_calls + [0] * (len(codes) - num_calls)
    assert num_calls > {"full": 9, "empty": 6, "missing": 2}[kind]


def test_new_directory_user_file_beside_an_unfinished_replacement_is_kept(tmp_path):
    target = write_kind(tmp_path / "model")
    assert kill_writers((target, 4)) == [9]
    (target / "thesis.txt").write_text("mine")
    with (
        pytest.raises(ValueError, match="the reason"),
        new_directory(target, MARKER, overwrite=True),
    ):
        raise ValueError("the reason")
    assert contents(target) == {**OLD, "thesis.txt": "mine"}
    assert hidden_in(tmp_path) == []


def test_new_directory_failed_rename_restores_old_directory(tmp_path, monkeypatch):
    target = write_kind(tmp_path / "model")
    rename = Path.rename

    def fail_to_take_the_place(self, destination):
        if self.parent.name == "new":
            raise OSError("no space left")
        return rename(self, destination)

    monkeypatch.setattr(Path, "rename", fail_to_take_the_place)
    with (
        pytest.raises(OSError, match="no space left"),
        new_directory(target, MARKER, overwrite=True) as partial,
    ):
        (partial / MARKER).write_text("new")
    assert contents(target) == OLD
    assert names_in(tmp_path) == ["model"]
    assert hidden_in(tmp_path) == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_new_directory_working_directory_stays_the_same_directory(tmp_path, monkeypatch, overwrite):
    target = tmp_path / "here"
    if overwrite:
        write_kind(target)
    else:
        target.mkdir()
    monkeypatch.chdir(target)
    with new_directory(Path(), MARKER, overwrite) as partial:
        (partial / MARKER).write_text("new")
    assert contents(Path()) == contents(target) == {MARKER: "new"}
    assert names_in(tmp_path) == ["here"]


@pytest.mark.parametrize("name", ["a b", "new\nline", "größe", "[x]*", "n" * 255])
def test_new_directory_any_name_is_accepted(tmp_path, name):
    target = write_kind(tmp_path / name)
    with new_directory(target, MARKER, overwrite=True) as partial:
        (partial / MARKER).write_text("new")
    assert contents(target) == {MARKER: "new"}
    assert names_in(tmp_path) == [name]


# Refusals


def identity(path):
    """Return what changes if a path is modified; the access time may change on reading."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def assert_refused(path, message, overwrite):
    before = identity(path) if os.path.lexists(path) else None
    with pytest.raises(ArtifactError, match=message):
        check_replaceable(path, MARKER, overwrite)
    with (
        pytest.raises(ArtifactError, match=message),
        new_directory(path, MARKER, overwrite),
    ):
        pytest.fail("the block was entered")
    assert (identity(path) if os.path.lexists(path) else None) == before
    assert [name for name in names_in(path.parent) if name.startswith(".")] == []


def test_new_directory_without_overwrite_keeps_existing(tmp_path):
    target = write_kind(tmp_path / "model")
    assert_refused(target, r"model exists; pass --overwrite", overwrite=False)
    assert contents(target) == OLD
    check_replaceable(target, MARKER, overwrite=True)


@pytest.mark.parametrize("overwrite", [True, False])
def test_new_directory_foreign_directory_is_refused(tmp_path, overwrite):
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.jpg").write_text("dear")
    assert_refused(foreign, r"photos exists and has no config\.json: it is not replaced", overwrite)
    assert contents(foreign) == {"holiday.jpg": "dear"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_new_directory_marker_directory_is_refused(tmp_path, overwrite):
    (tmp_path / "photos" / MARKER).mkdir(parents=True)
    assert_refused(tmp_path / "photos", "it is not replaced", overwrite)


@pytest.mark.parametrize("overwrite", [True, False])
def test_new_directory_file_is_refused(tmp_path, overwrite):
    (tmp_path / "model").write_text("a file")
    assert_refused(tmp_path / "model", "it is not replaced", overwrite)
    assert (tmp_path / "model").read_text() == "a file"


@pytest.mark.parametrize("overwrite", [True, False])
def test_new_directory_empty_directory_is_filled(tmp_path, overwrite):
    (tmp_path / "model").mkdir()
    with new_directory(tmp_path / "model", MARKER, overwrite) as partial:
        (partial / MARKER).write_text("new")
    assert contents(tmp_path / "model") == {MARKER: "new"}
    assert names_in(tmp_path) == ["model"]
    assert hidden_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["full", "empty", "missing"])
def test_new_directory_follows_a_link(tmp_path, kind):
    (tmp_path / "disk").mkdir()
    behind, link = tmp_path / "disk" / "behind", tmp_path / "model"
    if kind == "full":
        write_kind(behind)
    elif kind == "empty":
        behind.mkdir()
    link.symlink_to(behind, target_is_directory=True)
    with new_directory(link, MARKER, overwrite=True) as partial:
        assert partial.is_relative_to(tmp_path / "disk")
        (partial / MARKER).write_text("new")
    assert contents(behind) == {MARKER: "new"}
    assert link.is_symlink()
    assert names_in(tmp_path / "disk") == ["behind"]


def test_new_directory_name_that_is_not_utf8_is_refused(tmp_path):
    assert_refused(tmp_path / os.fsdecode(b"\xff"), r"udcff' is not UTF-8", overwrite=True)


def test_new_directory_link_to_itself_is_refused(tmp_path):
    (tmp_path / "model").symlink_to(tmp_path / "model")
    assert_refused(tmp_path / "model", "it is not replaced", overwrite=True)


# Hashes and files


def test_hash_file_equals_sha256(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert hash_file(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    file.write_bytes(bytes(3_000_000))
    assert hash_file(file) == hashlib.sha256(bytes(3_000_000)).hexdigest()


def test_record_files_returns_sorted_posix_paths(tmp_path):
    for name in ("b", "a/z", "a/y/x", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    records = record_files(tmp_path)
    assert [record.path for record in records] == ["a/y/x", "a/z", "b"]  # hidden ones do not count
    assert [record.size_bytes for record in records] == [5, 3, 1]
    assert records[2].sha256 == hashlib.sha256(b"b").hexdigest()


def test_record_files_below_directory_keeps_paths_from_root(tmp_path):
    for name in ("graph", "policy/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [record.path for record in record_files(tmp_path, {"policy"})] == ["policy/config.json"]


def test_record_files_follows_links_to_directories(tmp_path):
    for name in ("shared/config.json", "checkpoint/weights"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint" / "policy").symlink_to("../shared")
    records = record_files(tmp_path / "checkpoint", {"policy", "weights"})
    assert [record.path for record in records] == ["policy/config.json", "weights"]


def test_fingerprint_depends_on_paths_and_contents_not_order():
    first, second = FileRecord("a", 1, "0" * 64), FileRecord("b", 1, "1" * 64)
    names = {
        fingerprint((first, second)),
        fingerprint((FileRecord("a", 1, "1" * 64), FileRecord("b", 1, "0" * 64))),
        fingerprint((FileRecord("a", 1, "2" * 64), second)),
        fingerprint((FileRecord("c", 1, "0" * 64), second)),
        fingerprint((first,)),
        fingerprint(()),
    }
    assert len(names) == 6
    assert fingerprint((first, second)) == fingerprint((second, first))


def test_write_json_is_indented_unicode(tmp_path):
    write_json(tmp_path / "file.json", {"name": "Größe 日本", "numbers": [1, 2.5, None]})
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "name": "Größe 日本",\n')
    assert text.endswith("}\n")
    assert json.loads(text) == {"name": "Größe 日本", "numbers": [1, 2.5, None]}


def test_atomic_write_replaces_file_when_block_ends(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as partial:
        partial.write_bytes(b"new")
        assert partial.parent == tmp_path and partial.name.startswith(".")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_failing_block_keeps_old_file(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as partial:
        partial.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_removes_leftovers_of_killed_processes_only(tmp_path):
    path = tmp_path / "weights"
    own, other = (tmp_path / f".weights.new-{number}" for number in (os.getpid(), os.getppid()))
    ended = subprocess.Popen(["true"])
    ended.wait()
    write_kind(own)
    write_kind(tmp_path / f".weights.new-{ended.pid}")
    other.write_text("being written")
    with atomic_write(path) as partial:
        assert names_in(tmp_path) == [other.name]
        partial.mkdir()
        (partial / "one").write_text("1")
    assert [file.name for file in path.iterdir()] == ["one"]
    assert names_in(tmp_path) == [other.name, "weights"]


def test_atomic_write_from_several_threads_is_one_of_the_texts(tmp_path):
    path, count = tmp_path / "config.json", 8
    texts = [str(number) * 10_000 for number in range(count)]
    started = threading.Barrier(count)

    def write(text):
        with atomic_write(path) as partial:
            partial.write_text(text)
            started.wait(30)  # all of them are writing
        with atomic_write(path) as partial:
            partial.write_text(text)
        return path.read_text() in texts

    with ThreadPoolExecutor(count) as pool:
        assert all(pool.map(write, texts))
    assert names_in(tmp_path) == ["config.json"]


def test_atomic_write_follows_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    for text in ("first", "second"):
        with atomic_write(tmp_path / "link") as partial:
            partial.write_text(text)
        assert contents(tmp_path / "disk") == {"file": text}
    assert (tmp_path / "link").is_symlink()


def test_atomic_write_pipe_is_written_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    write_text(tmp_path / "pipe", "content")
    assert reader.communicate(timeout=60)[0] == b"content"
    assert names_in(tmp_path) == ["pipe"]


def test_atomic_write_full_disk_names_the_file(tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert names_in(tmp_path) == []


def test_write_json_path_that_is_not_utf8_is_read_back(tmp_path):
    path = os.fsdecode(b"/data/\xff.png")
    write_json(tmp_path / "file.json", {"path": path, "name": "Größe"})
    assert json.loads((tmp_path / "file.json").read_text("utf-8")) == {
        "path": path,
        "name": "Größe",
    }


# Early checks


def test_check_writable_accepts_what_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path, tmp_path / "new", tmp_path / "new" / "deep"):
        check_writable(directory)
    for file in (tmp_path / "file", tmp_path / "other", tmp_path / "new" / "f", Path(os.devnull)):
        check_writable(file, is_file=True)
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("path", "is_file", "number", "named"),
    [
        ("file", False, errno.ENOTDIR, "file"),
        ("file/below", False, errno.ENOTDIR, "file"),
        ("file/below", True, errno.ENOTDIR, "file"),
        ("", True, errno.EISDIR, ""),
    ],
)
def test_check_writable_names_what_is_in_the_way(tmp_path, path, is_file, number, named):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"[Dd]irectory") as caught:
        check_writable(tmp_path / path, is_file=is_file)
    assert caught.value.errno == number
    assert Path(caught.value.filename) == tmp_path / named


HOLD = """
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from coprs_deploy.artifacts import exclusive
with exclusive(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_exclusive_held_lock_is_refused_until_holder_is_killed(tmp_path):
    lock = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ArtifactError, match="taken by another"),
            exclusive(lock, "taken by another"),
        ):
            pass
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
        with exclusive(lock, "taken"):
            assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    with exclusive(lock, "taken"):
        pass
    assert lock.read_bytes() == b""


def test_exclusive_without_lock_support_raises_and_leaves_no_marker(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="no locks here"), exclusive(tmp_path / ".lock", "taken"):
        pass
    assert all(file.read_bytes() == b"" for file in tmp_path.iterdir())


def test_make_directory_creates_what_a_link_points_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "new")
    for path in (tmp_path / "link", tmp_path / "link", tmp_path / "deep" / "er"):
        make_directory(path)
        assert path.is_dir()
    assert (tmp_path / "link").is_symlink()
    assert names_in(tmp_path / "disk") == ["new"]


# Temporary directories

KILLED_USER = """
import os, sys
from pathlib import Path
from coprs_deploy.artifacts import temporary_directory
with temporary_directory("work-", Path(sys.argv[1])) as folder:
    (folder / "file").touch()
    print(folder, flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.read()
    os._exit(9)
"""


def test_temporary_directory_is_removed_at_the_end(tmp_path):
    with temporary_directory("work-", tmp_path) as folder:
        assert folder.parent == tmp_path and folder.name.startswith("work-")
        (folder / "file").touch()
    assert names_in(tmp_path) == []


def test_temporary_directory_removes_those_of_killed_processes_only(tmp_path):
    command = [sys.executable, "-c", KILLED_USER, tmp_path]
    assert subprocess.run([*command, "end"], check=False).returncode == 9
    assert len(names_in(tmp_path)) == 1
    (tmp_path / "other-1").mkdir()
    with subprocess.Popen(
        [*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        theirs = Path(running.stdout.readline().strip()).name
        assert names_in(tmp_path) == ["other-1", theirs]
        with temporary_directory("work-", tmp_path) as folder:
            assert names_in(tmp_path) == sorted(["other-1", theirs, folder.name])
        running.stdin.close()
    with temporary_directory("work-", tmp_path):
        pass
    assert names_in(tmp_path) == ["other-1"]
