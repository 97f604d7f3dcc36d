"""The HTTP application: a picture and an instruction in, an answer or a stream of events out.

    GET  /         the page
    GET  /health   200 as soon as questions are taken
    POST /segment  a form with ``image`` (a file), ``instruction``, ``targets``, ``max_new_tokens``

The answer is one JSON object (``SegmentationResult.to_json``), or, with ``Accept: text/event-stream``,
server-sent events (``server/events.py``). An error is ``{"error": what and how to mend it, "type":
its class}`` under a status of its own (``server/failures.py``). A client that goes away takes its
question with it.
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
    """Make the application.

    Args:
        coprs: what answers; it stays the caller's to close.
        max_upload_bytes: largest request.
    """
    app = FastAPI(title="coprs-deploy", version=__version__)
    app.state.coprs = coprs
    app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=max_upload_bytes)
    add_handlers(app)
    return app


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> str:
    """Give the page."""
    return resources.files("coprs_deploy.server").joinpath("page.html").read_text("utf-8")


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """Say that questions are taken, and what answers them."""
    coprs: CoPRS = request.app.state.coprs
    return {"status": "ok", "version": __version__, "runtime": coprs.description}


@router.post("/segment", response_model=None)
async def segment(
    request: Request,
    image: Annotated[UploadFile, File(description="a picture file, as Pillow reads it")],
    instruction: Annotated[str, Form(description="what to segment, in words")],
    targets: Annotated[int, Form(ge=1, description="objects to name at most")] = 1,
    max_new_tokens: Annotated[int | None, Form(ge=1, description="token budget")] = None,
) -> Response:
    """Answer one instruction on one picture."""
    coprs: CoPRS = request.app.state.coprs
    picture = await image.read()
    if EVENT_STREAM in request.headers.get("accept", ""):
        rgb = await run_in_threadpool(load_image, picture)
        stream = coprs.astream(rgb, instruction, targets, max_new_tokens)
        events = encode_events(rgb, stream)
        # A question that cannot be asked fails here, while there is still a status to say so.
        first = await _unless_gone(request, anext(events))
        if first is None:
            await events.aclose()
            return _nobody()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_chain(first, events), media_type=EVENT_STREAM, headers=headers)
    answer = await _unless_gone(
        request, coprs.asegment(picture, instruction, targets, max_new_tokens)
    )
    if answer is None:
        return _nobody()
    return JSONResponse(await run_in_threadpool(answer.to_json))


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """Wait for some work; when the client goes away first, cancel it and give None."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
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


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _nobody() -> Response:
    """Answer a client that went away, for the log."""
    return Response(status_code=499)
