"""Size of a policy as its configuration describes it, checked before anything is allocated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coprs_deploy.errors import PolicyError
from coprs_deploy.model_config import MAX_LAYERS

_LAYERS = re.compile(r"num_(hidden_)?layers|n_layers?|depth")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


def check_policy_size(path: Path, stored_bytes: int | None = None) -> None:
    """Compare the size of a policy in its configuration with that of its weights.

    transformers allocates what the configuration describes before it compares shapes. What passes
    here needs at most as many elements as the weights have bytes; shapes are compared on loading.

    Args:
        path: transformers directory; one without weights, or with a configuration that cannot be
            read, is left to the error on loading.
        stored_bytes: size of the weights; None for those in the directory.

    Raises:
        PolicyError: the configuration describes a larger model or too many layers, or transformers
            does not accept it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    if stored_bytes is None:
        files = (file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
        stored_bytes = sum(file.stat().st_size for file in files)
    try:
        data = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    for name, number in _numbers(data):
        if _LAYERS.fullmatch(name) and number > MAX_LAYERS:
            raise PolicyError(
                f"{name} is {number} in {path / 'config.json'}; accepted: at most {MAX_LAYERS}; "
                "use the config.json that belongs to the weights"
            )
    # Several weights of a quantized policy share a byte.
    capacity = stored_bytes * (8 if "quantization_config" in data else 1)
    if not capacity:
        return
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except MemoryError:
        raise
    except Exception as error:  # transformers computes with the numbers, whatever they are
        raise PolicyError(f"{path / 'config.json'} is not valid: {error}") from error
    needed = sum(tensor.numel() for tensor in model.parameters())
    if needed > capacity:
        name, tensor = max(model.named_parameters(), key=lambda item: item[1].numel())
        raise PolicyError(
            f"{path / 'config.json'} describes {needed:,} parameters (the largest: {name} "
            f"{tuple(tensor.shape)}), and the weights have only {stored_bytes:,} bytes; use the "
            "config.json that belongs to the weights"
        )


def _numbers(data: Any) -> Iterator[tuple[str, int]]:
    """List the whole numbers in nested objects by name."""
    for name, value in data.items() if isinstance(data, dict) else ():
        if isinstance(value, int):
            yield name, value
        yield from _numbers(value)
