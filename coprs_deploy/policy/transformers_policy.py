"""Policy in transformers: greedy decoding with a KV cache, one request at a time.

The hidden state of ``<REF_POS>`` is the post-norm output at the position where the token is the
*input*. The cached step after its emission computes it, so the prompt is read only once.
"""

from __future__ import annotations

import threading
import time
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
from coprs_deploy.policy.policy_dtype import choose_dtype
from coprs_deploy.policy.policy_tokens import PolicyTokens, TextStream
from coprs_deploy.policy.progress_bars import without_progress_bars
from coprs_deploy.policy.torch_settings import require_device, torch_threads
from coprs_deploy.policy.vision_inputs import VisionInputs, VisionProcessor
from coprs_deploy.prompts import PromptTemplate, encode_prompt

if TYPE_CHECKING:
    import torch


SMALL_POLICY = 10_000_000
"""Number of parameters below which a policy runs on one thread. Its operators take microseconds:
threads gain little, and beside another busy process each operator waits for their time slices."""


class TransformersPolicy(Policy):
    """Qwen2.5-VL or LLaVA-1.5 policy from a transformers directory.

    Requests from several threads alternate token by token: a stream that is not read blocks no
    other.

    Args:
        path: policy directory of a checkpoint or a bundle.
        prompt: prompt template.
        min_pixels, max_pixels: limits of the image area, in pixels.
        device: torch device.
        dtype: torch dtype of the weights; None leaves it to :func:`.policy_dtype.choose_dtype`.
        num_threads: CPU threads per operator; None selects one for a policy of less than
            :data:`SMALL_POLICY` parameters, else PyTorch's own number.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        RuntimeUnavailableError: the device does not exist.
        PolicyError: the directory cannot be loaded as a policy.
        ValueError: the dtype is unknown.
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
        num_threads: int | None = None,
    ) -> None:
        try:
            from safetensors import SafetensorError
            from transformers import AutoModelForImageTextToText
        except ImportError as error:
            raise MissingDependencyError(
                f"the transformers policy needs {error.name}; pip install torch transformers"
            ) from error
        require_device(device)
        chosen = choose_dtype(path, device, dtype)
        try:
            with without_progress_bars():
                model = AutoModelForImageTextToText.from_pretrained(
                    path, dtype=chosen.dtype, local_files_only=True
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise PolicyError(f"{path} cannot be loaded as a policy: {error}") from error
        self._tokens = PolicyTokens(path, model.generation_config.eos_token_id)
        self._model = model.to(device).requires_grad_(False).eval()
        self._vision = VisionProcessor(path, model.config)
        self._prompt = prompt
        self._pixels = (min_pixels, max_pixels)
        self._lock = threading.Lock()
        if num_threads is None and model.num_parameters() < SMALL_POLICY:
            num_threads = 1
        self._num_threads = num_threads
        self.hidden_size = int(model.get_output_embeddings().weight.shape[1])
        self.description = f"transformers {model.config.model_type} on {device}, {chosen}"

    def stream(self, request: PolicyRequest) -> PolicyStream:
        """See :meth:`Policy.stream`."""
        import torch

        received = time.perf_counter()
        vision = self._vision(fit_pixel_count(request.image, *self._pixels))
        preprocess_ms = 1e3 * (time.perf_counter() - received)
        prompt_ids = encode_prompt(
            self._prompt, self._tokens.tokenizer, request.instruction, vision.num_tokens
        )
        budget = request.max_new_tokens or self._prompt.max_response_tokens
        text_stream = TextStream(self._tokens)
        token_ids: list[int] = []
        concentrations: list[torch.Tensor] = []
        stop: StopReason | None = None
        start = time.perf_counter()
        hidden, cache, offsets = self._prefill(prompt_ids, vision)
        token = self._next_token(hidden[:, -1])
        first_token = time.perf_counter()
        while stop is None:
            request.remaining_s()
            token_ids.append(token)
            if token in self._tokens.end_ids:
                stop = StopReason.END_OF_TEXT
                break
            is_reference = token == self._tokens.reference_id
            if text := text_stream.add(token):
                yield TextDelta(text)
            if len(token_ids) >= budget:
                stop = StopReason.TOKEN_BUDGET
                if not is_reference:
                    break
            hidden = self._step(token, cache, offsets)
            if is_reference:
                concentrations.append(hidden)
                if len(concentrations) == request.max_targets:
                    stop = StopReason.TARGETS_REACHED
            if stop is None:
                token = self._next_token(hidden)
        end = time.perf_counter()
        response = self._tokens.read(token_ids)
        if stop is StopReason.TOKEN_BUDGET and (text := text_stream.rest(response)):
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
            prefill_ms=1e3 * (first_token - start),
            decode_ms=1e3 * (end - first_token),
            preprocess_ms=preprocess_ms,
        )

    def _prefill(self, ids: list[int], vision: VisionInputs) -> tuple[torch.Tensor, Any, Any]:
        """Read a prompt; return its post-norm hidden states (1, L, D), cache and offsets.

        The offsets are those of Qwen2.5-VL's text positions after an image. transformers stores
        them on the model, where the next request overwrites them; each step restores them.
        """
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
        with self._lock, torch_threads(self._num_threads), torch.inference_mode():
            output = self._model.model(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=DynamicCache(config=self._model.config),
                use_cache=True,
                **inputs,
            )
            offsets = getattr(self._model.model, "rope_deltas", None)
        return output.last_hidden_state, output.past_key_values, offsets

    def _step(self, token: int, cache: Any, offsets: Any) -> torch.Tensor:
        """Feed one token; return its post-norm hidden state (1, D)."""
        import torch

        with self._lock, torch_threads(self._num_threads), torch.inference_mode():
            if offsets is not None:
                self._model.model.rope_deltas = offsets
            output = self._model.model(
                input_ids=torch.tensor([[token]], device=self._model.device),
                past_key_values=cache,
                use_cache=True,
            )
        hidden: torch.Tensor = output.last_hidden_state[:, -1]
        return hidden

    def _next_token(self, hidden: torch.Tensor) -> int:
        """Return the most likely token after a hidden state (1, D)."""
        import torch

        with torch_threads(self._num_threads), torch.inference_mode():
            return int(self._model.get_output_embeddings()(hidden).argmax())

    def close(self) -> None:
        """Release the model."""
        self._model = None
