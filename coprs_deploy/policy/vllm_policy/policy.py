"""The policy in vLLM: continuous batching, and the hidden state in the same decoding pass.

The engine runs in processes of its own that vLLM starts; this module talks to it from one event
loop in a thread, so that any number of ordinary threads may ask. How a concentration is captured
inside the engine is told in :mod:`.capture`.
"""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.errors import (
    HiddenStateError,
    InstructionError,
    PolicyError,
)
from coprs_deploy.images import fit_pixel_count, image_key
from coprs_deploy.policy.policy import (
    Policy,
    PolicyRequest,
    PolicyResult,
    PolicyStream,
    StopReason,
    TextDelta,
)
from coprs_deploy.policy.policy_tokens import PolicyTokens, WrittenText
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.policy.vllm_policy.engine import (
    check_platform,
    engine_environment,
    import_vllm,
    registered_architecture,
    start_engine,
    stop_engine,
    visible_device,
)
from coprs_deploy.policy.vllm_policy.settings import (
    GIB,
    VllmSettings,
    free_memory,
    kv_bytes_per_token,
    memory_arguments,
)
from coprs_deploy.policy.vllm_policy.transport import HiddenStateTransport
from coprs_deploy.prompts import PromptTemplate, encode_prompt

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_T = TypeVar("_T")


@dataclass
class _Progress:
    """What is known of a request so far."""

    token_ids: list[int] = field(default_factory=list)
    first_token: float = 0.0
    last_token: float = 0.0
    queue_ms: float = 0.0
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class _Prompt:
    """A request as the engine takes it."""

    tokens: Any
    params: Any
    vectors: Path
    num_tokens: int
    budget: int
    targets: int
    image_ms: float


class VllmPolicy(Policy):
    """A Qwen2.5-VL or LLaVA-1.5 policy in a vLLM engine.

    Start it from code that a child process may import: vLLM spawns processes, so a script needs
    ``if __name__ == "__main__":`` around what it does.

    Args:
        path: the policy directory of a checkpoint or a bundle; a quantized one (AWQ, GPTQ, FP8) is
            read as its own configuration says.
        prompt: its prompt template.
        min_pixels: smallest image area that it sees.
        max_pixels: largest image area that it sees.
        device: ``cpu``, ``cuda`` or ``cuda:N``; it must be what the installed vLLM was built for.
        dtype: of its weights, as torch names it; None keeps the stored one.
        settings: of the engine.
        memory_is_ready: waited for before free memory is looked at, so that graphs on the same GPU
            have taken theirs; None looks at once.

    Attributes:
        num_preemptions: how often a request had to give its memory to another and start again.

    Raises:
        MissingDependencyError: vLLM is not installed.
        RuntimeUnavailableError: there is no such device, or no memory left on it.
        PolicyError: the directory is not a policy that can be used, or the engine does not start.
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
        memory_is_ready: threading.Event | None = None,
    ) -> None:
        with engine_environment(settings.num_threads if settings else None):
            self._load(
                path.resolve(),
                prompt,
                device=device,
                dtype=dtype,
                settings=settings or VllmSettings(),
                memory_is_ready=memory_is_ready,
            )
        self._pixels = (min_pixels, max_pixels)

    def _load(
        self,
        path: Path,
        prompt: PromptTemplate,
        *,
        device: str,
        dtype: str | None,
        settings: VllmSettings,
        memory_is_ready: threading.Event | None,
    ) -> None:
        vllm = import_vllm()
        from transformers import AutoConfig, GenerationConfig
        from vllm.engine.arg_utils import AsyncEngineArgs

        device_type, _, index = device.partition(":")
        check_platform(vllm, device_type)
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            generation = GenerationConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise PolicyError(f"{path} cannot be loaded as a policy: {error}") from error
        self._vision = VisionProcessor(path, config)
        self._tokens = PolicyTokens(path, generation.eos_token_id)
        self._prompt = prompt
        self._image_id = config.image_token_id
        self.num_preemptions = 0
        text = config.get_text_config()
        self.hidden_size = int(text.hidden_size)
        self.concurrency = settings.max_num_seqs
        most_tokens = prompt.max_prompt_tokens + prompt.max_response_tokens + 1
        self._longest = min(most_tokens, int(text.max_position_embeddings))
        stored = str(config.dtype).removeprefix("torch.") if config.dtype else "auto"
        if memory_is_ready is not None:
            memory_is_ready.wait()
        needed = kv_bytes_per_token(text, 4) * self._longest * settings.max_num_seqs
        memory = memory_arguments(
            settings, device_type, free_memory(device), max(needed, 64 * (1 << 20))
        )
        arguments = AsyncEngineArgs(
            model=str(path),
            dtype=dtype or stored,
            max_model_len=self._longest,
            hf_overrides={"architectures": [registered_architecture(config.model_type)]},
            generation_config="vllm",
            limit_mm_per_prompt={"image": 1},
            mm_device_do_normalize=False,  # VisionProcessor normalizes
            seed=0,
            disable_log_stats=True,
            enable_log_requests=False,
            **self._plug_ins(),
            **settings.engine_arguments(device_type),
            **memory,
        )
        self._files = HiddenStateTransport(self.hidden_size)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vllm-policy", daemon=True
        )
        self._thread.start()
        self._tasks: set[Future[None]] = set()
        self._lock = threading.Lock()
        self._engine: AsyncLLM | None = None
        atexit.register(self.close)  # a policy that nobody closed leaves no process behind either
        try:
            with visible_device(device_type, index):
                self._engine = self._run(start_engine(arguments))
        except BaseException as error:
            self.close()
            if not isinstance(error, (RuntimeError, ValueError, OSError)):
                raise
            raise PolicyError(
                f"the vLLM engine did not start: {error}. Set VLLM_LOGGING_LEVEL=INFO to see why; "
                'a script that starts it must do so under `if __name__ == "__main__":`'
            ) from error
        engine = self._engine.vllm_config
        cache = engine.cache_config
        shares = [
            f"vllm {vllm.__version__} {config.model_type} on {device}",
            str(engine.model_config.dtype),
            f"quantization {engine.model_config.quantization or 'none'}",
            f"{settings.max_num_seqs} requests at once",
            f"prefix caching {'on' if cache.enable_prefix_caching else 'off'}",
            f"tensor parallel {settings.tensor_parallel_size}",
        ]
        if "gpu_memory_utilization" in memory:
            shares.append(f"{100 * memory['gpu_memory_utilization']:.1f}% of the GPU's memory")
        if "kv_cache_memory_bytes" in memory:
            shares.append(f"{memory['kv_cache_memory_bytes'] / GIB:.2f} GiB for keys and values")
        self.description = ", ".join(shares)

    @staticmethod
    def _plug_ins() -> dict[str, Any]:
        """Engine arguments that bring the capture into the engine."""
        from coprs_deploy.policy.vllm_policy.capture import HiddenStateCapture

        return {"logits_processors": [HiddenStateCapture]}

    def stream(self, request: PolicyRequest) -> PolicyStream:
        """See :meth:`Policy.stream`.

        Raises:
            HiddenStateError: the engine gave another number of vectors than it wrote
                ``<REF_POS>``.
        """
        if self._engine is None:
            raise PolicyError("the policy was closed")
        start = time.perf_counter()
        written = WrittenText(self._tokens)
        progress = _Progress()
        arrivals: queue.SimpleQueue[list[int] | BaseException | NDArray[np.float32]]
        arrivals = queue.SimpleQueue()
        with self._files.for_request() as vectors:
            prompt = self._encode(request, vectors)
            task = self._submit(self._answer(prompt, progress, arrivals))
            try:
                while True:
                    try:
                        arrived = arrivals.get(timeout=request.remaining_s())
                    except queue.Empty:
                        continue  # the next look at the deadline raises
                    if isinstance(arrived, BaseException):
                        raise arrived
                    if isinstance(arrived, np.ndarray):
                        break
                    for token in arrived:
                        if token not in self._tokens.end_ids and (text := written.add(token)):
                            yield TextDelta(text)
            finally:
                task.cancel()  # an abandoned request; one that has ended does not notice
        end = time.perf_counter()
        stop = self._stop_reason(progress.token_ids, prompt)
        if stop is not StopReason.END_OF_TEXT:
            progress.token_ids.pop()  # the end that was forced
        response = self._tokens.read(progress.token_ids)
        if stop is StopReason.TOKEN_BUDGET and (text := written.rest(response)):
            yield TextDelta(text)
        if len(arrived) != len(response.reference_positions):
            raise HiddenStateError(
                f"{self.description} wrote {len(response.reference_positions)} <REF_POS> and gave "
                f"{len(arrived)} hidden states; its reasoning was: {response.reasoning}",
                response.reasoning,
            )
        yield PolicyResult(
            response=response,
            concentrations=arrived,
            stop_reason=stop,
            token_ids=tuple(progress.token_ids),
            num_prompt_tokens=prompt.num_tokens,
            num_cached_tokens=progress.num_cached_tokens,
            queue_ms=progress.queue_ms,
            image_ms=prompt.image_ms,
            prefill_ms=max(
                0.0, 1e3 * (progress.first_token - start) - progress.queue_ms - prompt.image_ms
            ),
            decode_ms=1e3 * (end - progress.first_token),
        )

    def _encode(self, request: PolicyRequest, vectors: Path) -> _Prompt:
        """Turn a request into what the engine takes; its vectors come in a file."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from coprs_deploy.policy.vllm_policy.capture import CaptureRequest

        start = time.perf_counter()
        picture = fit_pixel_count(request.rgb, *self._pixels)
        key = image_key(np.asarray(picture))
        image_ms = 1e3 * (time.perf_counter() - start)
        num_image_tokens = self._vision.num_tokens(picture.width, picture.height)
        ids = encode_prompt(
            self._prompt, self._tokens.tokenizer, request.instruction, num_image_tokens
        )
        room = self._longest - len(ids) - 1
        if room < 1:
            raise InstructionError(
                f"the prompt has {len(ids)} tokens, and prompt and answer together may have "
                f"{self._longest}: shorten the instruction"
            )
        budget = min(request.max_new_tokens or self._prompt.max_response_tokens, room)
        first = ids.index(self._image_id)
        # vLLM repeats the placeholder itself, once for each vision token.
        short_ids = [*ids[: first + 1], *ids[first + num_image_tokens :]]
        order = CaptureRequest(
            path=str(vectors),
            reference_id=self._tokens.reference_id,
            stop_id=min(self._tokens.end_ids),
            targets=request.targets,
            budget=budget,
        )
        params = SamplingParams(
            temperature=0.0,
            max_tokens=budget + 1,
            stop_token_ids=sorted(self._tokens.end_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=order.extra_args(),
        )
        tokens = {
            "prompt_token_ids": short_ids,
            "multi_modal_data": {"image": picture},
            "multi_modal_uuids": {"image": [key]},
        }
        return _Prompt(tokens, params, vectors, len(ids), budget, request.targets, image_ms)

    def _stop_reason(self, token_ids: list[int], prompt: _Prompt) -> StopReason:
        """Tell why an answer ended; its last token is an end, written or forced."""
        if token_ids.count(self._tokens.reference_id) >= prompt.targets:
            return StopReason.TARGETS_REACHED
        if len(token_ids) > prompt.budget:
            return StopReason.TOKEN_BUDGET
        return StopReason.END_OF_TEXT

    async def _answer(
        self,
        prompt: _Prompt,
        progress: _Progress,
        arrivals: queue.SimpleQueue[list[int] | BaseException | NDArray[np.float32]],
    ) -> None:
        """Run one request in the engine: its tokens as they come, then its vectors."""
        assert self._engine is not None, "the policy was closed"
        try:
            async for new_ids in self._tokens_of(prompt, progress):
                arrivals.put(new_ids)
            arrivals.put(self._files.take(prompt.vectors))
        except asyncio.CancelledError:
            arrivals.put(PolicyError("the policy was closed while it answered"))
            raise
        except Exception as error:
            failure = PolicyError(f"{self.description} could not answer: {error}")
            failure.__cause__ = error
            arrivals.put(failure)

    async def _tokens_of(self, prompt: _Prompt, progress: _Progress) -> AsyncIterator[list[int]]:
        assert self._engine is not None
        outputs = self._engine.generate(prompt.tokens, prompt.params, prompt.vectors.name)
        async for output in outputs:
            (completion,) = output.outputs
            new_ids = list(completion.token_ids)
            progress.last_token = time.perf_counter()
            if not progress.token_ids:
                progress.first_token = progress.last_token
                progress.num_cached_tokens = output.num_cached_tokens or 0
                if output.metrics is not None:
                    # Both are readings of the engine's own clock.
                    waited = output.metrics.scheduled_ts - output.metrics.queued_ts
                    progress.queue_ms = max(0.0, 1e3 * waited)
            progress.token_ids.extend(new_ids)
            if output.finished and output.metrics is not None:
                self.num_preemptions += output.metrics.num_preemptions
            yield new_ids
            if completion.finish_reason not in (None, "stop"):
                raise PolicyError(f"the request ended with {completion.finish_reason!r}")

    def count_unfetched(self) -> int:
        """How many requests have a file for vectors that nobody has taken."""
        return len(self._files)

    def count_unfinished(self) -> int:
        """How many requests the engine holds."""
        assert self._engine is not None, "the policy was closed"
        return int(self._engine.get_num_unfinished_requests())

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _submit(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        task = asyncio.run_coroutine_threadsafe(work, self._loop)
        with self._lock:
            self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: Future[None]) -> None:
        with self._lock:
            self._tasks.discard(task)

    def close(self) -> None:
        """Abort what is running, end the engine's processes and the thread."""
        if self._loop.is_closed():
            return
        atexit.unregister(self.close)
        with self._lock:
            running = list(self._tasks)
        for task in running:
            task.cancel()
        try:
            if self._engine is not None:
                self._run(stop_engine(self._engine))
        finally:
            self._engine = None
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._files.close()
