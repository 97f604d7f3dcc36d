"""Compress the weights of a policy's graphs to int8 or int4 with NNCF.

int8 needs no data. int4 rounds to the nearest value, or, given the inputs of a decoder layer on
examples, by GPTQ: column by column, each column taking over the errors of those before it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.bundle import PolicyCalibration, PolicyCompression
from coprs_deploy.engines.openvino_runner import DEVICE, openvino_core
from coprs_deploy.policy.openvino_policy.graphs import EXACT

GROUP_SIZE = 128
"""Weights that share one int4 scale; smaller where the columns are no multiple of it."""

MAX_CALIBRATION_EXAMPLES = 32
"""Examples that int4 weights are fitted to; 64 and 128 changed nothing, and each takes as long as a
request."""

MAX_HELD_OUT = 4
"""Other examples that both forms of int4 are compared on."""

DecoderInput = tuple[NDArray[np.float32], NDArray[np.int64]]
"""(L, D) embeddings and (3, L) or (1, L) positions of a prompt with its response."""


def compression_of(
    precision: str, calibration: PolicyCalibration | None = None
) -> PolicyCompression | None:
    """Return the record of a precision for the manifest; None if nothing is compressed."""
    if precision == "int8":
        return PolicyCompression("int8_sym", group_size=None, method="nearest")
    if precision == "int4":
        method = "nearest" if calibration is None else "gptq"
        return PolicyCompression("int4_sym", GROUP_SIZE, method, calibration)
    return None


def compress_graph(
    graph: Any,
    mode: str,
    *,
    all_layers: bool = False,
    inputs: Sequence[Sequence[NDArray[Any]]] = (),
) -> Any:
    """Compress the weights of a graph symmetrically.

    Args:
        graph: graph in OpenVINO.
        mode: ``int8`` or ``int4``.
        all_layers: whether int4 includes the last product, which NNCF otherwise takes for the
            output head and keeps in int8.
        inputs: inputs of the graph on calibration samples, for int4; without any, weights are
            rounded to the nearest value.
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
            dataset=nncf.Dataset(inputs) if inputs else None,
            subset_size=max(len(inputs), 1),
            gptq=bool(inputs),
            advanced_parameters=adjust,
        )


class LayerInputs:
    """Inputs of the decoder's layers on calibration samples, layer by layer.

    Args:
        samples: what the decoder reads for each sample.
        shared: graph from positions and keys to rotations and mask, which all layers take.
        cache_shape: shape of a layer's empty keys and values.
    """

    def __init__(
        self, samples: Iterable[DecoderInput], shared: Any, cache_shape: tuple[int, ...]
    ) -> None:
        self._cache = np.zeros(cache_shape, np.float32)
        self._rows: list[NDArray[Any]] = []
        positions: list[list[NDArray[Any]]] = []
        for embeddings, places in samples:
            self._rows.append(embeddings[None])
            positions.append([places[:, None], self._cache])
        self._shared = _outputs(shared, positions)

    def of_layer(self) -> list[list[NDArray[Any]]]:
        """Return the inputs of the current layer for each sample."""
        return [
            [row, *shared, self._cache, self._cache]
            for row, shared in zip(self._rows, self._shared, strict=True)
        ]

    def advance(self, layer: Any) -> None:
        """Go on to the next layer, which reads what the compressed layer gives."""
        self._rows = [rows for rows, *_ in _outputs(layer, self.of_layer())]


def _outputs(graph: Any, inputs: Sequence[Sequence[NDArray[Any]]]) -> list[list[NDArray[Any]]]:
    if not inputs:
        return []
    request = openvino_core().compile_model(graph, DEVICE, EXACT).create_infer_request()
    return [[output.copy() for output in request.infer(each).values()] for each in inputs]
