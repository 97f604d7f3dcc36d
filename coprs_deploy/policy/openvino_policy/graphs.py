"""The graphs of a policy in OpenVINO: vision tower, embedding table and decoder with its cache.

policy_graphs.json            model family, special tokens, precision, sizes
vision.xml, vision.bin        image -> vision tokens
decoder.xml, decoder.bin      embeddings -> logits and hidden state of the last row; stateful
embedding.npy                 (vocabulary, D), read from disk row by row
tokenizer.json, preprocessor_config.json
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.engines.mapped_weights import MappedWeights
from coprs_deploy.engines.openvino_runner import compile_file
from coprs_deploy.errors import PolicyError
from coprs_deploy.policy.openvino_policy.positions import (
    QwenVision,
    prompt_positions,
    vision_inputs,
)
from coprs_deploy.policy.pixels import ClipPixels, QwenPixels
from coprs_deploy.specs import Record

DESCRIPTION_FILE = "policy_graphs.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
EMBEDDING_FILE = "embedding.npy"
VISION_FILE = "vision.xml"
DECODER_FILE = "decoder.xml"

MAX_IDLE_REQUESTS = 8
"""Inference requests that are kept for later; each holds the keys and values that it has read."""

EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
"""Settings under which OpenVINO computes what PyTorch computes; its defaults round keys, values and
the inputs of compressed products to 8 bits."""

COMPRESSED = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
"""Settings for int8 and int4; keys and values stay at OpenVINO's default of 8 bits. Of the group
sizes 0, 32, 128 and per token, 128 was the fastest."""


class PolicyGraphs(Record, frozen=True):
    """Description of a policy's graphs.

    Attributes:
        family: ``qwen2_5_vl`` or ``llava``.
        precision: precision of the weights: ``fp32``, ``bf16``, ``int8`` or ``int4``.
        hidden_size: D, width of the decoder.
        image_token_id: placeholder of a vision token.
        end_token_ids: tokens that end a response.
        num_layers: layers of the decoder.
        vision: sizes of Qwen2.5-VL's vision tower; None for LLaVA.
        num_image_tokens: vision tokens of any image for LLaVA; None for Qwen2.5-VL.
    """

    family: Literal["qwen2_5_vl", "llava"]
    precision: str
    hidden_size: int
    image_token_id: int
    end_token_ids: tuple[int, ...]
    num_layers: int
    vision: QwenVision | None = None
    num_image_tokens: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Properties of OpenVINO for this precision."""
        return COMPRESSED if self.precision in ("int8", "int4") else EXACT


def read_description(path: Path) -> PolicyGraphs:
    """Read the description of a policy's graphs.

    Raises:
        PolicyError: it is missing or not valid.
    """
    file = path / DESCRIPTION_FILE
    try:
        return PolicyGraphs.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"{file} cannot be read: {error}; export the checkpoint again with "
            "--policy-runtime openvino"
        ) from error


FIRST_ROW = "first_row"
"""Input that :func:`select_rows` adds: first row of the outputs, counted from the end (-1)."""


def select_rows(graph: Any) -> None:
    """Let a decoder graph, which returns its last row, return the rows from ``FIRST_ROW`` on.

    Raises:
        ValueError: the graph does not select a row.
    """
    from openvino import opset13 as ops

    def rank(port: Any) -> int:
        shape = port.get_partial_shape()
        return len(shape) if shape.rank.is_static else 0

    # The last row is taken of (1, L, D), D being known; LLaVA's positions are taken of (1, 1, L).
    found = [
        node
        for node in graph.get_ops()
        if node.get_type_name() == "Gather"
        and rank(node.input(0)) == 3
        and rank(node.output(0)) == 2
        and node.output(0).get_partial_shape()[1].is_static
    ]
    if len(found) != 1:
        raise ValueError(f"{DECODER_FILE} selects rows {len(found)} times; accepted: once")
    first = ops.parameter([1], np.int64, name=FIRST_ROW)
    first.output(0).get_tensor().set_names({FIRST_ROW})
    end, step, axis = (ops.constant(np.array([n])) for n in (np.iinfo(np.int64).max, 1, 1))
    rows = ops.slice(found[0].input_value(0), first, end, step, axis)
    without_batch = ops.squeeze(rows, ops.constant(np.array([0])))
    for user in found[0].output(0).get_target_inputs():
        user.replace_source_output(without_batch.output(0))
    graph.add_parameters([first])
    graph.validate_nodes_and_infer_types()


def decoder_tensors(
    embeddings: NDArray[np.float32], positions: NDArray[np.int64]
) -> dict[str, NDArray[np.generic]]:
    """Return the inputs of the decoder for (L, D) embeddings at (3, L) or (1, L) positions."""
    return {
        "inputs_embeds": embeddings[None],
        "position_ids": positions[:, None],
        "beam_idx": np.zeros(1, np.int32),
    }


class VisionTower:
    """Preprocessing and vision graph of one family; images of several threads take turns.

    Args:
        path: directory of the graphs.
        description: description of the policy's graphs.
        settings: properties of OpenVINO.
    """

    def __init__(self, path: Path, description: PolicyGraphs, settings: dict[str, Any]) -> None:
        config = json.loads((path / PREPROCESSOR_FILE).read_text(encoding="utf-8"))
        self._description = description
        self._qwen = QwenPixels(config) if description.vision else None
        self._clip = None if description.vision else ClipPixels(config)
        self._compiled = compile_file(path / VISION_FILE, settings)
        self._weights = MappedWeights((path / VISION_FILE).with_suffix(".bin"))
        self._lock = threading.Lock()

    def grid(self, image: Image.Image) -> tuple[int, int]:
        """Return rows and columns of the image's patches; (0, 0) if its size does not matter."""
        if self._qwen is None:
            return 0, 0
        width, height = self._qwen.size_of(*image.size)
        side = self._qwen.config["patch_size"]
        return height // side, width // side

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of vision tokens of an image with this many patches."""
        vision = self._description.vision
        if vision is None:
            assert self._description.num_image_tokens is not None
            return self._description.num_image_tokens
        return grid[0] * grid[1] // vision.spatial_merge_size**2

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Return the (V, D) vision tokens of an RGB image."""
        if self._qwen is not None:
            assert self._description.vision is not None
            patches, grid = self._qwen(image)
            inputs = vision_inputs(patches, grid, self._description.vision)
        else:
            assert self._clip is not None
            inputs = {"pixel_values": self._clip(image)}
        with self._lock:  # memory cannot be released while another request runs
            outputs = self._compiled.create_infer_request().infer(inputs)
            # The decoder runs next: at 3B, activations of the largest image take 0.3 GB.
            self._compiled.release_memory()
        self._weights.release()
        tokens: NDArray[np.float32] = outputs["tokens"]
        return tokens

    def positions(self, is_image: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.int64]:
        """Return the positions of a prompt: (3, L) for Qwen2.5-VL, (1, L) for LLaVA."""
        vision = self._description.vision
        if vision is None:
            return np.arange(len(is_image))[None]
        return prompt_positions(is_image, grid, vision.spatial_merge_size)


class EmbeddingTable:
    """Embeddings of all tokens, read from disk row by row.

    Args:
        path: directory of the graphs.
    """

    def __init__(self, path: Path) -> None:
        self._table = np.load(path / EMBEDDING_FILE, mmap_mode="r")

    def __call__(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the (L, D) float32 embeddings of tokens."""
        rows = np.asarray(self._table[np.asarray(ids)])
        if rows.dtype == np.uint16:  # bfloat16 is the upper half of a float32
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32, copy=False)


class Decoder:
    """Embedding table and decoder graph; each request in progress has keys and values of its own.

    Args:
        path: directory of the graphs.
        settings: properties of OpenVINO.

    Attributes:
        embed: embedding table.
        weights: file of the decoder's weights, which OpenVINO packs with the first request.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.embed = EmbeddingTable(path)
        self._compiled = compile_file(path / DECODER_FILE, settings, change=select_rows)
        self.weights = MappedWeights((path / DECODER_FILE).with_suffix(".bin"))
        self._idle: deque[Any] = deque(maxlen=MAX_IDLE_REQUESTS)  # its append and pop are atomic
        self._lock = threading.Lock()

    @contextmanager
    def request(self) -> Iterator[DecoderRequest]:
        """Lend an inference request with an empty cache."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        request.reset_state()
        try:
            yield DecoderRequest(request, self._lock)
        finally:
            self._idle.append(request)


class DecoderRequest:
    """One inference request of the decoder, with the keys and values of what it has read."""

    def __init__(self, request: Any, lock: threading.Lock) -> None:
        self._request = request
        self._lock = lock

    def feed(
        self, embeddings: NDArray[np.float32], positions: NDArray[np.int64], num_rows: int
    ) -> tuple[list[int], NDArray[np.float32]]:
        """Read rows; other requests may run between two calls, not during one.

        Args:
            embeddings: (L, D).
            positions: (3, L) or (1, L).
            num_rows: number R of rows at the end to return something of.

        Returns:
            Most likely token after each of the last R rows, and their (R, D) post-norm hidden
            states.
        """
        inputs = decoder_tensors(embeddings, positions) | {FIRST_ROW: np.array([-num_rows])}
        with self._lock:
            outputs = self._request.infer(inputs)
            return outputs["logits"].argmax(-1).tolist(), outputs["hidden"].copy()

    def drop(self, count: int) -> None:
        """Forget the last rows. A state cannot be shortened in place: what remains is copied."""
        import openvino

        for variable in self._request.query_state():
            rows = np.ascontiguousarray(np.array(variable.state.data)[:, :, :-count])
            variable.state = openvino.Tensor(rows)

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Copy the keys and values, (1, heads, L, d) each."""
        return {s.name: np.array(s.state.data) for s in self._request.query_state()}

    def restore(self, state: dict[str, NDArray[np.float32]], length: int) -> None:
        """Take over the keys and values of the first ``length`` rows of another request."""
        import openvino

        for variable in self._request.query_state():
            rows = np.ascontiguousarray(state[variable.name][:, :, :length])
            variable.state = openvino.Tensor(rows)
