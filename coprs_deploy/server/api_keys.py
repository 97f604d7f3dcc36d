"""API keys: hashed in a file, compared in constant time, and limited per key.

    {"keys": [{"name": "alice", "sha256": "...", "requests_per_minute": 60, "max_concurrent": 2}]}

A key is 256 random bits, so that a fast hash is enough: they cannot all be tried. The file is read
again when it changes; removing an entry revokes its key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from coprs_deploy.artifacts import atomic_write
from coprs_deploy.specs import Record

KEY_PREFIX = "coprs_"
"""Start of a key, by which scanners for leaked secrets find it."""

COMMAND_LINE_KEY = "default"
"""Name of the key of ``--api-key``."""

WINDOW_S = 60.0

_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)

logger = logging.getLogger(__name__)


class KeyLimitError(Exception):
    """The limit of an API key is reached.

    Attributes:
        retry_after_s: whole seconds after which a request may be accepted.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


Limit = Annotated[int, msgspec.Meta(ge=1)]


class ApiKey(Record, frozen=True, omit_defaults=True):
    """A key as the file has it.

    Attributes:
        name: who has it, for log and file.
        sha256: SHA-256 of the key, 64 hexadecimal digits.
        requests_per_minute: limit of this key; None selects that of the server.
        max_concurrent: limit of this key; None selects that of the server.
    """

    name: Annotated[str, msgspec.Meta(pattern=rf"^{_NAME.pattern}$")]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    requests_per_minute: Limit | None = None
    max_concurrent: Limit | None = None


class KeyFile(Record, frozen=True):
    """Content of a file of keys."""

    keys: list[ApiKey]

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """Read a file.

        Raises:
            ValueError: it is no file of keys, or two keys have one name.
            OSError: it cannot be read.
        """
        try:
            content = msgspec.json.decode(path.read_bytes(), type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is no file of API keys ({error}); make one with: coprs-deploy serve "
                "--api-keys FILE --new-api-key NAME"
            ) from error
        names = [key.name for key in content.keys]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{path} has two keys named {', '.join(repeated)}; rename one")
        return content


def new_key(path: Path, name: str) -> str:
    """Add a new key to a file, which is made if it does not exist; return the key.

    Only its hash is stored, and only the owner of the file can read it.

    Raises:
        ValueError: the name is taken or not accepted, or the file is no file of keys.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--new-api-key is {name!r}; accepted: a name of 1 to 64 letters, digits or ._@-"
        )
    keys = KeyFile.read(path).keys if path.exists() else []
    if name in (key.name for key in keys):
        raise ValueError(f"{path} has a key named {name}; remove it, or choose another name")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    content = KeyFile([*keys, ApiKey(name, _sha256(key))])
    with atomic_write(path) as partial:
        partial.touch(mode=0o600)
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
        partial.chmod(0o600)
    return key


@dataclass
class _Usage:
    """Use of a key: when its last requests came, and how many are active."""

    times: deque[float] = field(default_factory=deque)
    num_active: int = 0


class ApiKeys:
    """The keys of a server, and their use.

    Args:
        key: key of the command line; empty for none.
        path: file of keys; None for none.
        requests_per_minute: limit of a key that has none of its own; None for no limit.
        max_concurrent: limit of a key that has none of its own; None for no limit.
        clock: returns seconds; ``time.monotonic``, or its replacement in a test.

    Raises:
        ValueError: the file is no file of keys.
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        key: str = "",
        path: Path | None = None,
        requests_per_minute: int | None = None,
        max_concurrent: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given = [ApiKey(COMMAND_LINE_KEY, _sha256(key))] if key else []
        self._path = path
        self._requests_per_minute = requests_per_minute
        self._max_concurrent = max_concurrent
        self._clock = clock
        self._usage: dict[str, _Usage] = {}
        self._version = self._stat()
        self._keys = self._read()

    def find(self, given: str) -> ApiKey | None:
        """Return the key that a client sent; None if there is no such key.

        All hashes are compared, each in constant time: the time tells nothing about them.
        """
        self._reload()
        digest = _sha256(given)
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found

    @contextmanager
    def admit(self, key: ApiKey) -> Iterator[None]:
        """Count a request for the limits of its key; it is active inside the block.

        Raises:
            KeyLimitError: a limit is reached; the request does not count.
        """
        usage = self._usage.setdefault(key.sha256, _Usage())
        now = self._clock()
        while usage.times and usage.times[0] <= now - WINDOW_S:
            usage.times.popleft()
        most = key.requests_per_minute or self._requests_per_minute
        if most is not None and len(usage.times) >= most:
            wait_s = usage.times[0] + WINDOW_S - now
            raise KeyLimitError(
                f"the API key {key.name} has sent {most} requests in the last minute, its limit; "
                f"retry in {math.ceil(wait_s)} s",
                max(1, math.ceil(wait_s)),
            )
        most_active = key.max_concurrent or self._max_concurrent
        if most_active is not None and usage.num_active >= most_active:
            raise KeyLimitError(
                f"the API key {key.name} has {most_active} active requests, its limit; retry when "
                "one has ended",
                1,
            )
        if most is not None:
            usage.times.append(now)
        usage.num_active += 1
        try:
            yield
        finally:
            usage.num_active -= 1

    def _reload(self) -> None:
        """Read the file again if it changed; keep the keys if it cannot be used."""
        version = self._stat()
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = self._read()
        except (ValueError, OSError) as error:
            logger.error("the API keys were not read again: %s", error)
        else:
            logger.warning("the API keys were read again: %d", len(self._keys))

    def _stat(self) -> object:
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return "missing"
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> Sequence[ApiKey]:
        return self._given + (KeyFile.read(self._path).keys if self._path else [])


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
