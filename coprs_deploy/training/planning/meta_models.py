"""Policy and segmentation path of a recipe without memory for their weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.conversion.random_policy import POLICY_SIZES, build_config, build_tokenizer
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.errors import CheckpointError
from coprs_deploy.model_config import SAM_SIZES, SegmentationConfig
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy.policy_size import check_policy_size
from coprs_deploy.training.settings import CheckpointModel


class MetaModels(NamedTuple):
    """Models on the meta device, and where their sizes come from."""

    policy: nn.Module
    segmentation: SegmentationModel
    source: str


def build_on_meta(settings: CheckpointModel) -> MetaModels:
    """Build the models of a checkpoint, or of the named sizes while there is none.

    Raises:
        CheckpointError: the checkpoint does not exist and no sizes are named, or it cannot be used.
        ValueError: a size is unknown.
    """
    path = Path(settings.path or CHECKPOINT)
    if path.exists() or not (settings.policy and settings.sam):
        try:
            return _of_checkpoint(path)
        except CheckpointError as error:
            if path.exists():
                raise
            raise CheckpointError(
                f"model.path: {error}; or name both sizes: model.policy "
                f"({', '.join(POLICY_SIZES)}) and model.sam ({', '.join(SAM_SIZES)})"
            ) from error
    return build_named(settings)


def _of_checkpoint(path: Path) -> MetaModels:
    from transformers import AutoConfig, AutoModelForImageTextToText

    checkpoint = read_checkpoint(path)
    check_policy_size(checkpoint.policy_path)
    try:
        config = AutoConfig.from_pretrained(checkpoint.policy_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the configuration in {checkpoint.policy_path} cannot be read: {error}"
        ) from error
    with torch.device("meta"):
        policy = AutoModelForImageTextToText.from_config(config)
        segmentation = SegmentationModel(checkpoint.config.model)
    return MetaModels(policy, segmentation, f"sizes of {path}")


def build_named(settings: CheckpointModel) -> MetaModels:
    """Build the models of the named sizes.

    Raises:
        ValueError: a size is unknown.
    """
    from transformers import AutoModelForImageTextToText

    for name, found, known in (
        ("model.policy", settings.policy, POLICY_SIZES),
        ("model.sam", settings.sam, SAM_SIZES),
    ):
        if found not in known:
            raise ValueError(f"{name} is {found!r}; accepted: {', '.join(known)}")
    size = POLICY_SIZES[settings.policy]
    tokenizer = build_tokenizer(size.family)
    with torch.device("meta"):
        policy = AutoModelForImageTextToText.from_config(build_config(size, tokenizer))
        hidden_size = policy.get_output_embeddings().weight.shape[1]
        segmentation = SegmentationModel(
            SegmentationConfig(hidden_size, sam=SAM_SIZES[settings.sam])
        )
    source = (
        f"sizes of model.policy = {settings.policy} and model.sam = {settings.sam}; "
        f"model.path = {settings.path} does not exist"
    )
    return MetaModels(policy, segmentation, source)


def parameter_parts(models: MetaModels) -> set[str]:
    """Return the parts of the names of all parameters, as a learning-rate multiplier may name."""
    names = [name for part in models[:2] for name, _ in part.named_parameters()]
    return {"policy", "segmentation"}.union(*(name.split(".") for name in names))
