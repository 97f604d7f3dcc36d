"""What a policy reads on calibration examples: prompts with responses, and the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.export.calibration_examples import CalibrationExamples
from coprs_deploy.images import fit_pixel_count
from coprs_deploy.policy.policy import PolicyRequest, PolicyResult
from coprs_deploy.prompts import encode_prompt

if TYPE_CHECKING:
    from coprs_deploy.policy.transformers_policy import TransformersPolicy


def open_policy(checkpoint: Checkpoint, path: Path) -> TransformersPolicy:
    """Open the policy of a checkpoint, or a quantized form of it, on a GPU if there is one."""
    import torch

    from coprs_deploy.policy.transformers_policy import TransformersPolicy

    limits = checkpoint.config.policy_image
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformersPolicy(
        path, checkpoint.config.prompt, limits.min_pixels, limits.max_pixels, device=device
    )


def respond_to_examples(
    checkpoint: Checkpoint, examples: CalibrationExamples, report: Callable[[str], None]
) -> list[list[int]]:
    """Return the tokens of the examples' responses; where there is none, the float policy's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.policy_path, local_files_only=True)
    responses: list[list[int]] = []
    missing: list[int] = []
    for number, index in enumerate(examples.used):
        text = examples.file.load(index).response
        responses.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not text:
            missing.append(number)
    if not missing:
        return responses
    report("responses of the float policy")
    with open_policy(checkpoint, checkpoint.policy_path) as policy:
        for number in missing:
            example = examples.file.load(examples.used[number])
            request = PolicyRequest(
                example.image, example.instruction, max_targets=max(1, len(example.masks))
            )
            *_, result = policy.stream(request)
            assert isinstance(result, PolicyResult)
            responses[number] = list(result.token_ids)
    return responses


class CalibrationInputs(Sequence[dict[str, Any]]):
    """Arguments of the policy's forward pass for each example with its response."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        examples: CalibrationExamples,
        responses: Sequence[Sequence[int]],
        config: Any,
        tokenizer: Any,
    ) -> None:
        from coprs_deploy.policy.vision_inputs import VisionProcessor

        self._config = checkpoint.config
        self._examples = examples
        self._responses = responses
        self._tokenizer = tokenizer
        self._image_token_id = config.image_token_id
        self._vision = VisionProcessor(checkpoint.policy_path, config)

    def __len__(self) -> int:
        return len(self._responses)

    def __getitem__(self, index: Any) -> Any:
        import torch

        example = self._examples.file.load(self._examples.used[index])
        limits = self._config.policy_image
        vision = self._vision(fit_pixel_count(example.image, limits.min_pixels, limits.max_pixels))
        prompt = encode_prompt(
            self._config.prompt, self._tokenizer, example.instruction, vision.num_tokens
        )
        ids = torch.tensor([[*prompt, *self._responses[index]]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **vision.tensors}
        if vision.marks_image_tokens:
            inputs["mm_token_type_ids"] = (ids == self._image_token_id).int()
        return inputs
