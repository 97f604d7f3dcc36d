"""Compress the weights of a policy's graphs to int8 or int4 with NNCF, without data."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

GROUP_SIZE = 128
"""Weights that share one int4 scale; smaller where the columns are no multiple of it."""


def compress_graph(graph: Any, mode: str, *, all_layers: bool = False) -> Any:
    """Compress the weights of a graph symmetrically.

    Args:
        graph: graph in OpenVINO.
        mode: ``int8`` or ``int4``.
        all_layers: whether int4 includes the last product, which NNCF otherwise takes for the
            output head and keeps in int8.
    """
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedCompressionParameters,
        GroupSizeFallbackMode,
    )

    nncf.set_log_level(40)
    adjust = AdvancedCompressionParameters(group_size_fallback_mode=GroupSizeFallbackMode.ADJUST)
    with redirect_stdout(io.StringIO()):  # its progress bar
        if mode == "int8":
            return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
        return nncf.compress_weights(
            graph,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=GROUP_SIZE,
            ratio=1.0,
            all_layers=all_layers,
            advanced_parameters=adjust,
        )
