"""Multimodal processor for TRL: exactly the prompt tokens of the runtime.

TRL renders conversations and preprocesses images through a processor. This one uses the prompt
template and image processor of the checkpoint, never the chat template of a tokenizer, which could
differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from coprs_deploy.policy.vision_inputs import VisionInputs, VisionProcessor
from coprs_deploy.prompts import PromptTemplate, encode_prompt
from coprs_deploy.training.batches import pad_tokens

IMAGE_KEY = "coprs_example"
"""Key in an image's ``info`` that identifies its example, so that it is preprocessed once."""


class PolicyProcessor(ProcessorMixin):  # type: ignore[misc]
    """Prompts and images of one policy."""

    def __init__(self, tokenizer: Any, vision: VisionProcessor, prompt: PromptTemplate) -> None:
        # The constructor of ProcessorMixin accepts only parts that it can save and load.
        self.tokenizer = tokenizer
        self.chat_template = None
        self.image_token_id = tokenizer.convert_tokens_to_ids(prompt.image_token)
        self._vision = vision
        self.prompt = prompt
        self._cache: dict[Any, VisionInputs] = {}

    def clear_cache(self) -> None:
        """Drop the preprocessed images."""
        self._cache.clear()

    def vision_inputs(self, image: Image.Image) -> VisionInputs:
        """Preprocess an image that already has the policy's size."""
        key = image.info.get(IMAGE_KEY)
        if key is None:
            return self._vision(image)
        if key not in self._cache:
            self._cache[key] = self._vision(image)
        return self._cache[key]

    def encode(self, instruction: str, image: Image.Image) -> list[int]:
        """Return the token ids of the prompt, with one image token per vision token."""
        num_tokens = self.vision_inputs(image).num_tokens
        return encode_prompt(self.prompt, self.tokenizer, instruction, num_tokens)

    def apply_chat_template(self, conversation: Any, tokenize: bool = False, **options: Any) -> Any:
        """Render one conversation to its instruction, or tokenize several with their images."""
        if not tokenize:
            return _parts(conversation)[0]
        pairs = [_parts(one) for one in conversation]
        images = [image for _, image in pairs]
        prompts = [self.encode(*pair) for pair in pairs]
        fields = self._vision_fields(images)
        if self.vision_inputs(images[0]).marks_image_tokens:
            fields["mm_token_type_ids"] = [
                [int(token == self.image_token_id) for token in ids] for ids in prompts
            ]
        return {"input_ids": prompts, **fields}

    def __call__(
        self, images: Sequence[Sequence[Image.Image]], text: Sequence[str], **options: Any
    ) -> dict[str, Tensor]:
        """Return left-padded prompts and the tensors of their images."""
        flat = [image for (image,) in images]
        prompts = [self.encode(*pair) for pair in zip(text, flat, strict=True)]
        ids, attended = pad_tokens(prompts, self.tokenizer.pad_token_id, "left")
        fields = {"input_ids": ids, "attention_mask": attended, **self._vision_fields(flat)}
        if self.vision_inputs(flat[0]).marks_image_tokens:
            fields["mm_token_type_ids"] = (ids == self.image_token_id).int()
        return fields

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> list[str]:
        """Save nothing: the checkpoint of the run has tokenizer, processor and prompt."""
        return []

    def _vision_fields(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        inputs = [self.vision_inputs(image) for image in images]
        return {name: torch.cat([i.tensors[name] for i in inputs]) for name in inputs[0].tensors}


def _parts(conversation: Sequence[dict[str, Any]]) -> tuple[str, Any]:
    """Return instruction and image of a conversation of one message."""
    (message,) = conversation
    content = message["content"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    images = [part["image"] for part in content if part["type"] == "image"]
    return "".join(texts), images[0] if images else None
