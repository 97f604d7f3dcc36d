"""Checkpoint directory: what training and conversion write, and what export reads.

    config.json                  sizes, prompt template, policy image limits, provenance
    segmentation.safetensors     image encoder, prior, prompt encoder, mask decoder
    policy/                      a transformers directory: config, weights, tokenizer, processor

It is written atomically, contains safetensors only, and is read strictly. Converting public weight
files is left to :mod:`coprs_deploy.conversion`.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coprs_deploy.artifacts import fingerprint, new_directory, record_files, write_json
from coprs_deploy.bundle import PolicyQuantization
from coprs_deploy.errors import CheckpointError
from coprs_deploy.images import MAX_IMAGE_PIXELS
from coprs_deploy.model_config import SegmentationConfig
from coprs_deploy.prompts import PromptTemplate
from coprs_deploy.specs import Record

if TYPE_CHECKING:
    from torch import Tensor

    from coprs_deploy.models import SegmentationModel

CONFIG_FILE = "config.json"
SEGMENTATION_FILE = "segmentation.safetensors"
POLICY_DIRECTORY = "policy"

LOCK_ATTEMPTS, LOCK_PAUSE_S = 10, 0.02
"""A link that points to a checkpoint that is being removed is resolved again."""

NAMES_SHOWN = 5
"""Number of tensor names listed in an error; the others are counted."""


class PolicyImageLimits(Record, frozen=True):
    """Smallest and largest image area in pixels for the policy (defaults: paper, 3.3)."""

    min_pixels: int = 3_136
    max_pixels: int = 705_600

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels <= MAX_IMAGE_PIXELS:
            raise ValueError(
                f"min_pixels is {self.min_pixels}, max_pixels {self.max_pixels}; "
                f"accepted: 1 <= min_pixels <= max_pixels <= {MAX_IMAGE_PIXELS}"
            )


class CheckpointConfig(Record, frozen=True):
    """Configuration of a checkpoint: everything but the weights.

    Attributes:
        model: sizes of the segmentation path.
        prompt: prompt template that the policy was trained with.
        policy_image: limits of the image area that the policy processes.
        provenance: origin of the weights, for information only.
        policy_quantization: how the policy's weights were quantized; None if they were not.
    """

    model: SegmentationConfig
    prompt: PromptTemplate
    policy_image: PolicyImageLimits = PolicyImageLimits()
    provenance: dict[str, Any] = {}
    policy_quantization: PolicyQuantization | None = None


class ReaderLock:
    """Shared lock on the configuration of a checkpoint, as long as this object exists.

    A training run does not remove a checkpoint that has one (:func:`without_readers`). A copy in
    another process has none. Where the file system has no locks, nothing is locked.

    Raises:
        BlockingIOError: the checkpoint is being removed.
        OSError: the file cannot be opened.
    """

    def __init__(self, file: Path) -> None:
        descriptor = os.open(file, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            _lock(descriptor, fcntl.LOCK_SH)
            if not os.path.samestat(os.fstat(descriptor), file.stat()):
                raise BlockingIOError(f"{file} was replaced")
        except OSError:
            self._close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


@contextmanager
def without_readers(path: Path) -> Iterator[bool]:
    """Lock a checkpoint against programs that open it; yield False if one works with it."""
    try:
        descriptor = os.open(path / CONFIG_FILE, os.O_RDONLY)
    except OSError:
        yield True  # not complete: nothing can open it
        return
    try:
        try:
            _lock(descriptor, fcntl.LOCK_EX)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> None:
    """Lock an open file; without an effect where its file system has no locks.

    Raises:
        BlockingIOError: another lock does not allow it.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


@dataclass(frozen=True)
class Checkpoint:
    """Opened checkpoint directory whose configuration has been read.

    ``lock`` keeps it from being removed by the run that wrote it.
    """

    path: Path
    config: CheckpointConfig
    lock: ReaderLock | None = field(default=None, repr=False, compare=False)

    @property
    def policy_path(self) -> Path:
        """Path of the policy's transformers directory."""
        return self.path / POLICY_DIRECTORY

    def fingerprint(self) -> str:
        """Hash configuration, segmentation weights and policy; other files do not count."""
        parts = {CONFIG_FILE, SEGMENTATION_FILE, POLICY_DIRECTORY}
        return fingerprint(record_files(self.path, parts))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint directory and read its configuration without loading weights.

    A link is resolved, so that one that a training run points to a newer checkpoint meanwhile
    does not mix two; the run keeps the checkpoint as long as the returned object exists.

    Raises:
        CheckpointError: a part is missing, or the configuration is not valid.
    """
    root, lock = _lock_for_reading(Path(path))
    if not root.is_dir():
        raise CheckpointError(
            f"there is no checkpoint directory {root}; `coprs-deploy convert --help` shows how to "
            "make one"
        )
    for part in (CONFIG_FILE, SEGMENTATION_FILE, POLICY_DIRECTORY):
        if not (root / part).exists():
            raise CheckpointError(
                f"{root} has no {part}; a checkpoint contains {CONFIG_FILE}, {SEGMENTATION_FILE} "
                f"and {POLICY_DIRECTORY}/"
            )
    try:
        data = json.loads((root / CONFIG_FILE).read_text(encoding="utf-8"))
        config = CheckpointConfig.from_json(data)
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{root / CONFIG_FILE} is not valid: {error}") from error
    return Checkpoint(root, config, lock)


def _lock_for_reading(path: Path) -> tuple[Path, ReaderLock | None]:
    """Resolve a link and lock what it points to, which a run may be removing."""
    for _ in range(LOCK_ATTEMPTS):
        root = path.resolve() if path.is_symlink() and path.is_dir() else path
        try:
            return root, ReaderLock(root / CONFIG_FILE)
        except OSError as error:
            if not path.is_symlink() and not isinstance(error, BlockingIOError):
                return root, None  # the caller names what is missing
        time.sleep(LOCK_PAUSE_S)
    return root, None


def write_checkpoint(
    path: str | Path,
    config: CheckpointConfig,
    tensors: Mapping[str, Tensor],
    save_policy: Callable[[Path], object],
    overwrite: bool = False,
) -> Checkpoint:
    """Write a checkpoint directory atomically.

    Args:
        path: directory to write.
        config: configuration.
        tensors: segmentation weights under the names of ``SegmentationModel``.
        save_policy: called with an existing empty directory, which it fills with the policy.
        overwrite: whether an existing checkpoint is replaced.

    Raises:
        CheckpointError: the tensors do not match ``config.model``.
        ArtifactError: the path exists.
    """
    from safetensors.torch import save_file

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_tensors(shapes, expected_shapes(config.model), "the segmentation weights")
    with new_directory(Path(path), CONFIG_FILE, overwrite) as partial:
        stored = without_shared_memory(tensors)
        save_file(stored, partial / SEGMENTATION_FILE, metadata={"format": "pt"})
        del stored
        (partial / POLICY_DIRECTORY).mkdir()
        save_policy(partial / POLICY_DIRECTORY)
        write_json(partial / CONFIG_FILE, config.to_json())
    return Checkpoint(Path(path), config)


def load_segmentation_model(checkpoint: Checkpoint) -> SegmentationModel:
    """Build the segmentation model with the checkpoint's weights in float32.

    Weights stored in float32 are mapped from the file, not copied.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing, unexpected, or has another
            shape or type (it is named).
    """
    import torch
    from safetensors import SafetensorError, safe_open

    file = checkpoint.path / SEGMENTATION_FILE
    wanted = expected_shapes(checkpoint.config.model)
    try:
        with safe_open(file, framework="pt") as stored:
            names = stored.keys()
            shapes = {name: stored.get_slice(name).get_shape() for name in names}
            check_tensors(shapes, wanted, str(file))
            tensors = {name: stored.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    _check_types(tensors, str(file))
    model = _empty_model(checkpoint.config.model)
    model.load_state_dict({n: t.to(torch.float32) for n, t in tensors.items()}, assign=True)
    return model.requires_grad_(False).eval()


def expected_shapes(config: SegmentationConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a segmentation model, without allocating memory."""
    return {name: tuple(t.shape) for name, t in _empty_model(config).state_dict().items()}


def check_tensors(
    found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], where: str
) -> None:
    """Compare tensor names and shapes with the expected ones.

    Raises:
        CheckpointError: tensors are missing, unexpected or have another shape; all are listed.
    """
    lists = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "misshaped": [
            f"{name} is {tuple(found[name])}, not {tuple(shape)}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    problems = []
    for label, names in lists.items():
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        if names:
            problems.append(f"{label}: {', '.join(names[:NAMES_SHOWN])}{more}")
    if problems:
        raise CheckpointError(f"{where} do not match the configuration: " + "; ".join(problems))


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that tensors are dense, floating-point and finite.

    Raises:
        CheckpointError: names the first tensor that is not.
    """
    _check_types(tensors, where)
    for name, tensor in tensors.items():
        if not (finite := tensor.isfinite()).all():
            raise CheckpointError(
                f"{where} has values that are not finite (NaN or inf): {int((~finite).sum()):,} of "
                f"the {tensor.numel():,} of {name}. The file is damaged, or its training diverged; "
                "use an intact copy or an earlier state"
            )


def _check_types(tensors: Mapping[str, Tensor], where: str) -> None:
    import torch

    for name, tensor in tensors.items():
        kind: object = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        if tensor.is_meta:
            kind = "an empty tensor"
        if kind not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise CheckpointError(
                f"{where} has {name} as {kind}; accepted: dense floating-point weights of 16 bits "
                "or more"
            )


def without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with another one, which safetensors does not store."""
    separate, storages = {}, set()
    for name, tensor in tensors.items():
        separate[name] = tensor.detach().contiguous()
        if separate[name].untyped_storage().data_ptr() in storages:
            separate[name] = separate[name].clone()
        storages.add(separate[name].untyped_storage().data_ptr())
    return separate


def _empty_model(config: SegmentationConfig) -> SegmentationModel:
    """Build a model without memory for its weights."""
    import torch

    from coprs_deploy.models import SegmentationModel

    with torch.device("meta"):
        return SegmentationModel(config)
