"""Policy architectures for vLLM: hidden states kept for the capture, our own image preprocessing.

Each family is vLLM's model class under an architecture name of this package, with two additions:
the post-norm hidden states of a step stay available while its logits are processed, and images go
through :class:`~coprs_deploy.policy.vision_inputs.VisionProcessor` instead of a multimodal
processor of transformers. Both policies thus get the same pixels, and a checkpoint needs no
processor files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from transformers import BatchFeature
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import Qwen2VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.policy.vllm_policy.capture import HiddenStateCapture

_Model = TypeVar("_Model", bound=type)

_CLIP_ROOT = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")

_VISION: dict[str, VisionProcessor] = {}
"""Cache by policy directory; vLLM creates the image info below again for each query."""


class _ImageInfo:
    """Limits and token counts of images, without a multimodal processor of transformers."""

    ctx: Any

    @property
    def vision(self) -> VisionProcessor:
        """Image preprocessing of the policy directory."""
        model = self.ctx.model_config
        if model.model not in _VISION:
            _VISION[model.model] = VisionProcessor(Path(model.model), model.hf_config)
        return _VISION[model.model]

    def get_hf_processor(self, **options: object) -> Any:
        """Return the attributes of a multimodal processor that vLLM reads."""
        processor = self.vision.image_processor
        return SimpleNamespace(image_processor=processor, image_token="", video_token="")

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Return the maximum number of vision tokens of an image, capped at the prompt length."""
        return {"image": min(seq_len, self.vision.max_tokens)}


class _ImagePreprocessing:
    """Multimodal processor that preprocesses images with :class:`VisionProcessor`."""

    info: Any

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        (image,) = hf_data["images"]
        return BatchFeature(self.info.vision(image).tensors, tensor_type="pt")

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        vision = self.info.vision
        image_id = self.info.ctx.model_config.hf_config.image_token_id

        def replacement(index: int) -> list[int]:
            image = mm_items["image"].get(index)
            return [image_id] * vision.num_tokens(image.width, image.height)

        return [PromptReplacement("image", [image_id], replacement)]


class _DummyImages:
    """Images for the engine's memory profile: the largest that the prompt limit allows."""

    info: Any

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        image_id = self.info.ctx.model_config.hf_config.image_token_id
        token: str = self.info.get_tokenizer().convert_ids_to_tokens(image_id)
        return token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> Mapping[str, Any]:
        vision = self.info.vision
        width, height = vision.largest_image(min(seq_len, vision.max_tokens))
        images = self._get_dummy_images(  # type: ignore[attr-defined]
            width=width, height=height, num_images=mm_counts.get("image", 0)
        )
        return {"image": images}


class _KeepsHiddenStates:
    """Keep the hidden states that become logits; runs outside compiled and graph-captured code."""

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        HiddenStateCapture.step = hidden_states
        logits: torch.Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]
        return logits


def _registered(info: type, preprocessing: type, dummy_inputs: type) -> Callable[[_Model], _Model]:
    """Register a model class with vLLM's image classes of its family, extended by those above."""
    register: Callable[[_Model], _Model] = MULTIMODAL_REGISTRY.register_processor(
        type("ImagePreprocessing", (_ImagePreprocessing, preprocessing), {}),
        info=type("ImageInfo", (_ImageInfo, info), {}),
        dummy_inputs=type("DummyImages", (_DummyImages, dummy_inputs), {}),
    )
    return register


@_registered(Qwen2_5_VLProcessingInfo, Qwen2_5_VLMultiModalProcessor, Qwen2VLDummyInputsBuilder)
class QwenPolicy(_KeepsHiddenStates, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2.5-VL with hidden-state capture."""


@_registered(LlavaProcessingInfo, LlavaMultiModalProcessor, LlavaDummyInputsBuilder)
class LlavaPolicy(_KeepsHiddenStates, LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-1.5 with hidden-state capture."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights with the parameter names of older and newer transformers versions.

        CLIP's parameters are under ``vision_tower.vision_model`` in the public checkpoints, and
        directly under ``vision_tower`` in checkpoints written by transformers 5.
        """
        renamed = ((_CLIP_ROOT.sub(r"\1vision_model.", name), weight) for name, weight in weights)
        loaded: set[str] = super().load_weights(renamed)
        return loaded
