"""The policy's prompt in the shape that TRL asks for: the very tokens that the runtime writes.

TRL speaks to a multimodal processor: it renders a conversation, and reads pictures. Here both are
the checkpoint's own prompt template and image processor; no chat template of a tokenizer, which
could differ from it, is ever used.
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

PICTURE_KEY = "coprs_example"
"""Key in a picture's ``info`` that names its example, so that equal ones are processed once."""


class PolicyProcessor(ProcessorMixin):  # type: ignore[misc]
    """Prompt and pictures of one policy.

    Args:
        tokenizer: the policy's tokenizer.
        vision: the policy's image side.
        prompt: the checkpoint's prompt.
    """

    def __init__(self, tokenizer: Any, vision: VisionProcessor, prompt: PromptTemplate) -> None:
        # ProcessorMixin's own constructor wants parts that it can save and load again.
        self.tokenizer = tokenizer
        self.chat_template = None
        self.image_token_id = tokenizer.convert_tokens_to_ids(prompt.image_token)
        self._vision = vision
        self._prompt = prompt
        self._seen: dict[Any, VisionInputs] = {}

    def forget(self) -> None:
        """Drop the pictures that were processed so far."""
        self._seen.clear()

    def look(self, picture: Image.Image) -> VisionInputs:
        """Process a picture that already has the policy's area."""
        key = picture.info.get(PICTURE_KEY)
        if key is None:
            return self._vision(picture)
        if key not in self._seen:
            self._seen[key] = self._vision(picture)
        return self._seen[key]

    def encode(self, instruction: str, picture: Image.Image) -> list[int]:
        """Write the prompt, a token id for each vision token of the picture included."""
        return encode_prompt(
            self._prompt, self.tokenizer, instruction, self.look(picture).num_tokens
        )

    def apply_chat_template(self, conversation: Any, tokenize: bool = False, **options: Any) -> Any:
        """Render one conversation to its instruction, or tokenize several with their pictures."""
        if not tokenize:
            return _parts(conversation)[0]
        pairs = [_parts(one) for one in conversation]
        pictures = [picture for _, picture in pairs]
        prompts = [self.encode(*pair) for pair in pairs]
        fields = self._vision_fields(pictures)
        if self.look(pictures[0]).marks_image_tokens:
            fields["mm_token_type_ids"] = [
                [int(token == self.image_token_id) for token in ids] for ids in prompts
            ]
        return {"input_ids": prompts, **fields}

    def __call__(
        self, images: Sequence[Sequence[Image.Image]], text: Sequence[str], **options: Any
    ) -> dict[str, Tensor]:
        """Return prompts as tensors, padded on the left, with the pictures' own tensors."""
        pictures = [picture for (picture,) in images]
        prompts = [self.encode(*pair) for pair in zip(text, pictures, strict=True)]
        return self.tensors(prompts, pictures)

    def tensors(
        self, prompts: Sequence[Sequence[int]], pictures: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Pad prompts on the left, and collect the tensors of their pictures."""
        width = max(map(len, prompts))
        pad = int(self.tokenizer.pad_token_id)
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        attended = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        fields = {"input_ids": ids, "attention_mask": attended, **self._vision_fields(pictures)}
        if self.look(pictures[0]).marks_image_tokens:
            fields["mm_token_type_ids"] = (ids == self.image_token_id).int()
        return fields

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> list[str]:
        """Save nothing: the run's checkpoint holds tokenizer, processor and prompt."""
        return []

    def _vision_fields(self, pictures: Sequence[Image.Image]) -> dict[str, Any]:
        seen = [self.look(picture) for picture in pictures]
        return {name: torch.cat([one.tensors[name] for one in seen]) for name in seen[0].tensors}


def _parts(conversation: Sequence[dict[str, Any]]) -> tuple[str, Any]:
    """Take the instruction and the picture out of a conversation of one message."""
    (message,) = conversation
    content = message["content"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    pictures = [part["image"] for part in content if part["type"] == "image"]
    return "".join(texts), pictures[0] if pictures else None
