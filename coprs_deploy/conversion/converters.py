"""The three ways to a checkpoint; each is named after what it makes and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coprs_deploy.artifacts import check_replaceable
from coprs_deploy.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    CheckpointConfig,
    write_checkpoint,
)
from coprs_deploy.conversion.policy_files import (
    DEFAULT_PROMPTS,
    copy_policy_files,
    has_weights,
    load_policy,
    register_reference_token,
    save_policy,
)
from coprs_deploy.conversion.weight_files import (
    find_shards,
    merge_shards,
    read_sam,
    read_state_dict,
)
from coprs_deploy.errors import ConversionError
from coprs_deploy.model_config import SAM_SIZES, SegmentationConfig
from coprs_deploy.prompts import PromptTemplate

if TYPE_CHECKING:
    from torch import Tensor

PUBLIC_MODULES_FILE = "refseg_modules.pt"
PUBLIC_POLICY_DIRECTORY = "huggingface"
PUBLIC_PRIOR_PREFIX = "heatmap_head."

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ConversionOptions:
    """What all conversions have in common.

    Attributes:
        prompt: text of the prompt template that the policy was trained with (``{instruction}`` and
            the image placeholder in it); None takes this project's own wording.
        overwrite: whether a checkpoint that stands there may be replaced.
        seed: of everything that starts random.
    """

    prompt: str | None = None
    overwrite: bool = False
    seed: int = 0

    def template(self, model_type: str) -> PromptTemplate:
        """Choose the prompt template for a type of policy."""
        default = DEFAULT_PROMPTS[model_type]
        if self.prompt is None:
            return default
        return PromptTemplate(text=self.prompt, image_token=default.image_token)


def checkpoint_from_policy_and_sam(
    policy: str | Path,
    sam: str | Path,
    out: str | Path,
    options: ConversionOptions | None = None,
    progress: Progress = lambda step: None,
) -> Checkpoint:
    """Join an ordinary policy and SAM's weights: the starting point of training.

    ``<REF_POS>`` is registered, the embeddings are enlarged for it, and the prior starts fresh.

    Args:
        policy: a transformers directory of a Qwen2.5-VL or LLaVA-1.5 model.
        sam: a ``sam_vit_*.pth`` file.
        out: the checkpoint directory to write.
        options: prompt template, overwriting, seed.
        progress: called with the name of each step as it starts.

    Raises:
        ConversionError: a source cannot be used.
        ArtifactError: ``out`` is taken.
    """
    options = options or ConversionOptions()
    check_replaceable(Path(out), CONFIG_FILE, options.overwrite)
    source = Path(policy)
    progress("read SAM")
    sam_config, tensors = read_sam(Path(sam))
    progress("load policy")
    model, tokenizer = load_policy(source)
    register_reference_token(model, tokenizer)
    config = SegmentationConfig(policy_hidden_size=_width(model), sam=sam_config)
    tensors |= _fresh_prior(config, options.seed)
    progress("write checkpoint")
    return write_checkpoint(
        out,
        CheckpointConfig(
            model=config,
            prompt=options.template(model.config.model_type),
            provenance={
                "converter": "checkpoint_from_policy_and_sam",
                "policy": source.name,
                "sam": Path(sam).name,
                "note": "the prior is untrained: train it before you trust a mask",
            },
        ),
        tensors,
        lambda directory: save_policy(model, tokenizer, source, directory),
        options.overwrite,
    )


def checkpoint_from_public_training(
    directory: str | Path,
    sam: str | Path,
    out: str | Path,
    options: ConversionOptions | None = None,
    progress: Progress = lambda step: None,
) -> Checkpoint:
    """Convert what the public CoPRS training code writes.

    Args:
        directory: holds ``refseg_modules.pt`` and ``huggingface/``; when the latter has no weights,
            the FSDP shards ``model_world_size_N_rank_R.pt`` beside it are merged.
        sam: the ``sam_vit_*.pth`` file whose image encoder it was trained with.
        out: the checkpoint directory to write.
        options: prompt template (give the one that it was trained with), overwriting.
        progress: called with the name of each step as it starts.

    Raises:
        ConversionError: a source is missing or cannot be used.
        CheckpointError: the tensors do not fit together.
    """
    options = options or ConversionOptions()
    check_replaceable(Path(out), CONFIG_FILE, options.overwrite)
    root = Path(directory)
    source = root / PUBLIC_POLICY_DIRECTORY
    progress("read SAM and the trained modules")
    sam_config, tensors = read_sam(Path(sam))
    trained = {
        "prior." + name.removeprefix(PUBLIC_PRIOR_PREFIX)
        if name.startswith(PUBLIC_PRIOR_PREFIX)
        else name: tensor
        for name, tensor in read_state_dict(root / PUBLIC_MODULES_FILE).items()
    }
    for name in ("prior.q_proj.weight", "prior.fuser.0.weight"):
        if name not in trained:
            raise ConversionError(
                f"{root / PUBLIC_MODULES_FILE} holds no "
                f"{name.replace('prior.', PUBLIC_PRIOR_PREFIX)}; accepted: the file that the "
                "public CoPRS training code writes"
            )
    config = SegmentationConfig(
        policy_hidden_size=trained["prior.q_proj.weight"].shape[1],
        prior_num_heads=trained["prior.fuser.0.weight"].shape[0],
        sam=sam_config,
    )
    image_encoder = {n: t for n, t in tensors.items() if n.startswith("image_encoder.")}
    merged, policy_hidden_size, model_type, save = _public_policy(root, source, progress)
    if policy_hidden_size != config.policy_hidden_size:
        raise ConversionError(
            f"the policy in {source} is {policy_hidden_size} wide and the query head in "
            f"{root / PUBLIC_MODULES_FILE} takes {config.policy_hidden_size}: they do not belong together"
        )
    progress("write checkpoint")
    return write_checkpoint(
        out,
        CheckpointConfig(
            model=config,
            prompt=options.template(model_type),
            provenance={
                "converter": "checkpoint_from_public_training",
                "policy": "merged from FSDP shards" if merged else "as it was saved",
                "sam": Path(sam).name,
            },
        ),
        image_encoder | trained,
        save,
        options.overwrite,
    )


def random_checkpoint(
    out: str | Path,
    policy_size: str = "tiny",
    sam_size: str = "tiny",
    options: ConversionOptions | None = None,
    progress: Progress = lambda step: None,
) -> Checkpoint:
    """Make a checkpoint of a real size without weights: for speed, memory and shape only.

    The tiny policies follow a script, so that they emit ``<REF_POS>`` like a trained one; masks
    are noise at any size.

    Args:
        out: the checkpoint directory to write.
        policy_size: a name in ``POLICY_SIZES``.
        sam_size: a name in ``SAM_SIZES``.
        options: overwriting, seed.
        progress: called with the name of each step as it starts.

    Raises:
        ValueError: a size has no such name.
    """
    from coprs_deploy.conversion.random_policy import POLICY_SIZES, generate_policy

    options = options or ConversionOptions()
    if sam_size not in SAM_SIZES:
        raise ValueError(f"sam is {sam_size!r}; accepted with --random: {', '.join(SAM_SIZES)}")
    if policy_size not in POLICY_SIZES:
        raise ValueError(f"policy-size is {policy_size!r}; accepted: {', '.join(POLICY_SIZES)}")
    check_replaceable(Path(out), CONFIG_FILE, options.overwrite)
    progress(f"generate the {policy_size} policy")
    policy = generate_policy(policy_size, options.seed)
    progress(f"generate the {sam_size} segmentation path")
    config = SegmentationConfig(policy_hidden_size=_width(policy.model), sam=SAM_SIZES[sam_size])
    tensors = random_tensors(config, options.seed)
    progress("write checkpoint")
    return write_checkpoint(
        out,
        CheckpointConfig(
            model=config,
            prompt=policy.prompt,
            policy_image=policy.image_limits,
            provenance={
                "converter": "random_checkpoint",
                "policy": policy_size,
                "sam": sam_size,
                "seed": options.seed,
                "note": "random weights: the masks mean nothing",
            },
        ),
        tensors,
        policy.save,
        options.overwrite,
    )


def random_tensors(config: SegmentationConfig, seed: int) -> dict[str, Tensor]:
    """Draw weights for a segmentation path, none of them zero, so that every part shows."""
    import torch

    from coprs_deploy.models import SegmentationModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SegmentationModel(config).requires_grad_(False)
        for name, tensor in model.image_encoder.named_parameters():
            if "pos" in name:
                tensor.normal_(std=0.02)
    return model.state_dict()


def _fresh_prior(config: SegmentationConfig, seed: int) -> dict[str, Tensor]:
    import torch

    from coprs_deploy.models.prior import PositionalPrior

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = PositionalPrior(config).requires_grad_(False)
    return {f"prior.{name}": tensor for name, tensor in prior.state_dict().items()}


def _public_policy(
    root: Path, source: Path, progress: Progress
) -> tuple[bool, int, str, Callable[[Path], object]]:
    """Find the policy: whether it was merged, its width, its type, and how to save it."""
    if not source.is_dir():
        raise ConversionError(
            f"{root} holds no {PUBLIC_POLICY_DIRECTORY}/; accepted: a checkpoint of the public "
            "CoPRS training code"
        )
    shards = [] if has_weights(source) else find_shards(root)
    if not shards and not has_weights(source):
        raise ConversionError(
            f"neither {source} holds weights (*.safetensors) nor {root} FSDP shards "
            "(model_world_size_N_rank_R.pt)"
        )
    if shards:
        progress(f"merge {len(shards)} FSDP shards")
    else:
        progress("load policy")
    model, tokenizer = load_policy(source, merge_shards(shards) if shards else None)
    changed = register_reference_token(model, tokenizer)
    if changed:
        raise ConversionError(
            f"the tokenizer in {source} has no <REF_POS>, so this policy was never trained to "
            "write it; accepted: a checkpoint of CoPRS training"
        )
    width, model_type = _width(model), model.config.model_type
    if shards:
        return True, width, model_type, lambda d: save_policy(model, tokenizer, source, d)
    return False, width, model_type, lambda d: copy_policy_files(source, d, with_weights=True)


def _width(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[1])
