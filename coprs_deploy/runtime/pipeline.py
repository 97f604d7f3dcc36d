"""Steps of one request: the image is encoded while the policy writes, then masks are decoded."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from coprs_deploy.engines import SegmentationGraphs
from coprs_deploy.errors import CoPRSError, PolicyError
from coprs_deploy.images import ImageSource, ResizeTransform, check_valid_region, load_image
from coprs_deploy.policy import Policy, PolicyRequest, PolicyResult, TextDelta
from coprs_deploy.runtime.concurrency import UploadedImage
from coprs_deploy.runtime.deadline import DeadlineEstimates
from coprs_deploy.runtime.encoder import (
    DecodedImage,
    EmbeddingCache,
    EncoderQueue,
    PendingEmbedding,
    content_key,
)
from coprs_deploy.runtime.options import RequestOptions, RuntimeOptions
from coprs_deploy.runtime.result import PriorEvent, SegmentationResult
from coprs_deploy.runtime.target_decoding import DecodedTargets, decode_targets
from coprs_deploy.specs import Geometry

StreamEvent: TypeAlias = TextDelta | PriorEvent | SegmentationResult

RequestImage: TypeAlias = ImageSource | DecodedImage | UploadedImage
"""Image of a request; one that was uploaded waits for memory before it is decoded."""


@dataclass(frozen=True)
class PreparedRequest:
    """A request that was checked, and whose image is being encoded since ``start``."""

    start: float
    image: DecodedImage
    request: PolicyRequest
    pending: PendingEmbedding


class RequestPipeline:
    """Graphs and policy, and what requests share: embeddings, and estimates of their times.

    Args:
        graphs: image encoder, prior and mask decoder.
        policy: writes the reasoning.
        geometry: sizes of the graphs.
        options: size of the cache, and the time limit of a request.

    Attributes:
        description: runtimes and devices of graphs and policy.
        cache: embeddings of images.
        is_closed: whether it was closed; running requests end with an error.
    """

    def __init__(
        self,
        graphs: SegmentationGraphs,
        policy: Policy,
        geometry: Geometry,
        options: RuntimeOptions,
    ) -> None:
        self._graphs, self._policy, self._geometry = graphs, policy, geometry
        self._timeout_s = options.timeout_s
        self._estimates = DeadlineEstimates()
        self._queue = EncoderQueue(graphs, geometry)
        self.cache = EmbeddingCache(options.max_cached_images, self._queue)
        self.is_closed = False
        region = graphs.valid_region
        runtimes = " + ".join(dict.fromkeys(r.description for r in graphs.runners.values()))
        accepted = "" if region is None else f" for {region}"
        if region is not None and region.drops_padding:
            accepted += ", padding dropped"
        self.description = f"graphs: {runtimes}{accepted}; policy: {policy.description}"

    def close(self) -> None:
        """Free graphs and policy."""
        self._queue.close()
        try:
            self._policy.close()
        finally:
            self._graphs.close()

    def time_limit(self, arrival: float) -> float | None:
        """Return the clock's value at which a request ends with an error; None for no limit."""
        return None if self._timeout_s is None else arrival + self._timeout_s

    def decode(self, source: RequestImage) -> DecodedImage:
        """Decode and check an image; see :meth:`CoPRS.decode`."""
        if isinstance(source, DecodedImage):
            return source
        start, waited_ms = time.perf_counter(), 0.0
        if isinstance(source, UploadedImage):
            rgb = source.decode()
            start, waited_ms = source.decode_started, source.waited_ms
        else:
            rgb = load_image(source)
        rgb.setflags(write=False)  # the encoder may still read it when the result is returned
        resize = ResizeTransform.of(rgb, self._geometry)
        check_valid_region(resize, self._graphs.valid_region)
        key = content_key(rgb) if self.cache.capacity else ""
        return DecodedImage(rgb, resize, key, 1e3 * (time.perf_counter() - start), waited_ms)

    def prepare(
        self,
        source: RequestImage,
        instruction: str,
        options: RequestOptions,
        start: float,
        arrival: float,
        *,
        abandoned: threading.Event | None = None,
    ) -> PreparedRequest:
        """Check the request and submit its image to the encoder; the caller must release it."""
        deadline = self.time_limit(arrival)
        image = self.decode(source)
        request = PolicyRequest(
            image.rgb,
            instruction,
            options.max_targets,
            options.max_new_tokens,
            deadline,
            options.reasoning_budget,
            abandoned=abandoned or threading.Event(),
        )
        pending = self.cache.get_or_submit(image)
        try:
            due = self._estimates.reasoning_deadline(
                start, options.deadline_ms, is_encoded=pending.future.done()
            )
        except ValueError:
            pending.release()
            raise
        return PreparedRequest(start, image, replace(request, reasoning_deadline=due), pending)

    def start(
        self,
        source: RequestImage,
        instruction: str,
        options: RequestOptions,
        *,
        stream_prior: bool = False,
        start: float | None = None,
        arrival: float | None = None,
        abandoned: threading.Event | None = None,
    ) -> Generator[StreamEvent, None, None]:
        """Check the request and submit its image to the encoder; return the rest to be run."""
        start = time.perf_counter() if start is None else start
        arrival = start if arrival is None else arrival
        prepared = self.prepare(source, instruction, options, start, arrival, abandoned=abandoned)
        return self._run(prepared, stream_prior)

    def _run(
        self, prepared: PreparedRequest, stream_prior: bool
    ) -> Generator[StreamEvent, None, None]:
        try:
            policy_start = time.perf_counter()
            answer = yield from self._run_policy(prepared.request)
            yield from self.finish(prepared, answer, policy_start, stream_prior=stream_prior)
        except Exception as error:
            if self.is_closed and not isinstance(error, CoPRSError):
                raise CoPRSError("CoPRS was closed during the request") from error
            raise
        finally:
            prepared.pending.release()

    def finish(
        self,
        prepared: PreparedRequest,
        result: PolicyResult,
        policy_start: float,
        *,
        stream_prior: bool = False,
    ) -> Generator[StreamEvent, None, None]:
        """Decode the masks of a response that has just ended; yield the result."""
        policy_end = time.perf_counter()
        image, request, pending = prepared.image, prepared.request, prepared.pending
        decoded = DecodedTargets.none(image.resize, self._geometry)
        encoder_ms = overlap_ms = reference_to_mask_ms = 0.0
        if len(result.concentrations):
            encoded = pending.wait(request)
            decoded = yield from decode_targets(
                self._graphs,
                encoded.embedding,
                result.concentrations,
                image.resize,
                self._geometry,
                stream_prior=stream_prior,
            )
            reference_to_mask_ms = 1e3 * (decoded.finished - policy_end) - decoded.paused_ms
            begin = max(policy_end, encoded.finished)
            self._estimates.masks.add(time.perf_counter() - begin - decoded.paused_ms / 1e3)
            if not pending.is_cached:
                encoder_ms = encoded.duration_ms
                overlap_ms = encoded.overlap_ms(policy_start, policy_end)
                self._estimates.encoder.add(encoder_ms / 1e3)
        self._estimates.prompt.add((result.preprocess_ms + result.prefill_ms) / 1e3)
        num_tokens = len(result.token_ids)
        timings = replace(
            decoded.timings,
            queue_ms=image.waited_ms + result.queue_ms,
            image_decode_ms=image.decode_ms,
            policy_preprocess_ms=result.preprocess_ms,
            image_encoder_ms=encoder_ms,
            image_encoder_overlap_ms=overlap_ms,
            prefill_ms=result.prefill_ms,
            decode_ms=result.decode_ms,
            reference_to_mask_ms=reference_to_mask_ms,
            total_ms=1e3 * (time.perf_counter() - prepared.start),
            prompt_tokens=result.num_prompt_tokens,
            cached_prompt_tokens=result.num_cached_tokens,
            response_tokens=num_tokens,
            tokens_per_second=1e3 * num_tokens / max(result.decode_ms, 1e-3),
        )
        yield SegmentationResult(
            masks=decoded.masks,
            reasoning=result.response.reasoning,
            response=result.response.text,
            stop_reason=result.stop_reason.value,
            format_violations=tuple(v.value for v in result.response.format_violations),
            instruction=request.instruction,
            timings=timings,
            runtime=self.description,
            image=image.rgb,
            _mask_logits=decoded.mask_logits,
            _prior_logits=decoded.prior_logits,
        )

    def _run_policy(self, request: PolicyRequest) -> Generator[TextDelta, None, PolicyResult]:
        result: PolicyResult | None = None
        for event in self._policy.stream(request):
            if isinstance(event, TextDelta):
                if self.is_closed:
                    raise CoPRSError("CoPRS was closed during the request")
                yield event
            else:
                result = event
        if result is None:
            raise PolicyError(f"{self._policy.description} ended without a result")
        return result


def last_result(events: Iterable[StreamEvent]) -> SegmentationResult:
    """Run a stream to its end and return the result."""
    (*_, result) = events
    assert isinstance(result, SegmentationResult), "a stream ends with its result"
    return result
