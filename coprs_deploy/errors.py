"""Every error that a caller may want to catch, drawn as a tree.

    CoPRSError
    ├── ImageError                  the picture cannot be used
    │   ├── ImageDecodeError        not an image, empty, truncated
    │   └── ImageSizeError          too many pixels, none, or a shape that the bundle refuses
    ├── InstructionError            the instruction is empty or too long
    ├── ArtifactError               files on disk cannot be used
    │   ├── CheckpointError         a checkpoint directory is incomplete or does not fit
    │   ├── ConversionError         a public weight file cannot be converted
    │   └── BundleError             a bundle is absent, of another version, or incomplete
    │       ├── BundleIntegrityError    a file was changed, cut short, removed or added
    │       └── EngineMismatchError     an engine was built for another library or GPU
    ├── EngineBuildError            an engine could not be built
    ├── EquivalenceError            an exported graph does not compute what PyTorch computes
    ├── PolicyError                 the policy could not write an answer
    │   └── HiddenStateError      it wrote <REF_POS>, and its hidden state was not captured
    ├── QueueFullError              more answers are asked for than may wait
    ├── RequestTimeoutError          an answer was not ready in time
    └── EnvironmentNotReadyError    this machine lacks something
        ├── MissingDependencyError  a Python package; the message holds the pip line
        └── RuntimeUnavailableError a runtime or device that was asked for is not here

A mistake in a call (a wrong type, an unknown option) is a plain ``ValueError`` instead.
``ImageError`` and ``InstructionError`` are ``ValueError`` too, because their cause is an argument;
``RequestTimeoutError`` is Python's ``TimeoutError`` too.
"""

from __future__ import annotations

from typing import ClassVar


class CoPRSError(Exception):
    """The root: catching it catches every error that this package raises on purpose.

    ``exit_code`` is what the command line returns: 1 when a check failed, 2 when the use was wrong.
    """

    exit_code: ClassVar[int] = 2


class ImageError(CoPRSError, ValueError):
    """The picture cannot be used."""


class ImageDecodeError(ImageError):
    """The bytes are not a readable image: another kind of file, empty, or cut short."""


class ImageSizeError(ImageError):
    """No pixels, more than the decoding limit, or a shape that the bundle was not made for."""


class InstructionError(CoPRSError, ValueError):
    """The instruction is empty or longer than the prompt may be."""


class ArtifactError(CoPRSError):
    """Files on disk cannot be used as they are."""


class CheckpointError(ArtifactError):
    """A checkpoint directory is incomplete, or its tensors do not fit its configuration."""


class ConversionError(ArtifactError):
    """A weight file of another project cannot be read or does not fit."""


class BundleError(ArtifactError):
    """A bundle is absent, was written by an incompatible version, or is incomplete."""


class BundleIntegrityError(BundleError):
    """A file of a bundle is not the one that was written: changed, cut short, removed or added."""

    exit_code = 1


class EngineMismatchError(BundleError):
    """An engine was built by another library or version, or for another GPU, than those here."""


class EngineBuildError(CoPRSError):
    """An engine could not be built; the message names the node where there is one."""


class EquivalenceError(CoPRSError):
    """An exported graph differs from PyTorch by more than its tolerance."""

    exit_code = 1


class PolicyError(CoPRSError):
    """The policy could not write an answer."""


class HiddenStateError(PolicyError):
    """A ``<REF_POS>`` was written and its hidden state is missing; the reasoning is kept.

    Attributes:
        reasoning: what the policy thought.
    """

    def __init__(self, message: str, reasoning: str = "") -> None:
        super().__init__(message)
        self.reasoning = reasoning


class QueueFullError(CoPRSError):
    """More answers are asked for at once than may wait; asking again later is the remedy."""


class RequestTimeoutError(CoPRSError, TimeoutError):
    """An answer was not ready in the time that was given; its request was abandoned."""


class EnvironmentNotReadyError(CoPRSError):
    """This machine lacks something that was asked for."""


class MissingDependencyError(EnvironmentNotReadyError, ImportError):
    """A Python package is not installed; the message ends with the pip line that brings it."""


class RuntimeUnavailableError(EnvironmentNotReadyError):
    """A runtime, provider or device was asked for and is not present."""


def error_body(error: BaseException, message: str | None = None) -> dict[str, str]:
    """Return an error as JSON, the same over HTTP and on the command line.

    Args:
        error: what was raised.
        message: its text; None takes ``str(error)``.
    """
    return {"error": str(error) if message is None else message, "type": type(error).__name__}
