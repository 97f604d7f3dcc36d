"""Pickles of plain containers, read without executing anything that they contain."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any, NoReturn

from coprs_deploy.errors import ArtifactError

_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError),
    *(OverflowError, MemoryError, RecursionError, AssertionError, struct.error),
)
"""Errors of the unpickler on bytes that are no pickle, or a damaged one."""


class _ForbiddenGlobalError(Exception):
    """A pickle names a class or a function."""


class _PlainUnpickler(pickle._Unpickler):
    """Unpickler that resolves no name, so that a pickle holds plain containers or is refused.

    That of Python: the one in C allocates memory for the largest index in the file, so that one
    damaged byte takes all memory of the machine.
    """

    def find_class(self, module: str, name: str) -> NoReturn:
        raise _ForbiddenGlobalError(f"{module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of dictionaries, lists, tuples, strings and numbers.

    Strings of Python 2 are decoded as latin1, as the REFER code does.

    Raises:
        FileNotFoundError: the file does not exist.
        ArtifactError: the file is not a pickle, is damaged, or names a class or a function.
    """
    # Of a file, as many bytes as a damaged length says would be allocated.
    content = io.BytesIO(path.read_bytes())
    try:
        return _PlainUnpickler(content, encoding="latin1").load()
    except _ForbiddenGlobalError as error:
        raise ArtifactError(
            f"{path} is refused: it names {error}, and loading a pickle that names a class or a "
            "function can run any code; accepted: plain dictionaries, lists, strings and numbers, "
            "as in the files of REFER; download the original file"
        ) from error
    except _DAMAGE as error:
        raise ArtifactError(
            f"{path} is not a pickle, or the download is incomplete ({type(error).__name__}: "
            f"{error}); download it again"
        ) from error
