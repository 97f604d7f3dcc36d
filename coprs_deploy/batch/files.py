"""Files by local path, or by URL through fsspec where it is installed."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from coprs_deploy.errors import MissingDependencyError, import_failure, install_hint

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    Attributes:
        location: path or URL, by which every process opens it.
        name: path relative to the folder of the source, with forward slashes.
        size_bytes: its size.
    """

    location: str
    name: str
    size_bytes: int

    @property
    def suffix(self) -> str:
        """Suffix of the name in lower case."""
        return PurePosixPath(self.name).suffix.lower()


def is_url(location: str) -> bool:
    """Whether a location is a URL and no path."""
    return bool(_URL.match(location))


def list_files(source: str) -> list[SourceFile]:
    """List the files of a source, sorted by name, without hidden ones.

    Args:
        source: a file, a folder, or a glob pattern, where ``**`` stands for any folders.

    Raises:
        FileNotFoundError: there is no such file.
        MissingDependencyError: it is a URL and fsspec is not installed.
    """
    found = _list_remote(source) if is_url(source) else _list_local(source)
    visible = [file for file in found if not any(p.startswith(".") for p in file.name.split("/"))]
    if not visible:
        raise FileNotFoundError(f"{source} is not a file, or a folder or pattern of files")
    return sorted(visible, key=lambda file: file.name)


def open_file(location: str) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        OSError: it cannot be read.
        MissingDependencyError: it is a URL and fsspec is not installed.
    """
    if not is_url(location):
        return Path(location).open("rb")
    filesystem, path = filesystem_of(location)
    return cast(IO[bytes], filesystem.open(path, "rb"))


def beside(location: str, reference: str) -> str:
    """Return the location of a file that a file refers to, relative to its folder."""
    if is_url(reference):
        return reference
    if is_url(location):
        return f"{location.rpartition('/')[0]}/{reference}"
    return str(Path(location).absolute().parent / reference)


def _list_local(source: str) -> list[SourceFile]:
    path = Path(source)
    if path.is_dir():
        return _described([each for each in path.rglob("*") if each.is_file()], path)
    if path.is_file():
        return _described([path], path.parent)
    if not _MAGIC.search(source):
        return []
    # The folder of the pattern, up to its first magic character.
    fixed = _MAGIC.split(source, maxsplit=1)[0].rpartition("/")[0]
    root = Path(fixed or ("/" if source.startswith("/") else "."))
    paths = [Path(each) for each in glob.glob(source, recursive=True)]  # noqa: PTH207
    return _described([each for each in paths if each.is_file()], root)


def _described(paths: Sequence[Path], root: Path) -> list[SourceFile]:
    return [
        SourceFile(str(path.absolute()), path.relative_to(root).as_posix(), path.stat().st_size)
        for path in paths
    ]


def _list_remote(source: str) -> list[SourceFile]:
    filesystem, path = filesystem_of(source)
    if _MAGIC.search(path):
        found = filesystem.glob(path, detail=True)
        root = _MAGIC.split(path, maxsplit=1)[0].rpartition("/")[0]
    else:
        found = filesystem.find(path, detail=True)
        root = path.rpartition("/")[0] if list(found) == [path] else path
    return [
        SourceFile(filesystem.unstrip_protocol(name), _below(name, root), info["size"])
        for name, info in found.items()
        if info["type"] == "file"
    ]


def _below(name: str, root: str) -> str:
    return name.removeprefix(root).lstrip("/")


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec for a URL, and the path in it.

    Raises:
        MissingDependencyError: fsspec, or the package of the protocol, is not installed.
        ValueError: the protocol is not known.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        hint = install_hint("batch")
        raise import_failure(error, "fsspec", hint, needed_by="a URL") from error
    try:
        found: tuple[Any, str] = url_to_fs(url)
    except ImportError as error:  # of the protocol's package
        hint = install_hint("s3") if url.lower().startswith("s3") else str(error)
        raise MissingDependencyError(f"{url} cannot be opened ({error}); {hint}") from error
    except ValueError as error:
        raise ValueError(f"{url} cannot be opened: {error}") from error
    return found
