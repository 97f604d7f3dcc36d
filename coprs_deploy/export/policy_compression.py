"""Compress the weights of a policy's graphs to int8 or int4 with NNCF, without data."""

from __future__ import annotations

from typing import Any

GROUP_SIZE = 128
"""Weights that share one int4 scale; smaller where the columns are no multiple of it."""


def compress_graph(graph: Any, mode: str) -> Any:
    """Compress the weights of a graph symmetrically; NNCF keeps the output head in int8."""
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedCompressionParameters,
        GroupSizeFallbackMode,
    )

    nncf.set_log_level(40)
    if mode == "int8":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    adjust = AdvancedCompressionParameters(group_size_fallback_mode=GroupSizeFallbackMode.ADJUST)
    return nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=GROUP_SIZE,
        ratio=1.0,
        advanced_parameters=adjust,
    )
