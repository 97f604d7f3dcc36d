"""Policies whose weights are quantized in the compressed-tensors format, in transformers.

vLLM multiplies with the quantized weights. transformers has no kernels for most of them, so they
are unpacked once; the inputs of each product are then rounded as vLLM rounds them. Results are
those of the quantized policy; memory and speed are those of the weights' dtype.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from coprs_deploy.errors import CheckpointError, MissingDependencyError

COMPRESSED_TENSORS = "compressed-tensors"
"""``quant_method`` of the format in a policy's configuration."""


def quantization_method(policy: Path) -> str | None:
    """Return the ``quant_method`` of a policy directory; None if it is not quantized."""
    try:
        config: Any = json.loads((policy / "config.json").read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def require_float_weights(policy: Path, purpose: str) -> None:
    """Refuse a quantized policy for a purpose that needs float weights.

    Raises:
        CheckpointError: the policy is quantized.
    """
    if method := quantization_method(policy):
        raise CheckpointError(
            f"the policy in {policy} is quantized ({method}), and {purpose} needs float weights; "
            "use the checkpoint that it was made from"
        )


def check_readable(policy: Path) -> None:
    """Check that the library that unpacks a policy's weights is installed.

    Raises:
        MissingDependencyError: the policy is in the compressed-tensors format, and it is not.
    """
    is_installed = importlib.util.find_spec("compressed_tensors") is not None
    if quantization_method(policy) == COMPRESSED_TENSORS and not is_installed:
        raise MissingDependencyError(
            f"the policy in {policy} is quantized, for vLLM; in transformers it needs "
            "compressed-tensors: pip install compressed-tensors"
        )


def unpack_weights(model: Any) -> None:
    """Unpack the compressed weights of a loaded model in place; others are left alone."""
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method != COMPRESSED_TENSORS:
        return
    from compressed_tensors.compressors import decompress_module

    for module in model.modules():
        decompress_module(module)
