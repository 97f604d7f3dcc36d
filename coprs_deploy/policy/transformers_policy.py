"""Policy in transformers: greedy decoding with a KV cache, one request at a time.

The hidden state of ``<REF_POS>`` is the post-norm output at the position where the token is the
*input*. The cached step after its emission computes it, so the prompt is read only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.errors import PolicyError, import_failure, install_hint
from coprs_deploy.images import fit_pixel_count
from coprs_deploy.policy.compressed_weights import check_readable, unpack_weights
from coprs_deploy.policy.fair_lock import FairLock
from coprs_deploy.policy.greedy import GreedyPolicy
from coprs_deploy.policy.policy import PolicyRequest
from coprs_deploy.policy.policy_dtype import choose_dtype
from coprs_deploy.policy.policy_tokens import PolicyTokens
from coprs_deploy.policy.progress_bars import without_progress_bars
from coprs_deploy.policy.static_decoding import StaticDecoder
from coprs_deploy.policy.torch_settings import require_device, torch_threads
from coprs_deploy.policy.vision_inputs import VisionInputs, VisionProcessor
from coprs_deploy.prompts import PromptTemplate, encode_prompt

if TYPE_CHECKING:
    import torch
    from transformers import StaticCache


SMALL_POLICY = 10_000_000
"""Number of parameters below which a policy runs on one thread. Its operators take microseconds:
threads gain little, and beside another busy process each operator waits for their time slices."""


class TransformersPolicy(GreedyPolicy):
    """Qwen2.5-VL or LLaVA-1.5 policy from a transformers directory.

    Requests from several threads alternate token by token, in the order in which they came: a
    stream that is not read blocks no other.

    Args:
        path: policy directory of a checkpoint or a bundle.
        prompt: prompt template.
        min_pixels, max_pixels: limits of the image area, in pixels.
        device: torch device.
        dtype: torch dtype of the weights; None leaves it to :func:`.policy_dtype.choose_dtype`.
        num_threads: CPU threads per operator; None selects one for a policy of less than
            :data:`SMALL_POLICY` parameters, else PyTorch's own number.
        prompt_lookup_num_tokens: length of the drafts by prompt lookup; 0 for none.
        static_decoding: whether the decoding step is compiled, on a KV cache of fixed size.

    Raises:
        MissingDependencyError: torch or transformers is not installed, or compressed-tensors for a
            quantized policy.
        RuntimeUnavailableError: the device does not exist, or the step cannot be compiled here.
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
        prompt_lookup_num_tokens: int = 0,
        static_decoding: bool = False,
    ) -> None:
        try:
            from safetensors import SafetensorError
            from transformers import AutoModelForImageTextToText
        except ImportError as error:
            raise import_failure(
                error, "", install_hint("torch"), needed_by="the transformers policy"
            ) from error
        require_device(device)
        check_readable(path)
        chosen = choose_dtype(path, device, dtype)
        try:
            with without_progress_bars():
                model = AutoModelForImageTextToText.from_pretrained(
                    path, dtype=chosen.dtype, local_files_only=True
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise PolicyError(f"{path} cannot be loaded as a policy: {error}") from error
        unpack_weights(model)
        self.tokens = PolicyTokens.from_directory(path, model.generation_config.eos_token_id)
        self._model = model.to(device).requires_grad_(False).eval()
        self._vision = VisionProcessor(path, model.config)
        self._prompt = prompt
        self.prompt_lookup_num_tokens = prompt_lookup_num_tokens
        self._pixels = (min_pixels, max_pixels)
        self._lock = FairLock()
        if num_threads is None and model.num_parameters() < SMALL_POLICY:
            num_threads = 1
        self._num_threads = num_threads
        self._static = StaticDecoder(self._model) if static_decoding else None
        self.hidden_size = int(model.get_output_embeddings().weight.shape[1])
        self.description = f"transformers {model.config.model_type} on {device}, {chosen}"

    @contextmanager
    def start(self, request: PolicyRequest) -> Iterator[_Decoding]:
        """See :meth:`GreedyPolicy.start`."""
        if self._model is None:
            raise PolicyError("the policy was closed")
        vision = self._vision(fit_pixel_count(request.image, *self._pixels))
        prompt_ids = encode_prompt(
            self._prompt, self.tokens.tokenizer, request.instruction, vision.num_tokens
        )
        turn = partial(self._lock.hold, request.remaining_s)
        decoding = (self._model, turn, self._num_threads, prompt_ids, vision)
        if self._static is None:
            yield _Decoding(*decoding)
            return
        num_tokens = len(prompt_ids) + (request.max_new_tokens or self._prompt.max_response_tokens)
        with self._static.cache(num_tokens) as cache:
            yield _StaticDecoding(self._static, cache, *decoding)

    @property
    def decoder_layers(self) -> Iterable[torch.nn.Module]:
        """Layers of the decoder, to observe them."""
        layers: Iterable[torch.nn.Module] = self._model.model.language_model.layers
        return layers

    def close(self) -> None:
        """Release the model; requests in progress end as usual."""
        self._model = self._static = None


class _Decoding:
    """One request in progress; see :class:`~coprs_deploy.policy.greedy.Decoding`."""

    num_cached_tokens = 0

    def __init__(
        self,
        model: Any,
        turn: Callable[[], AbstractContextManager[None]],
        num_threads: int | None,
        prompt_ids: list[int],
        vision: VisionInputs,
    ) -> None:
        self._model = model
        self._turn = turn
        self._num_threads = num_threads
        self._vision = vision
        self.prompt_ids = prompt_ids

    def prefill(self, response: Sequence[int] = ()) -> tuple[int, NDArray[np.float32]]:
        """See :meth:`Decoding.prefill`."""
        hidden = self.read([*self.prompt_ids, *response])[0, -1:]
        return self._next_tokens(hidden)[0], _array(hidden)[0]

    def read(self, ids: list[int]) -> torch.Tensor:
        """Read tokens, the prompt first; return their post-norm hidden states (1, L, D)."""
        import torch
        from transformers import DynamicCache

        device = self._model.device
        input_ids = torch.tensor([ids], device=device)
        inputs = {
            name: t.to(device, self._model.dtype if t.is_floating_point() else t.dtype)
            for name, t in self._vision.tensors.items()
        }
        if self._vision.marks_image_tokens:
            image_id = self._model.config.image_token_id
            inputs["mm_token_type_ids"] = (input_ids == image_id).int()
        with self._turn(), torch_threads(self._num_threads), torch.inference_mode():
            output = self._model.model(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=DynamicCache(config=self._model.config),
                use_cache=True,
                **inputs,
            )
            # Qwen2.5-VL's offset of the text positions after an image is stored on the model, where
            # the next request overwrites it; each step restores it.
            self._position_offsets = getattr(self._model.model, "rope_deltas", None)
        self._cache = output.past_key_values
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def feed(self, tokens: Sequence[int]) -> tuple[list[int], NDArray[np.float32]]:
        """See :meth:`Decoding.feed`."""
        import torch

        with self._turn(), torch_threads(self._num_threads), torch.inference_mode():
            if self._position_offsets is not None:
                self._model.model.rope_deltas = self._position_offsets
            output = self._model.model(
                input_ids=torch.tensor([list(tokens)], device=self._model.device),
                past_key_values=self._cache,
                use_cache=True,
            )
        hidden = output.last_hidden_state[0]
        return self._next_tokens(hidden), _array(hidden)

    def drop(self, count: int) -> None:
        """See :meth:`Decoding.drop`."""
        self._cache.crop(-count)

    def _next_tokens(self, hidden: torch.Tensor) -> list[int]:
        """Return the most likely token after each of (R, D) hidden states."""
        import torch

        with torch_threads(self._num_threads), torch.inference_mode():
            tokens: list[int] = self._model.get_output_embeddings()(hidden).argmax(-1).tolist()
        return tokens


class _StaticDecoding(_Decoding):
    """One request in progress, on a KV cache of fixed size after the prefill."""

    def __init__(self, decoder: StaticDecoder, cache: StaticCache, *decoding: Any) -> None:
        super().__init__(*decoding)
        self._decoder, self._static_cache = decoder, cache

    def read(self, ids: list[int]) -> torch.Tensor:
        """Read tokens, the prompt first; return their post-norm hidden states (1, L, D)."""
        import torch

        hidden = super().read(ids)
        with torch.inference_mode():
            self._decoder.fill(self._static_cache, self._cache)
        self._cache = None
        return hidden

    def feed(self, tokens: Sequence[int]) -> tuple[list[int], NDArray[np.float32]]:
        """See :meth:`Decoding.feed`."""
        import torch

        with self._turn(), torch_threads(self._num_threads), torch.inference_mode():
            following, hidden = self._decoder.read(
                self._static_cache, tokens, self._position_offsets
            )
            return following, _array(hidden)

    def drop(self, count: int) -> None:
        """See :meth:`Decoding.drop`."""
        self._decoder.drop(self._static_cache, count)


def _array(hidden: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = hidden.float().cpu().numpy()
    return array
