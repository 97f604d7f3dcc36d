"""CoPRS at work: the image encoder runs while the policy decodes, then prior and mask follow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coprs_deploy import shipped
from coprs_deploy.bundle import Bundle, open_bundle
from coprs_deploy.closing import Closeable
from coprs_deploy.engines import DeviceTensor, RunnerOptions, Stages, open_bundle_graph
from coprs_deploy.engines.stages import join_chunks
from coprs_deploy.errors import BundleError, PolicyError
from coprs_deploy.images import (
    ImageSource,
    PreparedImage,
    RgbArray,
    image_key,
    load_image,
    prepare_image,
    resize_logits,
)
from coprs_deploy.policy import Policy, PolicyRequest, PolicyResult, Words
from coprs_deploy.runtime.answer import Answer, PriorReady, Timings
from coprs_deploy.runtime.embedding_cache import EmbeddingCache, EncodedImage
from coprs_deploy.runtime.options import RuntimeOptions
from coprs_deploy.specs import Geometry

StreamEvent: TypeAlias = Words | PriorReady | Answer


@dataclass(frozen=True)
class _Picture:
    """A decoded picture, ready for the image encoder."""

    rgb: RgbArray
    prepared: PreparedImage
    key: str
    milliseconds: float


@dataclass(frozen=True)
class _Encoding:
    """An embedding on its way, and whether an earlier question had asked for it."""

    future: Future[EncodedImage]
    was_kept: bool


class _Clock:
    """Times consecutive stages."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        now = time.perf_counter()
        elapsed_ms, self._last = 1e3 * (now - self._last), now
        return elapsed_ms


class CoPRS(Closeable):
    """Answers "segment what the instruction describes", with its reasoning.

    Make one with :meth:`load`; it may be used from several threads, and should be closed (it is a
    context manager). The stages and the policy may also be given, which is how PyTorch's own stages
    are run through the same code.

    Args:
        stages: the three graphs.
        policy: who writes the reasoning.
        geometry: sizes of the graphs.
        cached_images: how many image embeddings are kept for further questions.
    """

    def __init__(
        self, stages: Stages, policy: Policy, geometry: Geometry, cached_images: int = 8
    ) -> None:
        self._stages = stages
        self._policy = policy
        self._geometry = geometry
        self._encoder_thread = ThreadPoolExecutor(1, thread_name_prefix="image-encoder")
        self._cache = EmbeddingCache(cached_images, self._encoder_thread)
        graphs = next(iter(stages.runners.values())).description
        self.description = f"graphs: {graphs}; policy: {policy.description}"

    @classmethod
    def load(cls, bundle: str | Path | None = None, options: RuntimeOptions | None = None) -> Self:
        """Open a bundle: check its files, then load graphs and policy side by side.

        Args:
            bundle: a bundle directory that ``coprs-deploy export`` wrote; None takes the small
                model that comes with the package.
            options: where and how to run it.

        Raises:
            BundleError: there is no usable bundle; BundleIntegrityError: a file of it was changed.
            EnvironmentNotReadyError: a library or device that was asked for is not here.
        """
        options = options or RuntimeOptions()
        opened = open_bundle(shipped.BUNDLE if bundle is None else bundle)
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(_load_policy, opened, options)
            stages = _open_stages(opened, options)
            try:
                policy = loading.result()
            except BaseException:
                stages.close()
                raise
        return cls(stages, policy, opened.manifest.geometry, options.cached_images)

    def segment(
        self,
        image: ImageSource,
        instruction: str,
        targets: int = 1,
        max_new_tokens: int | None = None,
    ) -> Answer:
        """Answer one instruction.

        Args:
            image: a path, bytes, a Pillow image or an array; see ``images.load_image``.
            instruction: what to segment, in words.
            targets: how many objects to name at most, one mask each.
            max_new_tokens: token budget of the response; None takes the checkpoint's.

        Returns:
            The answer; ``found`` is False when the policy named no target.

        Raises:
            ImageError: the picture cannot be used.
            InstructionError: the instruction is empty or too long.
            PolicyError: the policy failed.
        """
        return _last(self.stream(image, instruction, targets, max_new_tokens))

    def segment_many(
        self, questions: Iterable[tuple[ImageSource, str]], targets: int = 1
    ) -> Iterator[Answer]:
        """Answer many questions in order; the next picture is encoded while this one is decoded.

        Args:
            questions: pairs of image and instruction; read one ahead of the answers.
            targets: how many objects to name at most in each.

        Yields:
            One answer a question. The first that cannot be answered raises, as in :meth:`segment`.
        """
        workers = self._policy.concurrency
        with ThreadPoolExecutor(workers, thread_name_prefix="segment") as pool:
            waiting: list[Future[Answer]] = []
            try:
                for image, instruction in questions:
                    waiting.append(self._submit(pool, image, instruction, targets))
                    if len(waiting) > workers:
                        yield waiting.pop(0).result()
                while waiting:
                    yield waiting.pop(0).result()
            finally:
                for future in waiting:
                    future.cancel()

    def _submit(
        self, pool: ThreadPoolExecutor, image: ImageSource, instruction: str, targets: int
    ) -> Future[Answer]:
        """Start a question; one that cannot be asked fails when its turn comes."""
        start = time.perf_counter()
        try:
            picture = self._open(image)
            request = PolicyRequest(picture.rgb, instruction, targets)
        except Exception as error:
            failed: Future[Answer] = Future()
            failed.set_exception(error)
            return failed
        events = self._stream(picture, request, self._encode(picture), start)
        return pool.submit(_last, events)

    def stream(
        self,
        image: ImageSource,
        instruction: str,
        targets: int = 1,
        max_new_tokens: int | None = None,
    ) -> Generator[StreamEvent, None, None]:
        """Answer one instruction piece by piece; arguments and errors as in :meth:`segment`.

        Yields:
            ``Words`` as the policy writes them, ``PriorReady`` (unless nothing was found), and the
            ``Answer``. Closing the generator abandons the request.
        """
        start = time.perf_counter()
        picture = self._open(image)
        request = PolicyRequest(picture.rgb, instruction, targets, max_new_tokens)
        yield from self._stream(picture, request, self._encode(picture), start)

    async def asegment(
        self,
        image: ImageSource,
        instruction: str,
        targets: int = 1,
        max_new_tokens: int | None = None,
    ) -> Answer:
        """Do what :meth:`segment` does without blocking the event loop; cancelling abandons it."""
        answer: Answer | None = None
        async for event in self.astream(image, instruction, targets, max_new_tokens):
            answer = event if isinstance(event, Answer) else None
        assert answer is not None, "a stream ends with its answer"
        return answer

    async def astream(
        self,
        image: ImageSource,
        instruction: str,
        targets: int = 1,
        max_new_tokens: int | None = None,
    ) -> AsyncIterator[StreamEvent]:
        """Do what :meth:`stream` does without blocking the event loop."""
        events = self.stream(image, instruction, targets, max_new_tokens)
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        try:
            while (event := await loop.run_in_executor(thread, next, events, None)) is not None:
                yield event
        finally:
            # In the same thread, after the step that is running: a generator cannot be closed
            # while it works. Nobody waits for it, least of all the event loop.
            thread.submit(events.close)
            thread.shutdown(wait=False)

    def _open(self, image: ImageSource) -> _Picture:
        start = time.perf_counter()
        rgb = load_image(image)
        prepared = prepare_image(rgb, self._geometry)
        return _Picture(rgb, prepared, image_key(rgb), 1e3 * (time.perf_counter() - start))

    def _encode(self, picture: _Picture) -> _Encoding:
        """Start the image encoder, unless this picture's embedding is here or on its way."""

        def compute() -> EncodedImage:
            start = time.perf_counter()
            embedding = self._stages.encode(picture.prepared)
            finished = time.perf_counter()
            return EncodedImage(embedding, finished, 1e3 * (finished - start))

        return _Encoding(*self._cache.get_or_submit(picture.key, compute))

    def _stream(
        self, picture: _Picture, request: PolicyRequest, encoding: _Encoding, start: float
    ) -> Generator[StreamEvent, None, None]:
        policy_start = time.perf_counter()
        result: PolicyResult | None = None
        for event in self._policy.stream(request):
            if isinstance(event, Words):
                yield event
            else:
                result = event
        if result is None:
            raise PolicyError(f"{self._policy.description} ended without a result")
        timings = Timings(
            image_ms=picture.milliseconds,
            prefill_ms=result.prefill_ms,
            decode_ms=result.decode_ms,
            prompt_tokens=result.num_prompt_tokens,
            response_tokens=len(result.token_ids),
        )
        policy_end = time.perf_counter()
        num_targets = len(result.concentrations)
        priors = np.zeros((0, *picture.prepared.original_size), dtype=np.float32)
        masks = np.zeros((0, *picture.prepared.original_size), dtype=np.bool_)
        if num_targets:
            encoded = encoding.future.result()
            clock = _Clock()
            chunks = self._stages.priors(encoded.embedding, result.concentrations)
            prior_ms = clock.lap_ms()
            priors = self._to_original(chunks, num_targets, picture)
            resize_ms = clock.lap_ms()
            yield PriorReady(priors)
            clock.lap_ms()
            chunks = self._stages.masks(encoded.embedding, chunks, picture.prepared.unpadded_size)
            mask_decoder_ms = clock.lap_ms()
            masks = self._to_original(chunks, num_targets, picture) > 0
            timings = replace(
                timings,
                image_encoder_ms=0.0 if encoding.was_kept else encoded.milliseconds,
                image_encoder_hidden_ms=(
                    0.0 if encoding.was_kept else _overlap_ms(encoded, policy_start, policy_end)
                ),
                prior_ms=prior_ms,
                mask_decoder_ms=mask_decoder_ms,
                resize_ms=resize_ms + clock.lap_ms(),
            )
        yield Answer(
            found=num_targets > 0,
            masks=masks,
            priors=priors,
            reasoning=result.response.reasoning,
            response=result.response.text,
            reason="" if num_targets else f"no <REF_POS> was written: {result.stop_reason.value}",
            format_faults=tuple(fault.value for fault in result.response.faults),
            instruction=request.instruction,
            timings=replace(timings, total_ms=1e3 * (time.perf_counter() - start)),
            runtime=self.description,
            image=picture.rgb,
        )

    def _to_original(
        self, chunks: list[DeviceTensor], num_targets: int, picture: _Picture
    ) -> NDArray[np.float32]:
        logits = join_chunks(chunks, num_targets)
        return resize_logits(logits, picture.prepared, self._geometry)

    def close(self) -> None:
        """Free graphs and policy; running answers must have ended."""
        self._encoder_thread.shutdown(wait=True, cancel_futures=True)
        self._policy.close()
        self._stages.close()

    def __repr__(self) -> str:
        return f"CoPRS({self.description})"


def _open_stages(bundle: Bundle, options: RuntimeOptions) -> Stages:
    settings = RunnerOptions(
        device=options.device,
        num_threads=options.num_threads,
        allow_plan_code=options.allow_plan_code,
    )
    return Stages(
        {name: open_bundle_graph(bundle, name, settings) for name in bundle.manifest.graphs}
    )


def _load_policy(bundle: Bundle, options: RuntimeOptions) -> Policy:
    from coprs_deploy.policy.transformers_policy import TransformersPolicy

    record = bundle.manifest.policy
    policy = TransformersPolicy(
        bundle.policy_path,
        record.prompt,
        record.min_pixels,
        record.max_pixels,
        device=options.policy_device or options.device,
        dtype=options.policy_dtype,
    )
    if policy.width != record.width:
        raise BundleError(
            f"the policy is {policy.width} wide and the prior takes {record.width}: they do not "
            "belong together"
        )
    return policy


def _overlap_ms(encoded: EncodedImage, policy_start: float, policy_end: float) -> float:
    """How long the image encoder ran while the policy did, in milliseconds."""
    began = encoded.finished - encoded.milliseconds / 1e3
    overlap = min(encoded.finished, policy_end) - max(began, policy_start)
    return max(0.0, 1e3 * overlap)


def _last(events: Iterable[StreamEvent]) -> Answer:
    """Run a stream to its end and return the answer."""
    answer: StreamEvent | None = None
    for answer in events:  # noqa: B007
        pass
    assert isinstance(answer, Answer), "a stream ends with its answer"
    return answer
