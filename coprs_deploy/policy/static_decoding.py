"""Compiled decoding step of a policy in transformers, on a KV cache of fixed size.

Each operator of a decoding step of one token costs its launch: on a GPU more than its work, and on
a CPU too where the policy is small. A cache whose tensors neither grow nor move lets PyTorch
compile the step into few kernels, and on a GPU record them as one CUDA graph.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from coprs_deploy.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, StaticCache

    Step = Callable[
        [torch.nn.Module, torch.nn.Module, StaticCache, torch.Tensor, torch.Tensor],
        tuple[torch.Tensor, torch.Tensor],
    ]

MIN_CACHE_TOKENS = 512
"""Length of the shortest cache; longer ones have twice the length of the one before, so that few
steps are compiled, each in some 20 seconds."""

MAX_IDLE_CACHES = 4
"""Caches of each length that are kept for later requests."""


class StaticDecoder:
    """Reads tokens on caches of fixed size, each of which serves later requests too.

    Args:
        model: model of the policy.

    Raises:
        RuntimeUnavailableError: no C++ compiler for a step on a CPU, or an older transformers.
    """

    def __init__(self, model: Any) -> None:
        _check_available(model.device.type)
        self._model = model
        # Append and pop of a deque are atomic.
        self._idle: dict[int, deque[StaticCache]] = defaultdict(
            functools.partial(deque, maxlen=MAX_IDLE_CACHES)
        )

    @contextmanager
    def cache(self, num_tokens: int) -> Iterator[StaticCache]:
        """Lend a cache with room for ``num_tokens`` tokens for the length of the block."""
        from transformers import StaticCache

        length = MIN_CACHE_TOKENS
        while length < num_tokens:
            length *= 2
        idle = self._idle[length]
        try:
            cache = idle.pop()
        except IndexError:
            cache = StaticCache(self._model.config, max_cache_len=length)
        try:
            yield cache
        finally:
            idle.append(cache)

    def fill(self, cache: StaticCache, prefilled: DynamicCache) -> None:
        """Copy what a prefill cached."""
        cache.reset()
        for layer, source in zip(cache.layers, prefilled.layers, strict=True):
            layer.update(source.keys, source.values)

    def read(
        self, cache: StaticCache, tokens: Sequence[int], position_offset: torch.Tensor | None
    ) -> tuple[list[int], torch.Tensor]:
        """Read R tokens in one pass, which is compiled for R = 1.

        Args:
            cache: cache of the request, with room for them.
            tokens: the tokens.
            position_offset: text positions minus numbers of tokens before them, (1, 1); None for 0.

        Returns:
            Most likely next token after each, and their (R, D) post-norm hidden states.
        """
        import torch

        device = self._model.device
        if position_offset is None:
            position_offset = torch.zeros(1, 1, dtype=torch.int64, device=device)
        step = _compiled_step(device.type) if len(tokens) == 1 else _step
        following, hidden = step(
            self._model.model.language_model,
            self._model.get_output_embeddings(),
            cache,
            torch.tensor([list(tokens)], device=device),
            position_offset,
        )
        return following.tolist(), hidden

    def drop(self, cache: StaticCache, count: int) -> None:
        """Forget the last tokens; the next ones overwrite them."""
        for layer in cache.layers:
            layer.cumulative_length.sub_(count)


def _check_available(device_type: str) -> None:
    import torch
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from transformers import StaticLayer, __version__

    if not isinstance(getattr(StaticLayer(1), "cumulative_length", None), torch.Tensor):
        raise RuntimeUnavailableError(
            "static_decoding needs a transformers whose StaticLayer counts its tokens in a tensor; "
            f"installed: {__version__}; pip install -U transformers, or leave it out"
        )
    try:
        if device_type == "cpu":
            get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeUnavailableError(
            "static_decoding compiles the policy's decoding step, and no C++ compiler is found; "
            "install one (apt-get install g++), name it in the environment variable CXX, or leave "
            "static_decoding out"
        ) from error


@functools.cache
def _compiled_step(device_type: str) -> Step:
    import torch

    mode = "reduce-overhead" if device_type == "cuda" else "default"
    step: Step = torch.compile(_step, dynamic=False, fullgraph=True, mode=mode)
    return step


def _step(
    language_model: torch.nn.Module,
    head: torch.nn.Module,
    cache: StaticCache,
    ids: torch.Tensor,
    offset: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most likely next tokens (R,) and post-norm hidden states (R, D) of ids (1, R)."""
    import torch

    columns = torch.arange(cache.layers[0].max_cache_len, device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device) + cache.get_seq_length()
    output = language_model(
        input_ids=ids,
        position_ids=places + offset,
        attention_mask=(columns <= places[:, None])[None, None],
        past_key_values=cache,
        use_cache=True,
    )
    hidden = output.last_hidden_state[0]
    return head(hidden).argmax(-1), hidden
