"""The files of a policy in OpenVINO, its vision tower and its embedding table.

policy_graphs.json            model family, special tokens, precision, sizes
vision.xml, vision.bin        image -> vision tokens
decoder.xml, decoder.bin      embeddings -> logits and hidden state of the last row; stateful
embedding.npy                 (vocabulary, D), read from disk row by row
tokenizer.json, preprocessor_config.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.engines.mapped_weights import MappedWeights
from coprs_deploy.engines.openvino_runner import compile_file
from coprs_deploy.errors import PolicyError
from coprs_deploy.policy.fair_lock import FairLock
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
        self._lock = FairLock()

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

    def __call__(
        self, image: Image.Image, remaining_s: Callable[[], float | None] = lambda: None
    ) -> NDArray[np.float32]:
        """Return the (V, D) vision tokens of an RGB image.

        Args:
            image: the image.
            remaining_s: how long to wait for other images; see :meth:`FairLock.hold`.
        """
        if self._qwen is not None:
            assert self._description.vision is not None
            patches, grid = self._qwen(image)
            inputs = vision_inputs(patches, grid, self._description.vision)
        else:
            assert self._clip is not None
            inputs = {"pixel_values": self._clip(image)}
        with self._lock.hold(remaining_s):  # memory cannot be released while another request runs
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
