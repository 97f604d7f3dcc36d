"""Memory of mapped weight files.

A runtime that maps a weight file and packs the weights for its kernels leaves both in memory: the
packed copy, and the pages of the file, which it does not read again.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

LARGE_BYTES = 100_000_000
"""Size of a file from which its pages are worth a system call."""


class MappedWeights:
    """A weight file that other code has mapped into this process.

    Args:
        file: the file; it need not exist or be mapped.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.resolve()
        self._is_large = file.is_file() and file.stat().st_size >= LARGE_BYTES

    def release(self) -> None:
        """Give back the pages of the file; those that are read again come from the page cache.

        Does nothing for a small file, outside Linux, and where the mapping may be written to.
        """
        if not self._is_large or not hasattr(mmap, "MADV_DONTNEED"):
            return
        try:
            maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        except OSError:
            return
        line = re.compile(rf"^([0-9a-f]+)-([0-9a-f]+) r--. .* {re.escape(str(self._file))}$", re.M)
        system = ctypes.CDLL(None, use_errno=True)
        for first, last in line.findall(maps):
            start, end = int(first, 16), int(last, 16)
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
