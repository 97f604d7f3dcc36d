"""``CoPRS``: the image encoder runs concurrently with the policy, then prior and mask decoder."""

from __future__ import annotations

import os
import reprlib
import threading
import time
from collections.abc import (
    AsyncGenerator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import ClassVar, Self, Unpack

import numpy as np

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.closing import Closeable
from coprs_deploy.engines import SegmentationGraphs
from coprs_deploy.engines.autotune import RuntimeChoice
from coprs_deploy.errors import CoPRSError, QueueFullError, check_type
from coprs_deploy.images import (
    ImageSource,
    ResizeTransform,
    RgbArray,
    check_valid_region,
    prepare_image,
)
from coprs_deploy.policy import Policy, PolicyRequest, PolicyResult
from coprs_deploy.policy.policy import remaining_s
from coprs_deploy.prompts import check_instruction
from coprs_deploy.runtime.concurrency import ConcurrencyLimit, UploadedImage
from coprs_deploy.runtime.encoder import DecodedImage
from coprs_deploy.runtime.loading import Progress, choose_runtimes, load_parts
from coprs_deploy.runtime.options import RequestLimits, RequestOptions, RuntimeOptions
from coprs_deploy.runtime.pipeline import (
    PreparedRequest,
    RequestImage,
    RequestPipeline,
    StreamEvent,
    last_result,
)
from coprs_deploy.runtime.policy_loading import choose_policy
from coprs_deploy.runtime.result import SegmentationResult, Timings
from coprs_deploy.runtime.streams import in_thread, interleave
from coprs_deploy.runtime.target_decoding import decode_targets
from coprs_deploy.specs import Geometry


class CoPRS(Closeable):
    """Reasoning segmentation with an exported bundle.

    Create it with :meth:`load` and close it after use (it is a context manager). It is thread-safe.
    The constructor takes graphs and a policy directly, as for PyTorch modules instead of a bundle.

    Args:
        graphs: image encoder, prior and mask decoder.
        policy: writes the reasoning.
        geometry: sizes of the graphs.
        options: sizes of cache and queue, and the time limit of a request.
        runtime_choices: measured runtime of each graph and of the policy, as far as they are
            ``auto`` and more than one can run.

    Attributes:
        description: runtimes and devices of graphs and policy.
        concurrency: number of requests that the policy decodes together.
        answers_together: whether :meth:`segment_together` is faster than a request at a time.
        valid_region: images that the image encoder accepts; None accepts any.
        runtime_choices: as given.
    """

    _loaded_in: ClassVar[int | None] = None

    def __init__(
        self,
        graphs: SegmentationGraphs,
        policy: Policy,
        geometry: Geometry,
        options: RuntimeOptions | None = None,
        runtime_choices: tuple[RuntimeChoice, ...] = (),
    ) -> None:
        options = options or RuntimeOptions()
        CoPRS._loaded_in = self._process = os.getpid()
        self._graphs, self._policy, self._geometry = graphs, policy, geometry
        self._pipeline = RequestPipeline(graphs, policy, geometry, options)
        self._limit = ConcurrencyLimit(policy.concurrency, options.max_queue_size)
        self.description = self._pipeline.description
        self.concurrency = policy.concurrency
        self.answers_together = policy.answers_together
        self.valid_region = graphs.valid_region
        self.runtime_choices = runtime_choices

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        options: RuntimeOptions | None = None,
        *,
        policy: str | None = None,
        progress: Progress = lambda step: None,
    ) -> Self:
        """Open a bundle: verify its files, then load graphs and policy in parallel.

        Args:
            bundle: directory written by ``coprs-deploy export``, or a bundle on the Hugging Face
                hub, ``hf://org/name@revision``; None loads the demo model.
            options: where and how to run it.
            policy: ``openvino``, ``transformers`` or ``vllm``; None takes it from ``options``.
            progress: called with a line of text per step.

        Raises:
            BundleError: the bundle is missing or invalid; BundleIntegrityError: a file was changed.
            HubError: it is on the hub and cannot be downloaded.
            EnvironmentNotReadyError: a requested library or device is not available.
        """
        check_type("options", options, RuntimeOptions, NoneType)
        options = options or RuntimeOptions()
        if policy is not None:
            options = replace(options, policy=policy)
        check_type("bundle", bundle, str, Path, NoneType)
        check_type("progress", progress, Callable)
        _check_process(cls._loaded_in)
        progress("verifying the bundle's files")
        opened = open_bundle(demo.BUNDLE if bundle is None else bundle)
        # Before loading, which would disturb timings.
        choices = choose_runtimes(opened, options)
        policy_choice = choose_policy(opened, options, progress)
        graphs, loaded_policy = load_parts(opened, options, choices, policy_choice, progress)
        if policy_choice.timings:
            choices += (policy_choice,)
        return cls(graphs, loaded_policy, opened.manifest.geometry, options, choices)

    @property
    def num_active(self) -> int:
        """Number of requests that are running or queued.

        Those of :meth:`segment_many` and :meth:`segment_together` are not counted.
        """
        return self._limit.num_active

    @property
    def max_active(self) -> int:
        """Number of requests that may be running or queued; further ones are refused."""
        return self._limit.max_active

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._pipeline.is_closed

    def check_queue(self) -> None:
        """Check, before the work for a request begins, that the queue takes it.

        Raises:
            QueueFullError: the queue is full.
        """
        if self._limit.num_active >= self._limit.max_active:
            raise QueueFullError(self._limit.full_message())

    def segment(
        self,
        image: ImageSource | DecodedImage,
        instruction: str,
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> SegmentationResult:
        """Segment what an instruction describes.

        Args:
            image: a path, bytes, a Pillow image or an array; see ``images.load_image``; or what
                :meth:`decode` returned.
            instruction: what to segment.
            max_targets: maximum number of targets, one mask each.
            max_new_tokens: token budget of the response; None takes the checkpoint's.
            limits: limits of the reasoning: ``max_reasoning_tokens``, ``deadline_ms`` or
                ``reasoning="none"``; see :class:`.options.RequestOptions`.

        Returns:
            The result; ``found`` is False if the policy named no target.

        Raises:
            ImageError: the image cannot be used, or its shape is outside the valid region.
            InstructionError: the instruction is empty or too long.
            PolicyError: the policy failed.
            QueueFullError: the queue is full.
            RequestTimeoutError: the time limit passed.
            ValueError: another argument is not accepted, or the deadline cannot be met.
            CoPRSError: the runtime was closed, or loaded before this process was forked.
        """
        self._check_usable()
        options = RequestOptions(max_targets, max_new_tokens, **limits)
        with self._limit.slot():
            return last_result(self._pipeline.start(image, instruction, options))

    def stream(
        self,
        image: RequestImage,
        instruction: str,
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> Generator[StreamEvent, None, None]:
        """Stream the events of a request; arguments and errors as in :meth:`segment`.

        Yields:
            ``TextDelta`` as the policy writes, ``PriorEvent`` (unless nothing was found), and the
            ``SegmentationResult``. Closing the generator abandons the request.
        """
        options = RequestOptions(max_targets, max_new_tokens, **limits)
        yield from self._stream(image, instruction, options, threading.Event())

    def _stream(
        self,
        image: RequestImage,
        instruction: str,
        options: RequestOptions,
        abandoned: threading.Event,
    ) -> Generator[StreamEvent, None, None]:
        """:meth:`stream`, which another thread ends by ``abandoned`` where it waits."""
        self._check_usable()
        start = time.perf_counter()
        with self._limit.slot(), self._in_memory(image, instruction, start):
            yield from self._pipeline.start(
                image,
                instruction,
                options,
                stream_prior=True,
                start=start,
                abandoned=abandoned,
            )

    async def asegment(
        self,
        image: RequestImage,
        instruction: str,
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> SegmentationResult:
        """Asynchronous :meth:`segment`; cancelling the task abandons the request."""
        events = self.astream(image, instruction, max_targets, max_new_tokens, **limits)
        return last_result([event async for event in events])

    def astream(
        self,
        image: RequestImage,
        instruction: str,
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> AsyncGenerator[StreamEvent, None]:
        """Asynchronous :meth:`stream`; an option that is not accepted raises at once."""
        options = RequestOptions(max_targets, max_new_tokens, **limits)
        abandoned = threading.Event()
        events = self._stream(image, instruction, options, abandoned)
        return in_thread(events, partial(_abandon, image, abandoned))

    def stream_instructions(
        self,
        image: RequestImage,
        instructions: Sequence[str],
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> Generator[tuple[int, StreamEvent | CoPRSError | ValueError], None, None]:
        """Stream the events of several instructions on one image, which is encoded once.

        As many run at once as the policy decodes together. Each counts as a request in the queue,
        and its ``deadline_ms`` runs from its turn; the time limit is that of all. Other arguments
        are those of :meth:`segment`. What is refused before the first begins raises as there: the
        image, an instruction, a full queue.

        Yields:
            Index of the instruction, and an event as :meth:`stream` yields it. If an instruction
            fails, its error is its last event, and the others go on.
        """
        options = RequestOptions(max_targets, max_new_tokens, **limits)
        yield from self._stream_instructions(image, instructions, options, threading.Event())

    def _stream_instructions(
        self,
        image: RequestImage,
        instructions: Sequence[str],
        options: RequestOptions,
        abandoned: threading.Event,
    ) -> Generator[tuple[int, StreamEvent | CoPRSError | ValueError], None, None]:
        """:meth:`stream_instructions`, which another thread ends by ``abandoned``."""
        self._check_usable()
        arrival = time.perf_counter()
        for instruction in instructions:
            check_instruction(instruction)
        if not instructions:
            raise ValueError("instructions is empty; accepted: one instruction or more")
        num_slots = len(instructions)
        with self._limit.slot(num_slots), self._in_memory(image, instructions[0], arrival):
            decoded = self.decode(image)
            pending = self._pipeline.cache.get_or_submit(decoded)
            first = replace(decoded, embedding=pending)
            others = replace(decoded, embedding=replace(pending, is_cached=True))
            starts = [
                partial(
                    self._pipeline.start,
                    each,
                    text,
                    options,
                    stream_prior=True,
                    arrival=arrival,
                    abandoned=abandoned,
                )
                for each, text in zip(
                    [first] + [others] * (num_slots - 1), instructions, strict=True
                )
            ]
            try:
                yield from interleave(starts, self.concurrency, abandoned)
            finally:
                pending.release()

    def astream_instructions(
        self,
        image: RequestImage,
        instructions: Sequence[str],
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> AsyncGenerator[tuple[int, StreamEvent | CoPRSError | ValueError], None]:
        """Asynchronous :meth:`stream_instructions`; an option not accepted raises at once."""
        options = RequestOptions(max_targets, max_new_tokens, **limits)
        abandoned = threading.Event()
        events = self._stream_instructions(image, instructions, options, abandoned)
        return in_thread(events, partial(_abandon, image, abandoned))

    def segment_many(
        self,
        requests: Iterable[tuple[ImageSource, str]],
        max_targets: int = 1,
        **limits: Unpack[RequestLimits],
    ) -> Iterator[SegmentationResult]:
        """Segment many images in order, encoding the next image while the current one is decoded.

        Args:
            requests: pairs of image and instruction, read one ahead of the results.
            max_targets: maximum number of targets of each request.
            limits: limits of the reasoning of each request, as in :meth:`segment`; ``deadline_ms``
                and the time limit run from its turn.

        Yields:
            One result per request. The first request that fails raises, as in :meth:`segment`.
        """
        self._check_usable()
        check_type("requests", requests, Iterable)
        options = RequestOptions(max_targets, **limits)
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="segment") as pool:
            pending: list[Future[SegmentationResult]] = []
            try:
                for request in requests:
                    pending.append(self._segment_later(request, options, pool))
                    if len(pending) > self.concurrency:
                        yield pending.pop(0).result()
                while pending:
                    yield pending.pop(0).result()
            finally:
                for future in pending:
                    future.cancel()

    def _segment_later(
        self, request: object, options: RequestOptions, pool: ThreadPoolExecutor
    ) -> Future[SegmentationResult]:
        """Encode the image of a request, and run the rest when a thread of the pool is free."""
        try:
            image, instruction = _pair(request)
            check_instruction(instruction)
            decoded = self.decode(image)
            embedding = self._pipeline.cache.get_or_submit(decoded)
        except Exception as error:  # raised when the turn of the request comes
            failed: Future[SegmentationResult] = Future()
            failed.set_exception(error)
            return failed
        held = replace(decoded, embedding=embedding)
        future = pool.submit(lambda: last_result(self._pipeline.start(held, instruction, options)))
        future.add_done_callback(lambda _: embedding.release())
        return future

    def segment_together(
        self,
        requests: Sequence[tuple[ImageSource | DecodedImage, str]],
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> list[SegmentationResult | Exception]:
        """Segment requests of which all are known, as fast as possible together.

        All images are in memory at once, and the queue does not count the requests. Hidden states
        are those of :meth:`segment` but for roundings, which may move the edge of a mask.

        Args:
            requests: pairs of image and instruction; requests on one image, which must be the
                same object, share its embedding and the beginning of the prompt.
            max_targets: maximum number of targets of each request.
            max_new_tokens: token budget of each response; None takes the checkpoint's.
            limits: limits of the reasoning of each request, as in :meth:`segment`.

        Returns:
            The result of each request, or its error, as :meth:`segment` raises it.
        """
        self._check_usable()
        options = RequestOptions(max_targets, max_new_tokens, **limits)
        done: dict[int, SegmentationResult | Exception] = {}
        prepared: dict[int, PreparedRequest] = {}
        shared: dict[int, DecodedImage] = {}  # by identity of the given image
        start = time.perf_counter()
        with ExitStack() as releases:
            for number, (given, instruction) in enumerate(requests):
                image = shared.get(id(given), given)
                try:
                    request = self._pipeline.prepare(image, instruction, options, start, start)
                except Exception as error:
                    done[number] = error
                    continue
                releases.callback(request.pending.release)
                prepared[number] = request
                pending = replace(request.pending, is_cached=True)
                shared.setdefault(id(given), replace(request.image, embedding=pending))
            numbers, policy_start = list(prepared), time.perf_counter()
            answers = self._policy.answer_together([prepared[n].request for n in numbers])
            for index, answer in answers:
                number = numbers[index]
                try:
                    if isinstance(answer, Exception):
                        raise answer
                    done[number] = last_result(
                        self._pipeline.finish(prepared[number], answer, policy_start)
                    )
                except Exception as error:
                    done[number] = error
        return [done[number] for number in range(len(requests))]

    def warm_up(self) -> Timings:
        """Run every graph and the policy once on a grey image, so that the first request is fast.

        Returns:
            Prefill, decode and total time of the policy.
        """
        self._check_usable()
        size, region = self._geometry.image_size, self.valid_region
        height, width = (region.height, region.width) if region else (size, size)
        image = self.decode(np.full((height, width, 3), 128, dtype=np.uint8))
        prepared = prepare_image(image.rgb, self._geometry)
        images = self._graphs.images
        for batch_size in sorted({images.min, images.opt, images.max}):
            embedding = self._graphs.encode_batch([prepared] * batch_size)[0]
        one = np.zeros((1, self._policy.hidden_size), dtype=np.float32)
        decode = partial(decode_targets, self._graphs, embedding, one, image.resize, self._geometry)
        list(decode())
        if self._graphs.is_fused:  # `stream` runs the graphs separately
            list(decode(stream_prior=True))
        # With the token budget of other requests, for which static decoding compiles its step.
        request = PolicyRequest(image.rgb, "anything", max_reasoning_tokens=4)
        start = time.perf_counter()
        (result,) = (e for e in self._policy.stream(request) if isinstance(e, PolicyResult))
        total_ms = 1e3 * (time.perf_counter() - start)
        # What a request with a deadline reserves is first estimated from this one.
        limited = RequestOptions(max_reasoning_tokens=4)
        list(self._pipeline.start(replace(image, cache_key=""), "anything", limited))
        return Timings(prefill_ms=result.prefill_ms, decode_ms=result.decode_ms, total_ms=total_ms)

    def decode(self, source: RequestImage) -> DecodedImage:
        """Decode and check an image ahead of its request.

        Args:
            source: a path, bytes, a Pillow image or an array; see ``images.load_image``. An
                uploaded image waits for a core.

        Returns:
            The image, which the methods for requests take in place of ``source``.

        Raises:
            ImageError: the image cannot be used, or its shape is outside the valid region.
        """
        return self._pipeline.decode(source)

    def check_image(self, image: RgbArray) -> None:
        """Check the shape of a decoded image, (H, W, 3), against ``valid_region``.

        Raises:
            ImageSizeError: the image is outside the valid region.
        """
        check_valid_region(ResizeTransform.of(image, self._geometry), self.valid_region)

    def close(self) -> None:
        """Free graphs and policy; running requests end with an error.

        In a fork of the process that loaded them it does nothing: they belong to the other process.
        """
        self._pipeline.is_closed = True
        if os.getpid() != self._process:
            return
        self._pipeline.close()

    def __repr__(self) -> str:
        return f"CoPRS({self.description})"

    def _check_usable(self) -> None:
        """Check that the runtime is open and belongs to this process."""
        _check_process(self._process)
        if self._pipeline.is_closed:
            raise CoPRSError("CoPRS was closed; load it again with CoPRS.load")

    def _in_memory(
        self, image: RequestImage, instruction: str, start: float
    ) -> AbstractContextManager[None]:
        """Wait, up to the deadline, until there is memory for an uploaded image; hold it."""

        def check() -> None:
            remaining_s(self._pipeline.time_limit(start), instruction)
            if self._pipeline.is_closed:
                raise CoPRSError("CoPRS was closed during the request")

        return image.in_memory(check) if isinstance(image, UploadedImage) else nullcontext()


def _abandon(image: RequestImage, abandoned: threading.Event) -> None:
    """End the waits of a request: for the memory of its image, and for its turn at the policy."""
    abandoned.set()
    if isinstance(image, UploadedImage):
        image.abandon()


def _check_process(loaded_in: int | None) -> None:
    """Refuse a fork of the process that loaded CoPRS; PyTorch would wait for its threads there."""
    if loaded_in not in (None, os.getpid()):
        raise CoPRSError(
            f"CoPRS was loaded in process {loaded_in} and is used in its fork {os.getpid()}, where "
            "the threads of the runtimes do not exist; load it after the fork only, or start "
            'processes with multiprocessing.get_context("spawn")'
        )


def _pair(request: object) -> tuple[ImageSource, str]:
    if not isinstance(request, tuple | list) or len(request) != 2:
        raise ValueError(
            f"requests contains {reprlib.repr(request)}; accepted: pairs of image and instruction"
        )
    return request[0], request[1]
