"""Every error that this package raises on purpose, drawn as a tree.

    CoPRSError
    ├── ImageError                  the image cannot be used
    │   ├── ImageDecodeError        not an image, empty, or truncated
    │   └── ImageSizeError          too many pixels, none, or outside the bundle's valid region
    ├── InstructionError            the instruction is empty or too long
    ├── ArtifactError               files on disk cannot be used
    │   ├── NoValidRowError         every row of an example file is invalid
    │   ├── CheckpointError         a checkpoint is incomplete or inconsistent
    │   ├── ConversionError         a public weight file cannot be converted
    │   ├── HubError                a model hub refuses, lacks something, or cannot be reached
    │   └── BundleError             a bundle is missing, incompatible, or incomplete
    │       ├── BundleIntegrityError    a file was changed, truncated, removed or added
    │       └── EngineMismatchError     an engine was built for another library or GPU
    ├── EngineBuildError            an engine could not be built
    ├── EquivalenceError            an exported graph differs from PyTorch
    ├── PolicyError                 the policy failed
    │   └── HiddenStateError        the hidden state of a <REF_POS> was not captured
    ├── QueueFullError              too many concurrent requests
    ├── RequestTimeoutError         a request exceeded its time limit
    ├── EndpointError               a model behind HTTP cannot be used: wrong URL, name or key
    └── EnvironmentNotReadyError    this machine lacks something
        ├── MissingDependencyError  a Python package; the message holds the pip line
        └── RuntimeUnavailableError a runtime or device is not available

A mistake in a call (a wrong type, an unknown option) is a plain ``ValueError``. ``ImageError`` and
``InstructionError`` are ``ValueError`` too, because their cause is an argument;
``RequestTimeoutError`` is also Python's ``TimeoutError``.
"""

from __future__ import annotations

import importlib.util
import math
import reprlib
from numbers import Integral, Real
from typing import Any, ClassVar


class CoPRSError(Exception):
    """Base class of all errors of this package.

    ``exit_code`` is the exit code of the command line: 1 if a check failed, 2 for wrong use.
    """

    exit_code: ClassVar[int] = 2


class ImageError(CoPRSError, ValueError):
    """The image cannot be used."""


class ImageDecodeError(ImageError):
    """The bytes are not a readable image: another file type, empty, or truncated."""


class ImageSizeError(ImageError):
    """No pixels, more than the decoding limit, or a shape outside the bundle's valid region."""


class InstructionError(CoPRSError, ValueError):
    """The instruction is empty or exceeds the prompt limit."""


class ArtifactError(CoPRSError):
    """Files on disk cannot be used."""


class NoValidRowError(ArtifactError):
    """Every row of an example file is invalid."""

    exit_code = 1


class CheckpointError(ArtifactError):
    """A checkpoint directory is incomplete, or its tensors do not match its configuration."""


class ConversionError(ArtifactError):
    """A public weight file cannot be read or does not match the model."""


class HubError(ArtifactError):
    """A model hub has no such repository or file, refuses access, or cannot be reached."""


class BundleError(ArtifactError):
    """A bundle is missing, was written by an incompatible version, or is incomplete."""


class BundleIntegrityError(BundleError):
    """A file of a bundle was changed, truncated, removed or added after the export."""

    exit_code = 1


class EngineMismatchError(BundleError):
    """An engine was built with another library or version, or for another GPU."""


class EngineBuildError(CoPRSError):
    """An engine could not be built; the message names the failing node if it is known."""


class EquivalenceError(CoPRSError):
    """An exported graph differs from PyTorch by more than its tolerance."""

    exit_code = 1


class PolicyError(CoPRSError):
    """The policy failed."""


class HiddenStateError(PolicyError):
    """The hidden state of a ``<REF_POS>`` was not captured.

    Attributes:
        reasoning: reasoning of the response.
    """

    def __init__(self, message: str, reasoning: str = "") -> None:
        super().__init__(message)
        self.reasoning = reasoning


class QueueFullError(CoPRSError):
    """Too many concurrent requests; retry later."""


class RequestTimeoutError(CoPRSError, TimeoutError):
    """A request exceeded its time limit and was abandoned."""


class EndpointError(CoPRSError):
    """A model behind HTTP cannot be used; other requests would fail in the same way."""


class EnvironmentNotReadyError(CoPRSError):
    """This machine lacks something that was requested."""


class MissingDependencyError(EnvironmentNotReadyError, ImportError):
    """A Python package is not installed or broken; the message ends with the pip line."""


class RuntimeUnavailableError(EnvironmentNotReadyError):
    """A requested runtime, provider or device is not available."""


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    is_whole: bool = True,
) -> None:
    """Check the type and the range of a numeric argument.

    Args:
        name: name of the argument.
        value: the argument; numbers of numpy are accepted, bool is not.
        least: smallest accepted value.
        above: largest value that is too small.
        most: largest accepted value.
        is_whole: whether it must be a whole number.

    Raises:
        ValueError: the value has another type, is not finite, or is out of range.
    """
    is_number = isinstance(value, Integral if is_whole else Real) and not isinstance(value, bool)
    if not is_number or not (isinstance(value, Integral) or math.isfinite(value)):
        expected = "a whole number" if is_whole else "a finite number"
        raise ValueError(f"{name} is {reprlib.repr(value)}; accepted: {expected}")
    if value < least or value > most or value <= above:
        bounds = {"at least": least, "above": above, "at most": most}
        limits = " and ".join(f"{word} {b}" for word, b in bounds.items() if math.isfinite(b))
        raise ValueError(f"{name} is {reprlib.repr(value)}; it must be {limits}")


def check_type(name: str, value: object, *accepted: Any) -> None:
    """Check the type of an argument.

    Raises:
        ValueError: the value has none of the accepted types.
    """
    if not isinstance(value, accepted):
        names = ", ".join("None" if kind is type(None) else kind.__name__ for kind in accepted)
        raise ValueError(f"{name} is {reprlib.repr(value)}; accepted: {names}")


MAX_MESSAGE_LENGTH = 2000
"""Characters of an error in JSON; messages may quote what the caller passed."""


def shorten(text: str, limit: int = 200) -> str:
    """Return a text for a message: of more than ``limit`` characters, the middle is left out."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}...({len(text) - limit} characters)...{text[-(limit // 2) :]}"


def install_hint(extra: str) -> str:
    """Return the pip command of an extra; it needs a checkout, as the package is not on PyPI."""
    return f'pip install -e ".[{extra}]" (in the checkout)'


def import_failure(
    error: ImportError | OSError,
    package: str,
    remedy: str,
    *,
    title: str = "",
    needed_by: str = "",
) -> MissingDependencyError:
    """Describe a failed import: what is not installed, or the error of what is.

    Args:
        error: what the import raised.
        package: module that was imported; empty for the one that the error names.
        remedy: pip command.
        title: name of the package in the message; default: ``package``.
        needed_by: what needs the package.
    """
    named = (getattr(error, "name", None) or "").partition(".")[0]
    title = title or package or named
    start = f"{needed_by} needs {title}, which" if needed_by else title
    is_missing = isinstance(error, ModuleNotFoundError) and named == (package or named)
    if is_missing and not _is_found(named):
        return MissingDependencyError(f"{start} is not installed; {remedy}")
    reason = shorten(" ".join(str(error).split()), 500)
    return MissingDependencyError(
        f"{start} is installed and cannot be imported ({reason}); repair it, or install it "
        f"again: {remedy}"
    )


def _is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it is being imported
        return True


def error_body(error: BaseException, message: str | None = None) -> dict[str, str]:
    """Return an error as JSON, the same over HTTP and on the command line.

    Args:
        error: the exception.
        message: text of the error; None selects ``str(error)``.
    """
    text = str(error) if message is None else message
    return {"error": shorten(text, MAX_MESSAGE_LENGTH), "type": type(error).__name__}
