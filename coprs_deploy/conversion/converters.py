"""Conversions to a checkpoint, named ``checkpoint_from_<source>``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from coprs_deploy.artifacts import check_replaceable
from coprs_deploy.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    CheckpointConfig,
    load_segmentation_model,
    read_checkpoint,
    write_checkpoint,
)
from coprs_deploy.conversion.encoder_files import (
    PREFIX,
    read_image_encoder,
    require_same_decoder,
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
    SHARD_FILE,
    find_shards,
    merge_shards,
    read_sam,
    read_state_dict,
)
from coprs_deploy.encoder_config import ENCODERS
from coprs_deploy.errors import ConversionError
from coprs_deploy.hub import hub_location, local_policy
from coprs_deploy.model_config import SAM_SIZES, SamConfig, SegmentationConfig
from coprs_deploy.prompts import PromptTemplate

if TYPE_CHECKING:
    from torch import Tensor

PUBLIC_MODULES_FILE = "refseg_modules.pt"
PUBLIC_POLICY_DIRECTORY = "huggingface"
PUBLIC_PRIOR = "heatmap_head"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ConversionOptions:
    """Options of all conversions.

    Attributes:
        prompt: prompt template that the policy was trained with, containing ``{instruction}`` and
            the image placeholder; None for this project's own.
        reference_tail: text that the policy was trained to write from ``</think>`` to
            ``<REF_POS>``, both included; None for ``</think> <REF_POS>``.
        seed: seed of all random weights.
        overwrite: replace an existing checkpoint.
        image_encoder: file of an image encoder that takes the place of SAM's, recognized by its
            tensors; with random weights, the name of one.
    """

    prompt: str | None = None
    reference_tail: str | None = None
    seed: int = 0
    overwrite: bool = False
    image_encoder: str | Path | None = None

    def template(self, model_type: str) -> PromptTemplate:
        """Return the prompt template for a type of policy."""
        default, tail = DEFAULT_PROMPTS[model_type], self.reference_tail
        return PromptTemplate(
            text=default.text if self.prompt is None else self.prompt,
            image_token=default.image_token,
            reference_tail=default.reference_tail if tail is None else tail,
        )


def checkpoint_from_policy_and_sam(
    policy: str | Path,
    sam: str | Path,
    out: str | Path,
    options: ConversionOptions | None = None,
    progress: Progress = lambda step: None,
) -> Checkpoint:
    """Combine a policy and SAM's weights with an untrained prior: initial weights for training.

    ``<REF_POS>`` is added to the tokenizer and the embedding tables.

    Args:
        policy: transformers directory of a Qwen2.5-VL or LLaVA-1.5 model, or one on the Hugging
            Face hub, ``hf://org/name@revision``.
        sam: ``sam_vit_*.pth`` file.
        out: checkpoint directory to write.
        options: prompt template, overwriting, seed.
        progress: called with the name of each step as it starts.

    Raises:
        ConversionError: a source cannot be used.
        HubError: the policy is on the hub and cannot be downloaded.
        ArtifactError: ``out`` exists.
    """
    options = options or ConversionOptions()
    check_replaceable(Path(out), CONFIG_FILE, options.overwrite)
    if location := hub_location(policy):
        progress("download policy")
    source = local_policy(policy)
    origin = f"{location} ({source.name})" if location else source.name  # the commit
    progress("read SAM")
    sam_config, tensors = _read_sam(Path(sam), options)
    progress("load policy")
    model, tokenizer = load_policy(source)
    register_reference_token(model, tokenizer)
    sizes = SegmentationConfig(policy_hidden_size=_hidden_size(model), sam=sam_config)
    config = CheckpointConfig(
        model=sizes,
        prompt=options.template(model.config.model_type),
        provenance={
            "converter": "checkpoint_from_policy_and_sam",
            "policy": origin,
            "sam": Path(sam).name,
            **_encoder_provenance(options),
            "note": "the prior is untrained: masks are meaningless until it is trained",
        },
    )
    tensors |= _untrained_prior(sizes, options.seed)
    progress("write checkpoint")
    return write_checkpoint(
        out,
        config,
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
    """Convert a checkpoint of the public CoPRS training code.

    Args:
        directory: has ``refseg_modules.pt`` and ``huggingface/``; if the latter has no weights,
            the FSDP shards beside it are merged.
        sam: the ``sam_vit_*.pth`` file whose image encoder it was trained with.
        out: checkpoint directory to write.
        options: prompt template (pass the one it was trained with), overwriting.
        progress: called with the name of each step as it starts.

    Raises:
        ConversionError: a source is missing or cannot be used.
        CheckpointError: the tensors do not fit together.
    """
    options = options or ConversionOptions()
    check_replaceable(Path(out), CONFIG_FILE, options.overwrite)
    root = Path(directory)
    progress("read SAM and the trained modules")
    sam_config, tensors = _read_sam(Path(sam), options)
    sizes, trained = _read_trained_modules(root / PUBLIC_MODULES_FILE, sam_config)
    image_encoder = {n: t for n, t in tensors.items() if n.startswith("image_encoder.")}
    policy = _read_public_policy(root, progress)
    if policy.hidden_size != sizes.policy_hidden_size:
        raise ConversionError(
            f"policy hidden size {policy.hidden_size} in {root / PUBLIC_POLICY_DIRECTORY} does not "
            f"match prior input size {sizes.policy_hidden_size} in "
            f"{root / PUBLIC_MODULES_FILE}; use files of one training run"
        )
    config = CheckpointConfig(
        model=sizes,
        prompt=options.template(policy.model_type),
        provenance={
            "converter": "checkpoint_from_public_training",
            "policy": policy.origin,
            "sam": Path(sam).name,
            **_encoder_provenance(options),
        },
    )
    progress("write checkpoint")
    return write_checkpoint(out, config, image_encoder | trained, policy.save, options.overwrite)


def checkpoint_from_checkpoint(
    checkpoint: str | Path,
    image_encoder: str | Path,
    out: str | Path,
    options: ConversionOptions | None = None,
    progress: Progress = lambda step: None,
    *,
    sam: str | Path | None = None,
) -> Checkpoint:
    """Replace the image encoder of a checkpoint; everything else is copied.

    Args:
        checkpoint: checkpoint directory.
        image_encoder: file of an image encoder, recognized by its tensors.
        out: checkpoint directory to write.
        options: overwriting.
        progress: called with the name of each step as it starts.
        sam: the ``sam_vit_*.pth`` file that the checkpoint was trained from. A decoder in the
            encoder's file is compared with this one, as that of the checkpoint may be trained.

    Raises:
        ConversionError: the encoder cannot take the place of the checkpoint's.
        CheckpointError: the checkpoint cannot be used.
        ArtifactError: ``out`` exists.
    """
    options = options or ConversionOptions()
    check_replaceable(Path(out), CONFIG_FILE, options.overwrite)
    source = read_checkpoint(checkpoint)
    progress("read image encoder")
    config = source.config
    file = read_image_encoder(Path(image_encoder), config.model.sam)
    kept = {
        name: tensor
        for name, tensor in load_segmentation_model(source).state_dict().items()
        if not name.startswith(PREFIX)
    }
    if sam is not None:
        require_same_decoder(file, read_sam(Path(sam))[1], str(sam))
    else:
        owner = f"{checkpoint} (if that one is trained, name the SAM it came from with --sam)"
        require_same_decoder(file, kept, owner)
    progress("write checkpoint")
    provenance = config.provenance | {"image_encoder": Path(image_encoder).name}
    model = msgspec.structs.replace(config.model, sam=file.sam)
    return write_checkpoint(
        out,
        msgspec.structs.replace(config, model=model, provenance=provenance),
        kept | file.tensors,
        lambda directory: shutil.copytree(source.policy_path, directory, dirs_exist_ok=True),
        options.overwrite,
    )


def random_checkpoint(
    out: str | Path,
    policy_size: str = "tiny",
    sam_size: str = "tiny",
    options: ConversionOptions | None = None,
    progress: Progress = lambda step: None,
) -> Checkpoint:
    """Make a checkpoint with random weights at a real size, for speed, memory and shapes.

    The tiny policies follow a script, so that they generate ``<REF_POS>`` like a trained one; the
    masks are noise at any size.

    Args:
        out: checkpoint directory to write.
        policy_size: a name in ``POLICY_SIZES``.
        sam_size: a name in ``SAM_SIZES``.
        options: overwriting, seed.
        progress: called with the name of each step as it starts.

    Raises:
        ValueError: the name of a size is unknown.
    """
    from coprs_deploy.conversion.random_policy import POLICY_SIZES, build_random_policy

    options = options or ConversionOptions()
    if sam_size not in SAM_SIZES:
        raise ValueError(f"sam is {sam_size!r}; accepted with --random: {', '.join(SAM_SIZES)}")
    if policy_size not in POLICY_SIZES:
        raise ValueError(f"policy-size is {policy_size!r}; accepted: {', '.join(POLICY_SIZES)}")
    check_replaceable(Path(out), CONFIG_FILE, options.overwrite)
    sam = SAM_SIZES[sam_size]
    if options.image_encoder is not None:
        if options.image_encoder not in ENCODERS:
            raise ValueError(
                f"image-encoder is {str(options.image_encoder)!r}; accepted with --random: "
                f"{', '.join(ENCODERS)}"
            )
        sam = sam.with_image_encoder(ENCODERS[str(options.image_encoder)])
    progress(f"generate the {policy_size} policy")
    policy = build_random_policy(policy_size, options.seed)
    progress(f"generate the {sam_size} segmentation model")
    config = CheckpointConfig(
        model=SegmentationConfig(policy_hidden_size=_hidden_size(policy.model), sam=sam),
        prompt=policy.prompt,
        policy_image=policy.image_limits,
        provenance={
            "converter": "random_checkpoint",
            "policy": policy_size,
            "sam": sam_size,
            **_encoder_provenance(options),
            "seed": options.seed,
            "note": "random weights: the masks mean nothing",
        },
    )
    tensors = random_tensors(config.model, options.seed)
    progress("write checkpoint")
    return write_checkpoint(out, config, tensors, policy.save, options.overwrite)


def random_tensors(config: SegmentationConfig, seed: int) -> dict[str, Tensor]:
    """Draw weights of a segmentation model, none of them all zero, so that every part matters."""
    import torch

    from coprs_deploy.models import SegmentationModel
    from coprs_deploy.models.layers import BatchNorm2d

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SegmentationModel(config).requires_grad_(False)
        for name, tensor in model.image_encoder.named_parameters():
            if "pos" in name or "attention_biases" in name:
                tensor.normal_(std=0.02)
        for module in model.image_encoder.modules():
            if isinstance(module, BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model.state_dict()


def _read_sam(path: Path, options: ConversionOptions) -> tuple[SamConfig, dict[str, Tensor]]:
    """Read SAM, with another image encoder if the options name one."""
    config, tensors = read_sam(path)
    if options.image_encoder is None:
        return config, tensors
    file = read_image_encoder(Path(options.image_encoder), config)
    require_same_decoder(file, tensors, str(path))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    return file.sam, kept | file.tensors


def _encoder_provenance(options: ConversionOptions) -> dict[str, str]:
    """Return the entry of an image encoder that is not SAM's own."""
    if options.image_encoder is None:
        return {}
    return {"image_encoder": Path(options.image_encoder).name}


def _untrained_prior(config: SegmentationConfig, seed: int) -> dict[str, Tensor]:
    import torch

    from coprs_deploy.models.prior import PositionalPrior

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = PositionalPrior(config).requires_grad_(False)
    return {f"prior.{name}": tensor for name, tensor in prior.state_dict().items()}


def _read_trained_modules(
    path: Path, sam: SamConfig
) -> tuple[SegmentationConfig, dict[str, Tensor]]:
    """Read prior, prompt encoder and mask decoder under the names of ``SegmentationModel``."""
    trained = {
        re.sub(rf"^{PUBLIC_PRIOR}\.", "prior.", name): tensor
        for name, tensor in read_state_dict(path).items()
    }
    for name in ("prior.q_proj.weight", "prior.fuser.0.weight"):
        if name not in trained:
            raise ConversionError(
                f"{path} has no {name.replace('prior', PUBLIC_PRIOR)}; accepted: the file "
                "written by the public CoPRS training code"
            )
    config = SegmentationConfig(
        policy_hidden_size=trained["prior.q_proj.weight"].shape[1],
        prior_num_heads=trained["prior.fuser.0.weight"].shape[0],
        sam=sam,
    )
    return config, trained


class _PublicPolicy(NamedTuple):
    """Policy of a public training checkpoint; ``save`` fills an empty directory with it."""

    hidden_size: int
    model_type: str
    origin: str
    save: Callable[[Path], object]


def _read_public_policy(root: Path, progress: Progress) -> _PublicPolicy:
    source = root / PUBLIC_POLICY_DIRECTORY
    if not source.is_dir():
        raise ConversionError(
            f"{root} has no {PUBLIC_POLICY_DIRECTORY}/; accepted: a checkpoint of the public "
            "CoPRS training code"
        )
    shards = [] if has_weights(source) else find_shards(root)
    if not shards and not has_weights(source):
        raise ConversionError(
            f"neither {source} has weights (*.safetensors) nor {root} FSDP shards "
            f"({SHARD_FILE.format(size='N', rank='R')})"
        )
    progress(f"merge {len(shards)} FSDP shards" if shards else "load policy")
    model, tokenizer = load_policy(source, merge_shards(shards) if shards else None)
    if register_reference_token(model, tokenizer):
        raise ConversionError(
            f"the tokenizer in {source} has no <REF_POS>, so this policy was never trained to "
            "generate it; accepted: a checkpoint of CoPRS training"
        )
    if shards:
        origin, save = "merged from FSDP shards", partial(save_policy, model, tokenizer, source)
    else:  # copied, so that nothing keeps the loaded weights
        origin, save = "as it was saved", partial(copy_policy_files, source, with_weights=True)
    return _PublicPolicy(_hidden_size(model), model.config.model_type, origin, save)


def _hidden_size(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[1])
