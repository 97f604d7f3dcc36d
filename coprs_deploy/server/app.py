"""The HTTP application.

    GET  /         web page
    GET  /health   200 as soon as requests are accepted
    POST /segment  form with ``image`` (a file), ``instruction``, ``max_targets``,
                   ``max_new_tokens``

The response is one JSON object (``SegmentationResult.to_json``), or server-sent events
(``server/events.py``) with ``Accept: text/event-stream``. An error is
``{"error": message, "type": class name}`` with its own status (``server/error_handlers.py``). A
client that disconnects cancels its request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from importlib import resources
from typing import Annotated, TypeVar

from fastapi import APIRouter, FastAPI, File, Form, Request, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from coprs_deploy.images import load_image
from coprs_deploy.runtime import CoPRS
from coprs_deploy.server.body_limit import BodyLimit
from coprs_deploy.server.error_handlers import add_handlers
from coprs_deploy.server.events import EVENT_STREAM, encode_events
from coprs_deploy.version import __version__

T = TypeVar("T")

router = APIRouter()


def build_app(coprs: CoPRS, max_upload_bytes: int) -> FastAPI:
    """Build the application.

    Args:
        coprs: serves the requests; closing it is left to the caller.
        max_upload_bytes: size limit of a request.
    """
    app = FastAPI(title="coprs-deploy", version=__version__)
    app.state.coprs = coprs
    app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=max_upload_bytes)
    add_handlers(app)
    return app


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> str:
    """Return the web page."""
    return resources.files("coprs_deploy.server").joinpath("page.html").read_text("utf-8")


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """Report readiness, version and runtime."""
    coprs: CoPRS = request.app.state.coprs
    return {"status": "ok", "version": __version__, "runtime": coprs.description}


@router.post("/segment", response_model=None)
async def segment(
    request: Request,
    image: Annotated[UploadFile, File(description="an image file that Pillow can read")],
    instruction: Annotated[str, Form(description="what to segment")],
    max_targets: Annotated[int, Form(ge=1, description="maximum number of targets")] = 1,
    max_new_tokens: Annotated[int | None, Form(ge=1, description="token budget")] = None,
) -> Response:
    """Segment one image by one instruction."""
    coprs: CoPRS = request.app.state.coprs
    data = await image.read()
    if EVENT_STREAM in request.headers.get("accept", ""):
        rgb = await run_in_threadpool(load_image, data)
        stream = coprs.astream(rgb, instruction, max_targets, max_new_tokens)
        events = encode_events(rgb, stream)
        # An invalid request fails here, before the status is sent.
        first = await _unless_disconnected(request, anext(events))
        if first is None:
            await events.aclose()
            return _disconnected()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_chain(first, events), media_type=EVENT_STREAM, headers=headers)
    result = await _unless_disconnected(
        request, coprs.asegment(data, instruction, max_targets, max_new_tokens)
    )
    if result is None:
        return _disconnected()
    return JSONResponse(await run_in_threadpool(result.to_json))


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T | None:
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


def _disconnected() -> Response:
    """Return a response for the log only: the client has disconnected."""
    return Response(status_code=499)
