"""Policy in vLLM: continuous batching, hidden states captured in the decoding pass.

The engine runs in processes that vLLM starts; its event loop runs in a thread
(:class:`.engine.EngineThread`), so that any thread may send requests. :mod:`.capture` describes how
a concentration is captured inside the engine.
"""

from __future__ import annotations

import atexit
import os
import queue
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from coprs_deploy.errors import HiddenStateError, PolicyError
from coprs_deploy.images import fit_pixel_count, image_key
from coprs_deploy.policy.known_text import KnownText
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
from coprs_deploy.policy.reasoning_limit import RunningEstimate
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.policy.vllm_policy.engine import (
    ARCHITECTURES,
    EngineThread,
    engine_environment,
    import_vllm,
    register_architectures,
    visible_device,
)
from coprs_deploy.policy.vllm_policy.limited import stream_limited
from coprs_deploy.policy.vllm_policy.quantized import check_processor
from coprs_deploy.policy.vllm_policy.settings import (
    GIB,
    VllmSettings,
    device_memory,
    kv_bytes_per_token,
    memory_arguments,
)
from coprs_deploy.policy.vllm_policy.transport import HiddenStateTransport
from coprs_deploy.prompts import PromptTemplate, encode_prompt

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_Events: TypeAlias = "queue.SimpleQueue[list[int] | NDArray[np.float32] | BaseException]"


@dataclass
class EngineRequest:
    """Request as engine inputs, and its progress in the engine.

    ``path`` is the file of its hidden states. ``events`` are lists of new tokens, then the hidden
    states or an error. ``first_token`` is a value of ``time.perf_counter()``.
    """

    prompt: Any
    params: Any
    path: Path
    num_prompt_tokens: int
    token_budget: int
    preprocess_ms: float
    events: _Events = field(default_factory=queue.SimpleQueue)
    token_ids: list[int] = field(default_factory=list)
    first_token: float = 0.0
    queue_ms: float = 0.0
    num_cached_tokens: int = 0

    def next_event(self, request: PolicyRequest) -> list[int] | NDArray[np.float32]:
        """Wait for the next event until the deadline of the request; raise it if it is an error."""
        while True:
            try:
                event = self.events.get(timeout=request.remaining_s())
            except queue.Empty:
                continue  # remaining_s raises
            if isinstance(event, BaseException):
                raise event
            return event


class VllmPolicy(Policy):
    """Qwen2.5-VL or LLaVA-1.5 policy in a vLLM engine.

    vLLM spawns processes that import the main script again, so a script must create the policy
    under ``if __name__ == "__main__":``.

    Args:
        path: policy directory of a checkpoint or a bundle; a quantized one (AWQ, GPTQ, FP8) is
            loaded as its own configuration says.
        prompt: prompt template.
        min_pixels, max_pixels: limits of the image area, in pixels.
        device: ``cpu``, ``cuda`` or ``cuda:N``; the installed vLLM must be built for it.
        dtype: torch dtype of the weights; None leaves it to :func:`.policy_dtype.choose_dtype`.
        settings: settings of the engine.
        memory_is_ready: future to wait for before the free memory is measured, so that graphs on
            the same GPU are loaded by then; None measures at once.

    Attributes:
        num_preemptions: number of times a request lost its memory to another one and restarted.
        tokens: tokenizer and special tokens.
        tail_time: durations of the request that continues a response with its tail.

    Raises:
        MissingDependencyError: vLLM is not installed.
        RuntimeUnavailableError: the device does not exist, or too little of its memory is free.
        PolicyError: the directory cannot be loaded as a policy, the processor lacks instructions
            for its quantized weights, or the engine does not start.
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
        settings: VllmSettings | None = None,
        memory_is_ready: Future[None] | None = None,
    ) -> None:
        settings = settings or VllmSettings()
        device_type, _, index = device.partition(":")
        self._prompt = prompt
        self._pixels = (min_pixels, max_pixels)
        self.num_preemptions = 0
        self.tail_time = RunningEstimate()
        self.concurrency = settings.max_num_seqs
        with engine_environment(settings.num_threads):
            vllm = import_vllm(device_type)
            config = self._read_directory(path.resolve())
            if device_type == "cpu":
                check_processor(path)
            if memory_is_ready is not None:
                memory_is_ready.result()
            # Four bytes a value, whatever the dtype: an upper limit.
            needed = kv_bytes_per_token(config.get_text_config(), 4) * self._max_length
            memory = memory_arguments(
                settings, device_type, device_memory(device), needed * settings.max_num_seqs
            )
            chosen = choose_dtype(path, device, dtype)
            arguments = self._engine_arguments(path.resolve(), config.model_type, chosen.dtype)
            arguments |= settings.engine_arguments(device_type) | memory
            with visible_device(device_type, index):
                self._start(arguments)
        settings_in_use = _describe(self._open_engine().engine.vllm_config, memory, chosen.reason)
        library = f"vllm {vllm.__version__} {config.model_type} on {device}"
        self.description = ", ".join([library, *settings_in_use])

    def _read_directory(self, path: Path) -> Any:
        """Read all but the weights of a policy directory; return its transformers config."""
        from transformers import AutoConfig, GenerationConfig

        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            generation = GenerationConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise PolicyError(f"{path} cannot be loaded as a policy: {error}") from error
        self._vision = VisionProcessor(path, config)
        self.tokens = PolicyTokens.from_directory(path, generation.eos_token_id)
        self._image_id = config.image_token_id
        text = config.get_text_config()
        self.hidden_size = int(text.hidden_size)
        self._max_length = min(
            self._prompt.max_prompt_tokens + self._prompt.max_response_tokens + 1,
            int(text.max_position_embeddings),
        )
        # A response has at least one token, and one more is read.
        most = min(self._prompt.max_prompt_tokens, self._max_length - 2)
        self._prompt = msgspec.structs.replace(self._prompt, max_prompt_tokens=most)
        return config

    def _engine_arguments(self, path: Path, model_type: str, dtype: str) -> dict[str, Any]:
        """Return vLLM's engine arguments that do not come from the settings."""
        register_architectures()
        return {
            "model": str(path),
            "dtype": dtype,
            "max_model_len": self._max_length,
            "hf_overrides": {"architectures": [ARCHITECTURES[model_type]]},
            "generation_config": "vllm",
            "limit_mm_per_prompt": {"image": 1},
            "mm_device_do_normalize": False,  # VisionProcessor normalizes
            "seed": 0,
            "disable_log_stats": True,
            "enable_log_requests": False,
            "logits_processors": self._logits_processors(),
        }

    @staticmethod
    def _logits_processors() -> list[type]:
        """Return the logits processor that captures hidden states."""
        from coprs_deploy.policy.vllm_policy.capture import HiddenStateCapture

        return [HiddenStateCapture]

    def _start(self, arguments: dict[str, Any]) -> None:
        """Start the engine and the hidden-state transport."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        engine_args = AsyncEngineArgs(**arguments)
        self._process = os.getpid()
        self._engine: EngineThread | None = None
        self._transport = HiddenStateTransport(self.hidden_size)
        atexit.register(self.close)  # an unclosed policy leaves no process and no file behind
        try:
            self._engine = EngineThread(engine_args)
        except BaseException as error:
            self.close()
            if not isinstance(error, (RuntimeError, ValueError, OSError)):
                raise
            raise PolicyError(
                f"the vLLM engine did not start: {error}. Set VLLM_LOGGING_LEVEL=INFO to see why; "
                'a script must start it under `if __name__ == "__main__":`'
            ) from error

    def stream(self, request: PolicyRequest) -> PolicyStream:
        """See :meth:`Policy.stream`.

        Raises:
            HiddenStateError: the engine returned fewer or more hidden states than ``<REF_POS>``.
        """
        if request.forces_answer:
            yield from stream_limited(self, request)
            return
        start = time.perf_counter()
        text_stream = TextStream(self.tokens)
        with self.running(request) as running:
            while not isinstance(event := running.next_event(request), np.ndarray):
                for token in event:
                    if token not in self.tokens.end_ids and (text := text_stream.add(token)):
                        yield TextDelta(text)
        end = time.perf_counter()
        token_ids = running.token_ids  # the last is an end token, written or forced
        stop_reason = StopReason.END_OF_TEXT
        if token_ids.count(self.tokens.reference_id) >= request.max_targets:
            stop_reason = StopReason.TARGETS_REACHED
        elif len(token_ids) > running.token_budget:
            stop_reason = StopReason.TOKEN_BUDGET
        if stop_reason is not StopReason.END_OF_TEXT:
            token_ids.pop()  # the forced end
        response = self.tokens.read(token_ids)
        if stop_reason is StopReason.TOKEN_BUDGET and (text := text_stream.rest(response)):
            yield TextDelta(text)
        if len(event) != len(response.reference_positions):
            raise HiddenStateError(
                f"{self.description} wrote {len(response.reference_positions)} <REF_POS> and "
                f"returned {len(event)} hidden states; its reasoning was: {response.reasoning}",
                response.reasoning,
            )
        waiting_ms = running.queue_ms + running.preprocess_ms
        yield PolicyResult(
            response=response,
            concentrations=event,
            stop_reason=stop_reason,
            token_ids=tuple(token_ids),
            num_prompt_tokens=running.num_prompt_tokens,
            num_cached_tokens=running.num_cached_tokens,
            queue_ms=running.queue_ms,
            preprocess_ms=running.preprocess_ms,
            prefill_ms=max(0.0, 1e3 * (running.first_token - start) - waiting_ms),
            decode_ms=1e3 * (end - running.first_token),
        )

    @contextmanager
    def running(
        self, request: PolicyRequest, response: Sequence[int] = ()
    ) -> Iterator[EngineRequest]:
        """Run a request in the engine inside the block.

        Args:
            request: the request.
            response: beginning of the response, up to and including its first ``<REF_POS>``; what
                the engine has read of it before is in its prefix cache.
        """
        engine = self._open_engine()
        with self._transport.for_request() as path:
            running = self._encode(request, path, response)
            task = engine.submit(self._decode(engine.engine, running))
            # Also of a task that is cancelled before it begins. Behind a result no one reads it.
            closed = PolicyError("the policy was closed during the request")
            task.add_done_callback(lambda _: running.events.put(closed))
            try:
                yield running
            finally:
                task.cancel()  # no effect on a request that has ended

    def _open_engine(self) -> EngineThread:
        if self._engine is None:
            raise PolicyError("the policy was closed")
        return self._engine

    def _encode(
        self, request: PolicyRequest, path: Path, response: Sequence[int] = ()
    ) -> EngineRequest:
        """Encode a request as engine inputs; the engine writes its hidden states to ``path``."""
        start = time.perf_counter()
        image = fit_pixel_count(request.image, *self._pixels)
        key = image_key(np.asarray(image))
        preprocess_ms = 1e3 * (time.perf_counter() - start)
        num_image_tokens = self._vision.num_tokens(image.width, image.height)
        ids = encode_prompt(
            self._prompt, self.tokens.tokenizer, request.instruction, num_image_tokens
        )
        available = self._max_length - len(ids) - 1
        budget = min(request.max_new_tokens or self.max_response_tokens, available)
        budget -= len(response)
        first = ids.index(self._image_id)
        prompt = {
            # vLLM itself repeats the placeholder for each vision token.
            "prompt_token_ids": [
                *ids[: first + 1],
                *ids[first + num_image_tokens :],
                *response,
            ],
            "multi_modal_data": {"image": image},
            "multi_modal_uuids": {"image": [key]},
        }
        params = self._sampling_params(
            path, request.max_targets, max(budget, 0), continues_reference=bool(response)
        )
        return EngineRequest(prompt, params, path, len(ids), budget, preprocess_ms)

    def _sampling_params(
        self, path: Path, max_targets: int, token_budget: int, *, continues_reference: bool
    ) -> Any:
        """Return parameters for greedy decoding with hidden-state capture."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from coprs_deploy.policy.vllm_policy.capture import CaptureRequest

        capture = CaptureRequest(
            path=str(path),
            reference_id=self.tokens.reference_id,
            stop_id=min(self.tokens.end_ids),
            max_targets=max_targets,
            token_budget=token_budget,
            continues_reference=continues_reference,
        )
        return SamplingParams(
            temperature=0.0,
            max_tokens=token_budget + 1,
            stop_token_ids=sorted(self.tokens.end_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=capture.extra_args(),
        )

    async def _decode(self, engine: AsyncLLM, running: EngineRequest) -> None:
        """Run one request in the engine's event loop and put its events into its queue."""
        try:
            async for token_ids in self._new_tokens(engine, running):
                running.events.put(token_ids)
            running.events.put(self._transport.take(running.path))
        except Exception as error:
            failure = PolicyError(f"{self.description} failed on the request: {error}")
            failure.__cause__ = error
            running.events.put(failure)

    async def _new_tokens(
        self, engine: AsyncLLM, running: EngineRequest
    ) -> AsyncIterator[list[int]]:
        outputs = engine.generate(running.prompt, running.params, running.path.name)
        async for output in outputs:
            (completion,) = output.outputs
            token_ids = list(completion.token_ids)
            if not running.token_ids:
                running.first_token = time.perf_counter()
                running.num_cached_tokens = output.num_cached_tokens or 0
                if output.metrics is not None:
                    # Both are readings of the engine's own clock.
                    waited = output.metrics.scheduled_ts - output.metrics.queued_ts
                    running.queue_ms = max(0.0, 1e3 * waited)
            running.token_ids.extend(token_ids)
            if output.finished and output.metrics is not None:
                self.num_preemptions += output.metrics.num_preemptions
            yield token_ids
            if completion.finish_reason not in (None, "stop"):
                raise PolicyError(f"the request ended with {completion.finish_reason!r}")

    @cached_property
    def known_text(self) -> KnownText:
        """Tokens of the parts of a response that the prompt template states."""
        return KnownText(self._prompt, self.tokens)

    @property
    def max_response_tokens(self) -> int:
        """Token budget of a response, where a request has none."""
        return self._prompt.max_response_tokens

    def count_unfetched(self) -> int:
        """Return the number of requests whose hidden-state file still exists."""
        return len(self._transport)

    def count_unfinished(self) -> int:
        """Return the number of requests in the engine."""
        return int(self._open_engine().engine.get_num_unfinished_requests())

    def close(self) -> None:
        """Abort running requests, end the engine's processes and remove the transport's folder.

        In a fork of the process that started them it does nothing.
        """
        if os.getpid() != self._process:
            return
        atexit.unregister(self.close)
        engine, self._engine = self._engine, None
        try:
            if engine is not None:
                engine.close()
        finally:
            self._transport.close()


def _describe(vllm_config: Any, memory: dict[str, Any], reason: str) -> list[str]:
    """Describe the settings of a running engine, for messages."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    parts = [
        f"{str(model.dtype).removeprefix('torch.')} ({reason})",
        f"quantization {model.quantization or 'none'}",
        f"{vllm_config.scheduler_config.max_num_seqs} requests at once",
        f"prefix caching {'on' if vllm_config.cache_config.enable_prefix_caching else 'off'}",
        f"tensor parallel {parallel.tensor_parallel_size}",
    ]
    if "gpu_memory_utilization" in memory:
        parts.append(f"{100 * memory['gpu_memory_utilization']:.1f}% of the GPU's memory")
    if "kv_cache_memory_bytes" in memory:
        parts.append(f"{memory['kv_cache_memory_bytes'] / GIB:.2f} GiB for keys and values")
    return parts
