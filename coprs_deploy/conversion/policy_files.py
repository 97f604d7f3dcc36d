"""Policy directories: load, add the ``<REF_POS>`` token, save."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coprs_deploy.checkpoint import check_values, without_shared_memory
from coprs_deploy.errors import CheckpointError, ConversionError
from coprs_deploy.policy.policy_size import check_policy_size
from coprs_deploy.policy.progress_bars import without_progress_bars
from coprs_deploy.prompts import REFERENCE_TOKEN, PromptTemplate

if TYPE_CHECKING:
    from torch import Tensor

_REQUEST = (
    "Find the part of the picture that this describes: {instruction}\n"  # codespell:ignore picture
    "Think it through inside <think> and </think>, then write <REF_POS> once for it."
)

DEFAULT_PROMPTS: Mapping[str, PromptTemplate] = {
    "qwen2_5_vl": PromptTemplate(
        text=(
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
            + _REQUEST
            + "<|im_end|>\n<|im_start|>assistant\n"
        ),
        image_token="<|image_pad|>",
    ),
    "llava": PromptTemplate(
        text="USER: <image>\n" + _REQUEST + " ASSISTANT:", image_token="<image>"
    ),
}
"""Default prompt template by model type, for policies trained without another one."""

_SKIPPED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_SAFETENSORS_SUFFIXES = (".safetensors", ".safetensors.index.json")


def load_policy(path: Path, weights: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
    """Load a policy and its tokenizer in the stored dtype.

    Args:
        path: transformers directory.
        weights: weights from elsewhere; None for those of the directory.

    Raises:
        ConversionError: the directory has no supported policy, or weights are missing.
    """
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        AutoTokenizer,
        GenerationConfig,
    )

    _refuse_adapter(path)
    if not (path / "config.json").is_file():
        raise ConversionError(f"{path} is not a transformers directory: it has no config.json")
    try:
        with without_progress_bars(), _without_warnings():
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            if config.model_type not in DEFAULT_PROMPTS:
                raise ConversionError(
                    f"the policy in {path} is of type {config.model_type!r}; "
                    f"accepted: {', '.join(DEFAULT_PROMPTS)}"
                )
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            image_token = DEFAULT_PROMPTS[config.model_type].image_token
            if image_token not in tokenizer.get_vocab():
                raise ConversionError(
                    f"the tokenizer in {path} does not fit the policy: it has no {image_token}"
                )
            given = None if weights is None else sum(w.nbytes for w in weights.values())
            check_policy_size(path, given)
            options = {
                "dtype": "auto",
                "local_files_only": True,
                "output_loading_info": True,
                "ignore_mismatched_sizes": True,  # listed in the error below
            }
            if weights is None:
                model, info = AutoModelForImageTextToText.from_pretrained(path, **options)
            else:
                # The auto class accepts no state dict; the class that it selects does.
                chosen = AutoModelForImageTextToText._model_mapping[type(config)]
                options |= {"config": config, "state_dict": without_shared_memory(weights)}
                model, info = chosen.from_pretrained(None, **options)
                if (path / "generation_config.json").is_file():
                    stored = GenerationConfig.from_pretrained(path, local_files_only=True)
                    model.generation_config = stored
    except (ConversionError, MemoryError):
        raise
    except Exception as error:  # damaged files raise whatever their contents lead to
        raise ConversionError(f"the policy in {path} cannot be loaded: {error}") from error
    _check_weights(model, info, path)
    return model, tokenizer


def _check_weights(model: Any, info: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that do not fit the model, or are not finite."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, info.get(kind) or ())):
            lora = any("lora_" in name for name in names)
            raise ConversionError(
                f"the weights of the policy in {path} do not fit its config.json: "
                f"{kind.replace('_', ' ')} {names[:5]}"
                + ("; merge the LoRA adapter with peft's merge_and_unload()" if lora else "")
            )
    # Quantized weights are left to the library that unpacks them.
    floats = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.dtype.itemsize > 1
    }
    try:
        check_values(floats, f"the policy in {path}")
    except CheckpointError as error:
        raise ConversionError(str(error)) from error


def _refuse_adapter(path: Path) -> None:
    """Refuse the directory of a LoRA adapter, with the line that merges it."""
    file = path / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        base = "BASE"
    out = f"{path}-merged"
    raise ConversionError(
        f"{path} contains a LoRA adapter of {base}, not a whole model. Merge it, and convert "
        f"{out}: `from transformers import AutoImageProcessor, AutoModelForImageTextToText, "
        "AutoTokenizer; from peft import PeftModel; "
        f"base = AutoModelForImageTextToText.from_pretrained({base!r}, dtype='auto'); "
        f"PeftModel.from_pretrained(base, {str(path)!r}).merge_and_unload()"
        f".save_pretrained({out!r}); AutoTokenizer.from_pretrained({base!r}).save_pretrained("
        f"{out!r}); AutoImageProcessor.from_pretrained({base!r}).save_pretrained({out!r})`. "
        f"If the weights are merged already, remove {file.name}"
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence transformers' report of the keys that were loaded, which is an error of ours."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def register_reference_token(model: Any, tokenizer: Any) -> bool:
    """Add the special token ``<REF_POS>`` to a policy, with a row in both embedding tables.

    The new row is the mean of the rows in use. Returns whether the policy was changed; one that has
    the token is not.
    """
    import torch
    from transformers import AddedToken

    if REFERENCE_TOKEN in tokenizer.get_vocab():
        return False
    tokenizer.add_tokens(
        [AddedToken(REFERENCE_TOKEN, special=True, normalized=False)], special_tokens=True
    )
    token = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
    rows = model.get_input_embeddings().weight.shape[0]
    if token >= rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = {
        id(t.weight): t.weight
        for t in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    with torch.no_grad():
        for weight in tables.values():  # one table if they are tied
            weight[token] = weight[: min(token, rows)].float().mean(dim=0).to(weight.dtype)
    return True


def save_policy(model: Any, tokenizer: Any, source: Path | None, out: Path) -> None:
    """Write a policy directory: weights and tokenizer from memory, the rest from ``source``."""
    if source is not None:
        copy_policy_files(source, out)
    with without_progress_bars():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def copy_policy_files(source: Path, out: Path, with_weights: bool = False) -> None:
    """Copy the files of a policy directory (not its subdirectories).

    Of its weights, those in safetensors are copied on request, and pickles never.
    """
    for path in sorted(source.iterdir()):
        is_copied = not path.name.endswith(_SKIPPED_SUFFIXES)
        if with_weights:
            is_copied |= path.name.endswith(_SAFETENSORS_SUFFIXES)
        if path.is_file() and is_copied:
            shutil.copyfile(path, out / path.name)


def has_weights(directory: Path) -> bool:
    """Return whether a transformers directory has weights in safetensors."""
    return any(directory.glob("*.safetensors"))
