"""Size of image encoders, and memory and time of a distillation, before it starts.

Multiply-adds and the tensors that a backward pass needs are counted on the meta device, so exactly;
times are computed from assumed speeds, as in :mod:`coprs_deploy.training.planning.estimate`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from coprs_deploy.checkpoint import Checkpoint, expected_shapes
from coprs_deploy.data.readers.registry import open_images
from coprs_deploy.errors import CoPRSError
from coprs_deploy.model_config import SamConfig, SegmentationConfig
from coprs_deploy.models.image_encoder import build_image_encoder
from coprs_deploy.specs import Record
from coprs_deploy.training.distillation.recipe import DistillationRecipe, DistillationSettings
from coprs_deploy.training.distillation.student import ENCODER_PREFIX, student_config
from coprs_deploy.training.planning.estimate import (
    AUTOCAST_RATIO,
    BFLOAT16_BYTES,
    DECODER_TENSORS,
    FINISHED_WEIGHTS,
    FLOAT32_BYTES,
    GIGABYTE,
    USABLE_MEMORY,
    Estimate,
    GpuSpec,
)
from coprs_deploy.training.planning.estimate_page import RunEstimate, largest_directory

STUDENT, OF_TEACHER = "student", "teacher"


class EncoderCost(Record, frozen=True):
    """Size of an image encoder.

    Attributes:
        encoder: its title.
        image_size: side of its input in pixels.
        parameters: number of parameters.
        multiply_adds: multiply-adds of one image.
        saved_bytes: bytes of the float32 tensors that a backward pass of one image needs.
    """

    encoder: str
    image_size: int
    parameters: int
    multiply_adds: int
    saved_bytes: int

    def text(self) -> str:
        """Return the sizes for people."""
        adds = self.multiply_adds / 1e9
        return (
            f"{self.encoder}, {self.image_size} px, {self.parameters / 1e6:.3g} M parameters, "
            f"{adds:.3g} G multiply-adds"
        )


def encoder_cost(config: SamConfig) -> EncoderCost:
    """Count an image encoder on the meta device."""
    with torch.device("meta"):
        encoder = build_image_encoder(config)
        size = config.geometry.image_size
        image = torch.zeros(1, 3, size, size)
    own = {weight.untyped_storage()._cdata for weight in encoder.parameters()}
    saved: dict[int, Any] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        encoder(image)
    return EncoderCost(
        config.encoder_name,
        size,
        sum(weight.numel() for weight in encoder.parameters()),
        counter.get_total_flops() // 2,
        sum(storage.nbytes() for storage in saved.values()),
    )


def encoder_costs(recipe: DistillationRecipe, checkpoint: Checkpoint) -> dict[str, EncoderCost]:
    """Count the image encoders of teacher and student.

    Raises:
        ValueError: the student's embedding cannot have the size of the teacher's.
    """
    student = student_config(recipe.model, checkpoint).sam
    return {
        OF_TEACHER: encoder_cost(checkpoint.config.model.sam),
        STUDENT: encoder_cost(student),
    }


def estimate_distillation(
    recipe: DistillationRecipe, checkpoint: Checkpoint, gpus: int, gpu: GpuSpec | None = None
) -> RunEstimate:
    """Estimate a distillation whose encoders are replicated on every GPU.

    Raises:
        ValueError: the student's embedding cannot have the size of the teacher's.
    """
    gpu, config = gpu or GpuSpec(), student_config(recipe.model, checkpoint)
    costs = encoder_costs(recipe, checkpoint)
    rest = sum(
        math.prod(shape)
        for name, shape in expected_shapes(config).items()
        if not name.startswith(ENCODER_PREFIX)
    )
    policy = sum(f.stat().st_size for f in checkpoint.policy_path.rglob("*") if f.is_file())
    sizes = _Sizes(costs[STUDENT], costs[OF_TEACHER], rest, policy, config)
    stages = {
        name: _estimate_stage(recipe, stage, sizes, gpus, gpu)
        for name, stage in recipe.stages.items()
    }
    geometry = config.geometry
    embedding = BFLOAT16_BYTES * geometry.out_chans * geometry.grid_size**2
    counts, notes = _count_images(recipe)
    return RunEstimate(
        f"teacher: {costs[OF_TEACHER].text()}; student: {costs[STUDENT].text()}",
        stages,
        sum(each.hours for each in stages.values()),
        largest_directory(stages),
        float(embedding * counts) if counts else None,
        notes,
    )


class _Sizes(NamedTuple):
    """What the estimate of a stage needs.

    ``rest`` counts the parameters of prior and decoder, ``policy_bytes`` the policy's files.
    """

    student: EncoderCost
    teacher: EncoderCost
    rest: int
    policy_bytes: int
    config: SegmentationConfig


def _estimate_stage(
    recipe: DistillationRecipe,
    stage: DistillationSettings,
    sizes: _Sizes,
    gpus: int,
    gpu: GpuSpec,
) -> Estimate:
    images = -(-stage.global_batch_size // gpus)
    ratio = 1.0 if recipe.precision == "fp32" else AUTOCAST_RATIO
    trained, geometry = sizes.student.parameters, sizes.config.geometry
    embedding = geometry.out_chans * geometry.grid_size**2
    decoder = DECODER_TENSORS * embedding * FLOAT32_BYTES if stage.decoding_loss_weight else 0
    loads_teacher = 0 if recipe.features else sizes.teacher.parameters
    memory = {
        "student": float(FLOAT32_BYTES * (trained + sizes.rest)),
        "teacher": float(FLOAT32_BYTES * loads_teacher),
        "gradients": float(FLOAT32_BYTES * trained),
        "optimizer": float(2 * FLOAT32_BYTES * trained),
        "activations": ratio * images * (sizes.student.saved_bytes + decoder),
    }
    memory["peak"] = sum(memory.values())
    flops = gpu.teraflops * 1e12 * gpu.flops_utilization
    seconds = {"update": 3 * 2 * sizes.student.multiply_adds * images / flops}
    if not recipe.features:
        seconds["teacher's embeddings"] = 2 * sizes.teacher.multiply_adds * images / flops
    seconds["step"] = sum(seconds.values())
    count = 1 + (stage.max_steps - 1) // stage.eval_steps if stage.eval_steps else 1
    batches = -(-stage.num_eval_examples // stage.global_batch_size)
    evaluation = count * batches * (seconds["step"] - 2 / 3 * seconds["update"]) / 3600
    disk = _disk_bytes(recipe, stage, sizes)
    hours = stage.max_steps * seconds["step"] / 3600 + evaluation
    fits = memory["peak"] < USABLE_MEMORY * gpu.memory_gb * GIGABYTE
    notes = ("reading images, and priors and masks behind the decoder, are not in the times",)
    return Estimate(gpus, gpu, memory, seconds, hours, evaluation, disk, fits, notes)


def _disk_bytes(
    recipe: DistillationRecipe, stage: DistillationSettings, sizes: _Sizes
) -> dict[str, float]:
    weights = sizes.student.parameters + sizes.rest
    state = FLOAT32_BYTES * (weights + 2 * sizes.student.parameters)
    stored = FLOAT32_BYTES if recipe.save_dtype == "float32" else BFLOAT16_BYTES
    checkpoint = stored * weights + sizes.policy_bytes
    kept = min(recipe.save_total_limit, stage.max_steps // recipe.save_steps)
    disk = {
        "states to resume from": float(max(1, kept) * state),
        "checkpoints while it runs": float((kept + (stage.eval_steps > 0)) * checkpoint),
        FINISHED_WEIGHTS: float(FLOAT32_BYTES * weights),
        "checkpoint": float(checkpoint),
    }
    disk["peak"] = sum(disk.values()) + (max(state, checkpoint) if kept else 0)
    return disk


def _count_images(recipe: DistillationRecipe) -> tuple[int, tuple[str, ...]]:
    """Count the images of all sources; 0 with a note where one cannot be read."""
    total, notes = 0, list[str]()
    for key, source in recipe.sources().items():
        try:
            total += len(open_images(source))
        except (CoPRSError, ValueError, OSError) as error:
            notes.append(f"{key}: {error}")
    return (0 if notes else total), tuple(notes)
