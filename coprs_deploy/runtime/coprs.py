"""CoPRS at work: the image encoder runs while the policy decodes, then prior and mask follow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.closing import Closeable
from coprs_deploy.engines import SegmentationGraphs
from coprs_deploy.engines.autotune import RuntimeChoice
from coprs_deploy.errors import PolicyError
from coprs_deploy.images import (
    ImageSource,
    ResizeTransform,
    RgbArray,
    load_image,
    prepare_image,
    require_inside,
)
from coprs_deploy.policy import Policy, PolicyRequest, PolicyResult, TextDelta
from coprs_deploy.runtime.concurrency import ConcurrencyLimit
from coprs_deploy.runtime.encoder import (
    DecodedImage,
    EmbeddingCache,
    EncoderQueue,
    PendingEmbedding,
    picture_key,
)
from coprs_deploy.runtime.loading import Progress, load_parts, no_progress, resolve_runtimes
from coprs_deploy.runtime.options import RuntimeOptions
from coprs_deploy.runtime.result import PriorEvent, SegmentationResult, Timings
from coprs_deploy.runtime.target_decoding import DecodedTargets, decode_targets
from coprs_deploy.specs import Geometry

StreamEvent: TypeAlias = TextDelta | PriorEvent | SegmentationResult


class CoPRS(Closeable):
    """Answers "segment what the instruction describes", with its reasoning.

    Make one with :meth:`load`; it may be used from several threads, and should be closed (it is a
    context manager). The stages and the policy may also be given, which is how PyTorch's own stages
    are run through the same code.

    Args:
        stages: the three graphs.
        policy: who writes the reasoning.
        geometry: sizes of the graphs.
        max_cached_images: how many image embeddings are kept for further questions.
        max_queue_size: how many answers may wait beyond those that the policy decodes together.
        timeout_s: seconds within which an answer must be ready; None waits for ever.

    Attributes:
        description: who computes what.
        valid_region: which pictures the image encoder takes; None stands for any.
        choices: how ``--runtime auto`` chose the runtimes; empty where it was not asked to.
    """

    def __init__(
        self,
        stages: SegmentationGraphs,
        policy: Policy,
        geometry: Geometry,
        max_cached_images: int = 8,
        *,
        max_queue_size: int = 256,
        timeout_s: float | None = None,
    ) -> None:
        self._stages = stages
        self._timeout_s = timeout_s
        self._admission = ConcurrencyLimit(policy.concurrency, max_queue_size)
        self._policy = policy
        self._geometry = geometry
        self._encoder = EncoderQueue(stages, geometry)
        self._cache = EmbeddingCache(max_cached_images, self._encoder)
        self.choices: tuple[RuntimeChoice, ...] = ()
        graphs = " + ".join(dict.fromkeys(r.description for r in stages.runners.values()))
        self.valid_region = stages.valid_region
        pictures = "" if self.valid_region is None else f" for {self.valid_region}"
        if self.valid_region is not None and self.valid_region.drops_padding:
            pictures += ", padding dropped"
        self.description = f"graphs: {graphs}{pictures}; policy: {policy.description}"

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        options: RuntimeOptions | None = None,
        *,
        policy: str | None = None,
        progress: Progress = no_progress,
    ) -> Self:
        """Open a bundle: check its files, then load graphs and policy side by side.

        Args:
            bundle: a bundle directory that ``coprs-deploy export`` wrote; None takes the small
                model that comes with the package.
            options: where and how to run it.
            policy: ``transformers`` or ``vllm``; None takes that of the options.
            progress: called with a line of text when a part begins to load, and when it is ready.

        Raises:
            BundleError: there is no usable bundle; BundleIntegrityError: a file of it was changed.
            EnvironmentNotReadyError: a library or device that was asked for is not here.
        """
        options = options or RuntimeOptions()
        if policy is not None:
            options = replace(options, policy=policy)
        progress("checking the bundle's files")
        opened = open_bundle(demo.BUNDLE if bundle is None else bundle)
        choices = resolve_runtimes(opened, options)  # nothing else runs while it measures
        stages, loaded = load_parts(opened, options, choices, progress)
        coprs = cls(
            stages,
            loaded,
            opened.manifest.geometry,
            options.max_cached_images,
            max_queue_size=options.max_queue_size,
            timeout_s=options.timeout_s,
        )
        coprs.choices = choices
        return coprs

    def segment(
        self,
        image: ImageSource,
        instruction: str,
        targets: int = 1,
        max_new_tokens: int | None = None,
    ) -> SegmentationResult:
        """Answer one instruction.

        Args:
            image: a path, bytes, a Pillow image or an array; see ``images.load_image``.
            instruction: what to segment, in words.
            targets: how many objects to name at most, one mask each.
            max_new_tokens: token budget of the response; None takes the checkpoint's.

        Returns:
            The answer; ``found`` is False when the policy named no target.

        Raises:
            ImageError: the picture cannot be used, or the bundle does not take its shape.
            InstructionError: the instruction is empty or too long.
            PolicyError: the policy failed.
            QueueFullError: as many answers as may wait are waiting already.
            RequestTimeoutError: the answer was not ready in time.
        """
        events = self._events(image, instruction, targets, max_new_tokens, announces_prior=False)
        return _last(events)

    def warm_up(self) -> Timings:
        """Answer a question on a grey picture, and forget it: the first real one is then faster.

        Returns:
            What the answer took; also the graphs behind the image encoder have run once.
        """
        size = self._geometry.image_size
        height, width = (
            (self.valid_region.height, self.valid_region.width)
            if self.valid_region
            else (size, size)
        )
        picture = self._open(np.full((height, width, 3), 128, dtype=np.uint8))
        prepared = prepare_image(picture.rgb, self._geometry)
        images = self._stages.images
        for together in sorted({images.min, images.opt, images.max}):
            embedding = self._stages.encode_batch([prepared] * together)[0]
        concentrations = np.zeros((1, self._policy.hidden_size), dtype=np.float32)
        # Where the graphs are joined, `stream` still runs them apart.
        for announces_prior in (False, True) if self._stages.is_fused else (False,):
            for _ in decode_targets(
                self._stages,
                embedding,
                concentrations,
                picture.placed,
                self._geometry,
                announces_prior=announces_prior,
            ):
                pass
        request = PolicyRequest(picture.rgb, "anything", max_new_tokens=4)
        start = time.perf_counter()
        (result,) = (e for e in self._policy.stream(request) if isinstance(e, PolicyResult))
        return Timings(
            prefill_ms=result.prefill_ms,
            decode_ms=result.decode_ms,
            total_ms=1e3 * (time.perf_counter() - start),
        )

    def require_inside(self, rgb: RgbArray) -> None:
        """Refuse a picture, (H, W, 3), of a shape that the bundle does not take.

        Raises:
            ImageSizeError: it is of such a shape; see ``valid_region``.
        """
        require_inside(ResizeTransform.of(rgb, self._geometry), self.valid_region)

    def segment_many(
        self, questions: Iterable[tuple[ImageSource, str]], targets: int = 1
    ) -> Iterator[SegmentationResult]:
        """Answer many questions in order; the next picture is encoded while this one is decoded.

        Args:
            questions: pairs of image and instruction; read one ahead of the answers.
            targets: how many objects to name at most in each.

        Yields:
            One answer a question. The first that cannot be answered raises, as in :meth:`segment`.
        """
        workers = self._policy.concurrency
        with ThreadPoolExecutor(workers, thread_name_prefix="segment") as pool:
            waiting: list[Future[SegmentationResult]] = []
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
    ) -> Future[SegmentationResult]:
        """Start a question; one that cannot be asked fails when its turn comes."""
        start = time.perf_counter()
        try:
            picture = self._open(image)
            request = PolicyRequest(
                picture.rgb, instruction, targets, deadline=self._deadline(start)
            )
        except Exception as error:
            failed: Future[SegmentationResult] = Future()
            failed.set_exception(error)
            return failed
        events = self._stream(picture, request, self._encode(picture), start, announces_prior=False)
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
            ``TextDelta`` as the policy writes them, ``PriorEvent`` (unless nothing was found), and the
            ``SegmentationResult``. Closing the generator abandons the request.
        """
        yield from self._events(image, instruction, targets, max_new_tokens, announces_prior=True)

    def _events(
        self,
        image: ImageSource,
        instruction: str,
        targets: int,
        max_new_tokens: int | None,
        *,
        announces_prior: bool,
    ) -> Generator[StreamEvent, None, None]:
        start = time.perf_counter()
        with self._admission.place():
            picture = self._open(image)
            request = PolicyRequest(
                picture.rgb, instruction, targets, max_new_tokens, self._deadline(start)
            )
            yield from self._stream(
                picture, request, self._encode(picture), start, announces_prior=announces_prior
            )

    def _deadline(self, start: float) -> float | None:
        return None if self._timeout_s is None else start + self._timeout_s

    async def asegment(
        self,
        image: ImageSource,
        instruction: str,
        targets: int = 1,
        max_new_tokens: int | None = None,
    ) -> SegmentationResult:
        """Do what :meth:`segment` does without blocking the event loop; cancelling abandons it."""
        answer: SegmentationResult | None = None
        async for event in self.astream(image, instruction, targets, max_new_tokens):
            answer = event if isinstance(event, SegmentationResult) else None
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

    def _open(self, image: ImageSource) -> DecodedImage:
        start = time.perf_counter()
        rgb = load_image(image)
        rgb.setflags(write=False)  # the encoder may still read it when the answer is given
        placed = ResizeTransform.of(rgb, self._geometry)
        require_inside(placed, self.valid_region)
        key = picture_key(rgb) if self._cache.capacity else ""
        return DecodedImage(rgb, placed, key, 1e3 * (time.perf_counter() - start))

    def _encode(self, picture: DecodedImage) -> PendingEmbedding:
        """Start the image encoder, unless this picture's embedding is here or on its way."""
        return PendingEmbedding(*self._cache.get_or_submit(picture.key, picture.rgb))

    def _stream(
        self,
        picture: DecodedImage,
        request: PolicyRequest,
        encoding: PendingEmbedding,
        start: float,
        *,
        announces_prior: bool,
    ) -> Generator[StreamEvent, None, None]:
        try:
            policy_start = time.perf_counter()
            result: PolicyResult | None = None
            for event in self._policy.stream(request):
                if isinstance(event, TextDelta):
                    yield event
                else:
                    result = event
            if result is None:
                raise PolicyError(f"{self._policy.description} ended without a result")
            policy_end = time.perf_counter()
            timings = Timings(
                queue_ms=result.queue_ms,
                image_ms=picture.milliseconds,
                policy_image_ms=result.preprocess_ms,
                prefill_ms=result.prefill_ms,
                decode_ms=result.decode_ms,
                prompt_tokens=result.num_prompt_tokens,
                cached_prompt_tokens=result.num_cached_tokens,
                response_tokens=len(result.token_ids),
                tokens_per_second=1e3 * len(result.token_ids) / max(result.decode_ms, 1e-3),
            )
            num_targets = len(result.concentrations)
            decoded = DecodedTargets.none(picture.placed, self._geometry)
            if num_targets:
                encoded = encoding.wait(request)
                decoded = yield from decode_targets(
                    self._stages,
                    encoded.embedding,
                    result.concentrations,
                    picture.placed,
                    self._geometry,
                    announces_prior=announces_prior,
                )
                hidden_ms = encoded.overlap_ms(policy_start, policy_end)
                timings = replace(
                    timings,
                    image_encoder_ms=0.0 if encoding.was_kept else encoded.milliseconds,
                    image_encoder_hidden_ms=0.0 if encoding.was_kept else hidden_ms,
                    prior_ms=decoded.prior_ms,
                    mask_decoder_ms=decoded.mask_decoder_ms,
                    resize_ms=decoded.resize_ms,
                    reference_to_mask_ms=1e3 * (decoded.finished - policy_end),
                )
            yield SegmentationResult(
                found=num_targets > 0,
                masks=decoded.masks,
                mask_maps=decoded.mask_maps,
                prior_maps=decoded.prior_maps,
                reasoning=result.response.reasoning,
                response=result.response.text,
                reason=(
                    ""
                    if num_targets
                    else f"no <REF_POS> was written: {result.stop_reason.description}"
                ),
                format_faults=tuple(v.description for v in result.response.format_violations),
                instruction=request.instruction,
                timings=replace(timings, total_ms=1e3 * (time.perf_counter() - start)),
                runtime=self.description,
                image=picture.rgb,
            )
        finally:
            self._cache.release(encoding.future)

    def close(self) -> None:
        """Free graphs and policy; an answer that is still under way ends with an error."""
        self._encoder.close()
        self._policy.close()
        self._stages.close()

    def __repr__(self) -> str:
        return f"CoPRS({self.description})"


def _last(events: Iterable[StreamEvent]) -> SegmentationResult:
    """Run a stream to its end and return the answer."""
    answer: StreamEvent | None = None
    for answer in events:  # noqa: B007
        pass
    assert isinstance(answer, SegmentationResult), "a stream ends with its answer"
    return answer
