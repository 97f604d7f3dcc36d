"""The policy in transformers: greedy decoding with a KV cache, one request at a time.

The hidden state of ``<REF_POS>`` is taken where the token is *fed*, after the final norm: the
cached step that follows its emission gives it, so one pass over the prompt is enough.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coprs_deploy.errors import MissingDependencyError, PolicyError
from coprs_deploy.images import fit_pixel_count
from coprs_deploy.policy.policy import (
    Policy,
    PolicyRequest,
    PolicyResult,
    PolicyStream,
    StopReason,
    TextDelta,
)
from coprs_deploy.policy.policy_tokens import PolicyTokens, WrittenText
from coprs_deploy.policy.progress_bars import without_progress_bars
from coprs_deploy.policy.vision_inputs import VisionInputs, VisionProcessor
from coprs_deploy.prompts import PromptTemplate, encode_prompt

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Memory:
    """What a request keeps between its steps.

    Attributes:
        cache: keys and values of all tokens so far.
        position_offsets: Qwen2.5-VL's offset of text positions behind an image. transformers keeps
            it on the model, where the next request overwrites it, so each request brings its own.
    """

    cache: Any
    position_offsets: Any


class TransformersPolicy(Policy):
    """A Qwen2.5-VL or LLaVA-1.5 policy from a transformers directory.

    Requests from several threads take turns, a token at a time: a stream that nobody reads holds
    up no other.

    Args:
        path: the policy directory of a checkpoint or a bundle.
        prompt: its prompt template.
        min_pixels: smallest image area that it sees.
        max_pixels: largest image area that it sees.
        device: where it runs, as torch names it.
        dtype: of its weights, as torch names it (``float32``, ``bfloat16``); None keeps the stored
            one.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        PolicyError: the directory is not a policy that can be used.
    """

    def __init__(
        self,
        path: Path,
        prompt: PromptTemplate,
        min_pixels: int,
        max_pixels: int,
        *,
        device: str = "cpu",
        dtype: str | None = None,
    ) -> None:
        try:
            import torch
            from safetensors import SafetensorError
            from transformers import AutoModelForImageTextToText
        except ImportError as error:
            raise MissingDependencyError(
                f"the transformers policy needs {error.name}; pip install torch transformers"
            ) from error
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; accepted: float32, bfloat16, float16 or None")
        try:
            with without_progress_bars():
                model = AutoModelForImageTextToText.from_pretrained(
                    path, dtype=dtype or "auto", local_files_only=True
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise PolicyError(f"{path} cannot be loaded as a policy: {error}") from error
        self._tokens = PolicyTokens(path, model.generation_config.eos_token_id)
        self._model = model.to(device).requires_grad_(False).eval()
        self._vision = VisionProcessor(path, model.config)
        self._prompt = prompt
        self._pixels = (min_pixels, max_pixels)
        self._lock = threading.Lock()
        self.hidden_size = int(model.get_output_embeddings().weight.shape[1])
        self.description = f"transformers {model.config.model_type} on {device}, {model.dtype}"

    def stream(self, request: PolicyRequest) -> PolicyStream:
        """See :meth:`Policy.stream`."""
        import torch

        asked = time.perf_counter()
        vision = self._vision(fit_pixel_count(request.rgb, *self._pixels))
        image_ms = 1e3 * (time.perf_counter() - asked)
        prompt_ids = encode_prompt(
            self._prompt, self._tokens.tokenizer, request.instruction, vision.num_tokens
        )
        budget = request.max_new_tokens or self._prompt.max_response_tokens
        written = WrittenText(self._tokens)
        token_ids: list[int] = []
        concentrations: list[torch.Tensor] = []
        stop: StopReason | None = None
        start = time.perf_counter()
        hidden, memory = self._prefill(prompt_ids, vision)
        token = self._next_token(hidden)
        first = time.perf_counter()
        while stop is None:
            request.remaining_s()
            token_ids.append(token)
            if token in self._tokens.end_ids:
                stop = StopReason.END_OF_TEXT
                break
            is_reference = token == self._tokens.reference_id
            if text := written.add(token):
                yield TextDelta(text)
            if len(token_ids) >= budget:
                stop = StopReason.TOKEN_BUDGET
                if not is_reference:
                    break
            hidden = self._step(token, memory)
            if is_reference:
                concentrations.append(hidden)
                if len(concentrations) == request.targets:
                    stop = StopReason.TARGETS_REACHED
            if stop is None:
                token = self._next_token(hidden)
        end = time.perf_counter()
        response = self._tokens.read(token_ids)
        if stop is StopReason.TOKEN_BUDGET and (text := written.rest(response)):
            yield TextDelta(text)
        yield PolicyResult(
            response=response,
            concentrations=(
                torch.cat(concentrations).float().cpu().numpy()
                if concentrations
                else np.zeros((0, self.hidden_size), dtype=np.float32)
            ),
            stop_reason=stop,
            token_ids=tuple(token_ids),
            num_prompt_tokens=len(prompt_ids),
            prefill_ms=1e3 * (first - start),
            decode_ms=1e3 * (end - first),
            image_ms=image_ms,
        )

    def hidden_states(self, request: PolicyRequest, token_ids: tuple[int, ...]) -> torch.Tensor:
        """Read prompt and response in one uncached forward pass.

        The slow reference for what :meth:`stream` collects step by step, and for training.

        Returns:
            (len(token_ids), D) post-norm hidden states at the response's tokens.
        """
        vision = self._vision(fit_pixel_count(request.rgb, *self._pixels))
        prompt_ids = encode_prompt(
            self._prompt, self._tokens.tokenizer, request.instruction, vision.num_tokens
        )
        hidden, _ = self._prefill([*prompt_ids, *token_ids], vision)
        return hidden[0, len(prompt_ids) :]

    def _prefill(self, ids: list[int], vision: VisionInputs) -> tuple[torch.Tensor, _Memory]:
        """Read a prompt: post-norm hidden states (1, L, D) and what the next step needs."""
        import torch
        from transformers import DynamicCache

        device = self._model.device
        input_ids = torch.tensor([ids], device=device)
        inputs = {
            name: t.to(device, self._model.dtype if t.is_floating_point() else t.dtype)
            for name, t in vision.tensors.items()
        }
        if vision.marks_image_tokens:
            image_id = self._model.config.image_token_id
            inputs["mm_token_type_ids"] = (input_ids == image_id).int()
        with self._lock, torch.inference_mode():
            output = self._model.model(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=DynamicCache(config=self._model.config),
                use_cache=True,
                **inputs,
            )
            offsets = getattr(self._model.model, "rope_deltas", None)
        return output.last_hidden_state, _Memory(output.past_key_values, offsets)

    def _step(self, token: int, memory: _Memory) -> torch.Tensor:
        """Feed one token; its post-norm hidden state, (1, D)."""
        import torch

        with self._lock, torch.inference_mode():
            if memory.position_offsets is not None:
                self._model.model.rope_deltas = memory.position_offsets
            output = self._model.model(
                input_ids=torch.tensor([[token]], device=self._model.device),
                past_key_values=memory.cache,
                use_cache=True,
            )
        state: torch.Tensor = output.last_hidden_state[:, -1]
        return state

    def _next_token(self, hidden: torch.Tensor) -> int:
        """Choose the most likely token after the last state of (1, L, D) or (1, D)."""
        import torch

        with torch.inference_mode():
            last = hidden.reshape(-1, hidden.shape[-1])[-1:]
            return int(self._model.get_output_embeddings()(last).argmax())

    def close(self) -> None:
        """Free the model."""
        self._model = None
