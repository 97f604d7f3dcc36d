"""The HTTP application.

    GET  /              web page; its files are below /page
    GET  /samples       images with instructions to try, for the demo model
    GET  /health        200 as soon as requests are accepted
    GET  /openapi.json  description of the interface
    POST /segment       form with ``image`` (a file), ``instruction``, ``max_targets``,
                        ``max_new_tokens``, ``max_reasoning_tokens``, ``deadline_ms``,
                        ``reasoning``

The response is one JSON object (``SegmentationResult.to_json``), or server-sent events
(``server/events.py``) if the client accepts ``text/event-stream``. An error is
``{"error": message, "type": class name}`` with its own status (``server/error_handlers.py``). A
client that disconnects cancels its request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import resources
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from coprs_deploy import demo
from coprs_deploy.docstrings import attribute_docs
from coprs_deploy.prompts import MAX_INSTRUCTION_CHARS
from coprs_deploy.runtime import CoPRS
from coprs_deploy.runtime.concurrency import MAX_IMAGE_BYTES, ImageMemory, UploadedImage
from coprs_deploy.runtime.options import RequestOptions
from coprs_deploy.server.bodies import (
    COMMON_RESPONSES,
    EVENT_STREAM,
    SEGMENT_RESPONSES,
    UNAUTHORIZED,
    HealthBody,
    ResultBody,
    SampleBody,
)
from coprs_deploy.server.error_handlers import add_handlers
from coprs_deploy.server.events import encode_events
from coprs_deploy.server.request_guard import RequestGuard
from coprs_deploy.server.steps import run_step
from coprs_deploy.version import __version__

STALL_TIMEOUT_S = 30.0
"""How long a client may send nothing of its body, or read nothing of its response."""

PAGE = resources.files("coprs_deploy.server") / "page"

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of the web page: nothing is loaded from, or sent to, another server."""

public = APIRouter()
protected = APIRouter()


def build_app(
    coprs: CoPRS,
    max_upload_bytes: int,
    *,
    api_key: str = "",
    root_path: str = "",
    cors_origins: Sequence[str] = (),
    stall_timeout_s: float = STALL_TIMEOUT_S,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    has_samples: bool = False,
) -> FastAPI:
    """Build the application.

    Args:
        coprs: serves the requests; closing it is left to the caller.
        max_upload_bytes: size limit of a request.
        api_key: key that ``POST`` needs in ``Authorization: Bearer KEY``; empty for none.
        root_path: path under which a reverse proxy serves the application, as ``/segmentation``.
        cors_origins: origins whose pages may use the server; ``*`` for any.
        stall_timeout_s: how long a client may send or read nothing, in seconds.
        max_image_bytes: memory of the decoded images; further requests wait.
        has_samples: offer the sample images of the demo model.
    """
    app = FastAPI(
        title="coprs-deploy",
        version=__version__,
        docs_url=None,  # its page loads scripts from another server
        redoc_url=None,
        responses=COMMON_RESPONSES,
    )
    app.state.coprs = coprs
    app.state.image_memory = ImageMemory(max_image_bytes)
    app.state.samples = _read_samples() if has_samples else []
    app.include_router(public)
    app.mount("/page", StaticFiles(packages=[("coprs_deploy.server", "page")]))
    if has_samples:
        app.mount("/samples", StaticFiles(directory=demo.SAMPLES))
    if api_key:
        bearer = [Depends(HTTPBearer(auto_error=False))]  # for the document; RequestGuard checks
        app.include_router(protected, dependencies=bearer, responses=UNAUTHORIZED)
    else:
        app.include_router(protected)
    app.add_middleware(
        RequestGuard,
        max_bytes=max_upload_bytes,
        api_key=api_key,
        root_path=root_path,
        stall_timeout_s=stall_timeout_s,
    )
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization"],
        )
    add_handlers(app)
    return app


@public.get("/", response_class=HTMLResponse, include_in_schema=False)
@public.head("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> Response:
    """Return the web page."""
    content = PAGE.joinpath("index.html").read_text("utf-8")
    return HTMLResponse(content, headers=PAGE_HEADERS)


@public.get("/samples")
async def samples(request: Request) -> list[SampleBody]:
    """List images with instructions to try; empty but for the demo model."""
    listed: list[SampleBody] = request.app.state.samples
    return listed


@public.head("/health", include_in_schema=False)
@public.get("/health")
async def health(request: Request) -> HealthBody:
    """Report readiness, version, runtime, and how many requests are running or queued."""
    coprs: CoPRS = request.app.state.coprs
    return HealthBody(
        status="ok",
        version=__version__,
        runtime=coprs.description,
        active_requests=coprs.num_active,
    )


_ABOUT = attribute_docs(RequestOptions)


def request_options(
    max_targets: Annotated[int, Form(ge=1, description=_ABOUT["max_targets"])] = 1,
    max_new_tokens: Annotated[int | None, Form(ge=1, description=_ABOUT["max_new_tokens"])] = None,
    max_reasoning_tokens: Annotated[
        int | None, Form(ge=1, description=_ABOUT["max_reasoning_tokens"])
    ] = None,
    deadline_ms: Annotated[float | None, Form(gt=0, description=_ABOUT["deadline_ms"])] = None,
    reasoning: Annotated[Literal["full", "none"], Form(description=_ABOUT["reasoning"])] = "full",
) -> RequestOptions:
    """Read the options of a request from its form."""
    return RequestOptions(max_targets, max_new_tokens, max_reasoning_tokens, deadline_ms, reasoning)


@protected.post("/segment", response_model=ResultBody, responses=SEGMENT_RESPONSES)
async def segment(
    request: Request,
    image: Annotated[UploadFile, File(description="an image file that Pillow can read")],
    instruction: Annotated[
        str, Form(description="what to segment", max_length=MAX_INSTRUCTION_CHARS)
    ],
    options: Annotated[RequestOptions, Depends(request_options)],
) -> Response:
    """Segment one image by one instruction."""
    coprs: CoPRS = request.app.state.coprs
    accepts_stream = _accepts_stream(request.headers.get("accept", ""))
    respond = _stream_events if accepts_stream else _return_result
    uploaded = UploadedImage(image.file, request.app.state.image_memory)
    work = respond(coprs, uploaded, instruction, options)
    response = await _unless_disconnected(request, work)
    return response or Response(status_code=499)  # for the log only


async def _return_result(
    coprs: CoPRS, image: UploadedImage, instruction: str, options: RequestOptions
) -> Response:
    result = await coprs.asegment(image, instruction, **asdict(options))
    return await run_step(lambda: JSONResponse(result.to_json()))


async def _stream_events(
    coprs: CoPRS, image: UploadedImage, instruction: str, options: RequestOptions
) -> Response:
    events = encode_events(coprs.astream(image, instruction, **asdict(options)))
    first = await anext(events)  # an invalid request fails here, before the status is sent
    return _EventStreamResponse(first, events)


def _read_samples() -> list[SampleBody]:
    listed = json.loads((demo.SAMPLES / "samples.json").read_text("utf-8"))
    return [SampleBody(**{**each, "image": f"samples/{each['image']}"}) for each in listed]


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
