"""``POST /segment``: one request, answered by JSON or by a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import Any, TypeAlias

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from coprs_deploy.errors import error_body
from coprs_deploy.runtime import CoPRS, SegmentationResult
from coprs_deploy.runtime.concurrency import UploadedImage
from coprs_deploy.server.bodies import EVENT_STREAM
from coprs_deploy.server.events import StreamEvent, encode_events
from coprs_deploy.server.metrics import ServerMetrics
from coprs_deploy.server.request_body import SegmentRequest
from coprs_deploy.server.request_record import RequestRecord
from coprs_deploy.server.result_formats import result_json
from coprs_deploy.server.steps import run_step

Events: TypeAlias = AsyncGenerator[tuple[int | None, StreamEvent], None]


async def respond(request: Request, requested: SegmentRequest) -> Response:
    """Segment the image of a request."""
    state = request.app.state
    coprs: CoPRS = state.coprs
    metrics: ServerMetrics = state.metrics
    record = RequestRecord.of(request.scope)
    record.num_instructions = len(requested.instructions)
    image = UploadedImage(requested.image, state.image_memory)
    await run_step(image.check_size, state.max_pixels)
    accepts_stream = _accepts_stream(request.headers.get("accept", ""))
    events = _observe(_events(coprs, image, requested), metrics, record)
    if accepts_stream:
        work = _stream_events(events, requested, record)
    else:
        work = _return_result(events, requested)
    response = await _unless_disconnected(request, work)
    return response or Response(status_code=499)  # for the log only


async def _events(coprs: CoPRS, image: UploadedImage, requested: SegmentRequest) -> Events:
    options = asdict(requested.options)
    if requested.is_list:
        several = coprs.astream_instructions(image, requested.instructions, **options)
        async with aclosing(several):
            async for index, event in several:
                yield index, event
        return
    single = coprs.astream(image, requested.instructions[0], **options)
    async with aclosing(single):
        async for event in single:
            yield None, event


async def _observe(events: Events, metrics: ServerMetrics, record: RequestRecord) -> Events:
    async with aclosing(events):
        async for index, event in events:
            if isinstance(event, SegmentationResult):
                metrics.observe_result(event)
                record.timings.append(event.timings)
            elif isinstance(event, Exception):
                record.error = type(event).__name__
            yield index, event


async def _return_result(events: Events, requested: SegmentRequest) -> Response:
    async with aclosing(events):
        results = {
            index or 0: event
            async for index, event in events
            if isinstance(event, SegmentationResult | Exception)
        }
    errors = [each for each in results.values() if isinstance(each, Exception)]
    if len(errors) == len(results):
        raise errors[0]

    def encode() -> Response:
        contents = [_content(results[i], requested) for i in range(len(results))]
        return JSONResponse({"results": contents} if requested.is_list else contents[0])

    return await run_step(encode)


def _content(result: SegmentationResult | Exception, requested: SegmentRequest) -> dict[str, Any]:
    if isinstance(result, Exception):
        return dict(error_body(result))
    return result_json(result, requested.formats)


async def _stream_events(
    events: Events, requested: SegmentRequest, record: RequestRecord
) -> Response:
    encoded = encode_events(events, lambda result: result_json(result, requested.formats), record)
    first = await anext(encoded)  # an invalid request fails here, before the status is sent
    return _EventStreamResponse(first, encoded)


class _EventStreamResponse(StreamingResponse):
    """Server-sent events; the generator is closed, whatever ends the response."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        async def chain() -> AsyncGenerator[bytes, None]:
            yield first
            async for event in rest:
                yield event

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chain(), media_type=EVENT_STREAM, headers=headers)
        self._events = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


def _accepts_stream(accept: str) -> bool:
    """Whether an Accept header names the event stream, and JSON with no higher quality."""
    qualities = {}
    for part in accept.lower().split(","):
        media_type, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        with suppress(ValueError):
            qualities[media_type] = float(quality)
    wanted = qualities.get(EVENT_STREAM, 0.0)
    return wanted > 0 and wanted >= qualities.get("application/json", 0.0)


async def _unless_disconnected(
    request: Request, work: Coroutine[Any, Any, Response]
) -> Response | None:
    """Await the work; cancel it and return None if the client disconnects first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return None
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
