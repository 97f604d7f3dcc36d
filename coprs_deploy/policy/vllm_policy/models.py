"""The two policy families as vLLM runs them here: rows kept, pictures prepared by our own code.

Each family is vLLM's own model under an architecture name of ours. Two things are added: the
post-norm rows stay in reach while their logits are processed, and pictures go through
:class:`~coprs_deploy.policy.vision_inputs.VisionProcessor` instead of a multimodal processor of
transformers, so that both policies see the same pixels and a checkpoint needs no processor files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from coprs_deploy.policy.vllm_policy.capture import STEP

_CLIP_ROOT = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")

_VISION: dict[str, VisionProcessor] = {}
"""By policy directory; vLLM makes the objects below anew for each question about pictures."""


class _PictureInfo:
    """What vLLM asks about pictures, answered without a processor of transformers."""

    ctx: Any

    @property
    def vision(self) -> VisionProcessor:
        """The image side of the policy directory."""
        model = self.ctx.model_config
        if model.model not in _VISION:
            _VISION[model.model] = VisionProcessor(Path(model.model), model.hf_config)
        return _VISION[model.model]

    def get_hf_processor(self, **options: object) -> Any:
        """Stand in for a multimodal processor: only its image processor and tokens are read."""
        image_processor = self.vision.image_processor
        return SimpleNamespace(image_processor=image_processor, image_token="", video_token="")

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """One picture a request, no video."""
        return {"image": 1}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """The most vision tokens of a picture: no prompt with more of them is accepted."""
        return {"image": min(seq_len, self.vision.most_tokens)}


class _Pictures:
    """A multimodal processor whose pictures go through our own image side."""

    info: Any

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        (picture,) = hf_data["images"]
        return BatchFeature(self.info.vision(picture).tensors, tensor_type="pt")

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        vision = self.info.vision
        image_id = self.info.ctx.model_config.hf_config.image_token_id

        def replacement(index: int) -> list[int]:
            picture = mm_items["image"].get(index)
            return [image_id] * vision.num_tokens(picture.width, picture.height)

        return [PromptReplacement("image", [image_id], replacement)]


class _DummyPictures:
    """Pictures for the engine's memory profile: as large as the longest prompt allows."""

    info: Any

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        image_id = self.info.ctx.model_config.hf_config.image_token_id
        token: str = self.info.get_tokenizer().convert_ids_to_tokens(image_id)
        return token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> Mapping[str, Any]:
        vision = self.info.vision
        width, height = vision.largest_picture(min(seq_len, vision.most_tokens))
        pictures = self._get_dummy_images(  # type: ignore[attr-defined]
            width=width, height=height, num_images=mm_counts.get("image", 0)
        )
        return {"image": pictures}


class _KeepsRows:
    """Keeps the rows that become logits; runs outside of compiled and captured code."""

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        STEP.rows = hidden_states
        logits: torch.Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]
        return logits


class QwenInfo(_PictureInfo, Qwen2_5_VLProcessingInfo):  # type: ignore[misc]
    """Qwen2.5-VL's answers about pictures."""


class QwenPictures(_Pictures, Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    """Qwen2.5-VL's pictures."""


class QwenDummyPictures(_DummyPictures, Qwen2VLDummyInputsBuilder):  # type: ignore[misc]
    """Qwen2.5-VL's pictures for the memory profile."""


@MULTIMODAL_REGISTRY.register_processor(QwenPictures, info=QwenInfo, dummy_inputs=QwenDummyPictures)
class QwenPolicy(_KeepsRows, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2.5-VL with its rows in reach."""


class LlavaInfo(_PictureInfo, LlavaProcessingInfo):  # type: ignore[misc]
    """LLaVA-1.5's answers about pictures."""


class LlavaPictures(_Pictures, LlavaMultiModalProcessor):  # type: ignore[misc]
    """LLaVA-1.5's pictures."""


class LlavaDummyPictures(_DummyPictures, LlavaDummyInputsBuilder):  # type: ignore[misc]
    """LLaVA-1.5's pictures for the memory profile."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaPictures, info=LlavaInfo, dummy_inputs=LlavaDummyPictures
)
class LlavaPolicy(_KeepsRows, LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-1.5 with its rows in reach."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights under the names of older and newer transformers versions.

        CLIP's parameters lie under ``vision_tower.vision_model`` in the public checkpoints, and
        directly under ``vision_tower`` in those that transformers 5 writes.
        """
        renamed = ((_CLIP_ROOT.sub(r"\1vision_model.", name), weight) for name, weight in weights)
        loaded: set[str] = super().load_weights(renamed)
        return loaded
