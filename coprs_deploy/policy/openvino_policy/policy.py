"""Policy in OpenVINO on the CPU: graphs, numpy and ``tokenizers``; no torch, no transformers.

Requests from several threads alternate token by token, in the order in which they came. The vision
tokens of recent images, and the keys and values of the prompt up to the instruction, are reused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.engines.openvino_runner import LATENCY, cache_settings
from coprs_deploy.errors import PolicyError, RuntimeUnavailableError
from coprs_deploy.images import RgbArray, fit_pixel_count, image_key
from coprs_deploy.policy.greedy import GreedyPolicy
from coprs_deploy.policy.openvino_policy.decoder import Decoder, DecoderRequest
from coprs_deploy.policy.openvino_policy.graphs import (
    DECODER_FILE,
    VisionTower,
    read_description,
)
from coprs_deploy.policy.openvino_policy.positions import common_prefix
from coprs_deploy.policy.openvino_policy.together import FittedImage, Prompt, answer_together
from coprs_deploy.policy.openvino_policy.tokenizer import FileTokenizer
from coprs_deploy.policy.policy import PolicyRequest, PolicyResult
from coprs_deploy.policy.policy_tokens import PolicyTokens
from coprs_deploy.prompts import PromptTemplate, encode_prompt

MAX_CACHED_PROMPTS = 3
"""Images whose vision tokens, keys and values are kept: those of two requests that alternate, and
the next one. A 3B policy needs 50 MB for each."""

SMALL_DECODER_BYTES = 100_000_000
"""Size of the decoder's weights below which decoder and vision tower run on one thread: operators
take microseconds, and beside another busy process each would wait for the slices of all threads."""


@dataclass(frozen=True)
class _CachedPrompt:
    """What is known of an image after its first request.

    Attributes:
        vision_tokens: (V, D).
        token_ids: the prompt.
        state: keys and values after the prompt.
    """

    vision_tokens: NDArray[np.float32]
    token_ids: list[int]
    state: dict[str, NDArray[np.float32]]


class OpenVinoPolicy(GreedyPolicy):
    """Qwen2.5-VL or LLaVA-1.5 policy from graphs that ``export --policy-runtime openvino`` wrote.

    Args:
        path: directory of the graphs.
        prompt: prompt template.
        min_pixels: minimum image area, in pixels.
        max_pixels: maximum image area, in pixels.
        device: ``cpu``.
        dtype: None; the precision was chosen at export.
        num_threads: CPU threads; None selects one for a decoder below 100 MB, else all cores.
        cache_dir: folder of compiled graphs, where small ones are kept; None selects the user's.
        prompt_lookup_num_tokens: length of the drafts by prompt lookup; 0 for none.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        PolicyError: the directory holds no usable graphs.
        RuntimeUnavailableError: the device is not the CPU.
        ValueError: a dtype is given.
    """

    answers_together = True

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
        cache_dir: Path | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> None:
        if device != "cpu":
            raise RuntimeUnavailableError(
                f"the policy's device is {device!r}, and the openvino policy runs on 'cpu': pass "
                "--policy-device cpu, or --policy transformers"
            )
        if dtype is not None:
            raise ValueError(
                f"policy_dtype is {dtype!r}; the openvino policy has the precision that it was "
                "exported with: leave it out, or export with another --policy-precision"
            )
        description = read_description(path)
        settings = LATENCY | description.settings
        settings |= cache_settings(_decoder_bytes(path), cache_dir)
        if num_threads is None and _decoder_bytes(path) < SMALL_DECODER_BYTES:
            num_threads = 1
        if num_threads is not None:
            settings["INFERENCE_NUM_THREADS"] = num_threads
        ends = description.end_token_ids
        self.tokens = PolicyTokens(FileTokenizer(path, ends[0] if ends else None), path, ends)
        try:
            self._vision: VisionTower | None = VisionTower(path, description, settings)
            self._decoder: Decoder | None = Decoder(path, settings)
        except (RuntimeError, OSError, ValueError) as error:
            raise PolicyError(f"{path} cannot be loaded as a policy: {error}") from error
        self._image_token_id = description.image_token_id
        self._prompt = prompt
        self.prompt_lookup_num_tokens = prompt_lookup_num_tokens
        self._pixels = (min_pixels, max_pixels)
        self._cache = _PromptCache()
        self.hidden_size = description.hidden_size
        self.description = f"openvino {description.family} on cpu, {description.precision}"

    @contextmanager
    def start(self, request: PolicyRequest) -> Iterator[_Decoding]:
        """See :meth:`GreedyPolicy.start`."""
        vision, decoder = self._graphs()
        prompt = self._prompt_of(request, self._fit(request.image, vision), vision)
        with decoder.request(remaining_s=request.remaining_s) as running:
            see = partial(vision, remaining_s=request.remaining_s)
            yield _Decoding(prompt, see, decoder, running, self._cache)

    def answer_together(
        self, requests: Sequence[PolicyRequest]
    ) -> Iterator[tuple[int, PolicyResult | Exception]]:
        """See :meth:`Policy.answer_together`."""
        vision, decoder = self._graphs()
        fitted: dict[int, FittedImage] = {}

        def prepare(request: PolicyRequest) -> Prompt:
            key = id(request.image)  # the requests hold it
            if key not in fitted:
                fitted[key] = self._fit(request.image, vision)
            return self._prompt_of(request, fitted[key], vision)

        return answer_together(self, prepare, vision, decoder, requests)

    def close(self) -> None:
        """Free the graphs; requests in progress end as usual."""
        self._vision = self._decoder = None
        self._cache.clear()

    def _graphs(self) -> tuple[VisionTower, Decoder]:
        if self._vision is None or self._decoder is None:
            raise PolicyError("the policy was closed")
        return self._vision, self._decoder

    def _fit(self, rgb: RgbArray, vision: VisionTower) -> FittedImage:
        image = fit_pixel_count(rgb, *self._pixels)
        return FittedImage(image, image_key(np.asarray(image)), vision.grid(image))

    def _prompt_of(
        self, request: PolicyRequest, fitted: FittedImage, vision: VisionTower
    ) -> Prompt:
        num_tokens = vision.num_tokens(fitted.grid)
        tokenizer = self.tokens.tokenizer
        ids = encode_prompt(self._prompt, tokenizer, request.instruction, num_tokens)
        is_image = np.asarray(ids) == self._image_token_id
        return Prompt(fitted, ids, is_image, vision.positions(is_image, fitted.grid))


def _decoder_bytes(path: Path) -> int:
    weights = (path / DECODER_FILE).with_suffix(".bin")
    return weights.stat().st_size if weights.is_file() else 0


class _PromptCache:
    """The most recently used images, by content."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[str, _CachedPrompt] = OrderedDict()
        self._lock = Lock()

    def get(self, key: str) -> _CachedPrompt | None:
        """Return what is known of an image."""
        with self._lock:
            if key in self._prompts:
                self._prompts.move_to_end(key)
            return self._prompts.get(key)

    def put(self, key: str, prompt: _CachedPrompt) -> None:
        """Keep what is known of an image instead of the least recently used one."""
        with self._lock:
            self._prompts[key] = prompt
            while len(self._prompts) > MAX_CACHED_PROMPTS:
                self._prompts.popitem(last=False)

    def clear(self) -> None:
        """Forget all images."""
        with self._lock:
            self._prompts.clear()


class _Decoding:
    """One request in progress; see :class:`~coprs_deploy.policy.greedy.Decoding`."""

    def __init__(
        self,
        prompt: Prompt,
        vision: Callable[[Image.Image], NDArray[np.float32]],
        decoder: Decoder,
        running: DecoderRequest,
        cache: _PromptCache,
    ) -> None:
        self.prompt_ids = prompt.token_ids
        self.num_cached_tokens = 0
        self._prompt = prompt
        self._vision, self._decoder, self._running = vision, decoder, running
        self._cache = cache
        self._next_position = int(prompt.positions.max()) + 1

    def prefill(self, response: Sequence[int] = ()) -> tuple[int, NDArray[np.float32]]:
        """See :meth:`Decoding.prefill`."""
        ids, key = self.prompt_ids, self._prompt.fitted.key
        known = self._cache.get(key)
        vision_tokens = (
            self._vision(self._prompt.fitted.image) if known is None else known.vision_tokens
        )
        embeddings, positions = self._prompt.with_response(
            self._decoder.embed, vision_tokens, response
        )
        self._next_position += len(response)
        if known is not None:
            self.num_cached_tokens = min(common_prefix(known.token_ids, ids), len(ids) - 1)
            self._running.restore(known.state, self.num_cached_tokens)
        new = slice(self.num_cached_tokens, None)
        (token,), hidden = self._running.feed(embeddings[new], positions[:, new], num_rows=1)
        self._decoder.weights.release()
        self._cache.put(key, _CachedPrompt(vision_tokens, ids, self._running.state()))
        return token, hidden[0]

    def feed(self, tokens: Sequence[int]) -> tuple[list[int], NDArray[np.float32]]:
        """See :meth:`Decoding.feed`."""
        positions = self._prompt.following(self._next_position, len(tokens))
        self._next_position += len(tokens)
        return self._running.feed(self._decoder.embed(tokens), positions, num_rows=len(tokens))

    def drop(self, count: int) -> None:
        """See :meth:`Decoding.drop`."""
        self._next_position -= count
        self._running.drop(count)
