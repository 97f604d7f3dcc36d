"""The HTTP application.

    GET  /              web page; its files are below /page
    GET  /docs          the interface, to read and try; its files are below /docs/assets
    GET  /openapi.json  description of the interface
    GET  /samples       images with instructions to try, for the demo model
    GET  /health        state of the server; /health/live and /health/ready for an orchestrator
    GET  /metrics       metrics for Prometheus (``server/metrics.py``)
    POST /segment       form or JSON (``server/request_body.py``)

The response is one JSON object (``SegmentationResult.to_json``), or server-sent events
(``server/events.py``) if the client accepts ``text/event-stream``. An error is
``{"error": message, "type": class name}`` with its own status (``server/error_handlers.py``). A
client that disconnects cancels its request.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from PIL import EpsImagePlugin
from starlette.staticfiles import StaticFiles

from coprs_deploy import demo
from coprs_deploy.images import MAX_IMAGE_PIXELS
from coprs_deploy.machine import return_freed_blocks
from coprs_deploy.runtime import CoPRS
from coprs_deploy.runtime.concurrency import MAX_IMAGE_BYTES, ImageMemory
from coprs_deploy.server.api_keys import ApiKeys
from coprs_deploy.server.bodies import (
    COMMON_RESPONSES,
    KEY_RESPONSES,
    SEGMENT_RESPONSES,
    STOPPING,
    HealthBody,
    ResultBody,
    ResultsBody,
    SampleBody,
    ServerStatus,
)
from coprs_deploy.server.error_handlers import add_handlers
from coprs_deploy.server.metrics import ServerMetrics
from coprs_deploy.server.openapi import DESCRIPTION, SEGMENT_BODY, add_document
from coprs_deploy.server.request_body import read_request
from coprs_deploy.server.request_guard import RequestGuard
from coprs_deploy.server.request_log import RequestLog
from coprs_deploy.server.request_record import REQUEST_ID_HEADER, RequestRecord
from coprs_deploy.server.segmentation import respond
from coprs_deploy.version import __version__

STALL_TIMEOUT_S = 30.0
"""How long a client may send nothing of its body, or read nothing of its response."""

MIN_BYTES_PER_S = 4096.0
"""Least average rate of a body: 8 MiB have to arrive within 35 minutes."""

PAGE = resources.files("coprs_deploy.server") / "page"

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of the web pages: nothing is loaded from, or sent to, another server."""

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

public = APIRouter()
protected = APIRouter()


def build_app(
    coprs: CoPRS,
    max_upload_bytes: int,
    *,
    api_key: str = "",
    api_keys: ApiKeys | None = None,
    root_path: str = "",
    cors_origins: Sequence[str] = (),
    stall_timeout_s: float = STALL_TIMEOUT_S,
    min_bytes_per_s: float = MIN_BYTES_PER_S,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    max_pixels: int = MAX_IMAGE_PIXELS,
    has_samples: bool = False,
    span_processor: SpanProcessor | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        coprs: serves the requests; closing it is left to the caller.
        max_upload_bytes: size limit of a request.
        api_key: a single key that ``POST`` needs in ``Authorization: Bearer KEY``; empty for none.
        api_keys: keys with names and limits, instead of ``api_key``.
        root_path: path under which a reverse proxy serves the application, as ``/segmentation``.
        cors_origins: origins whose pages may use the server; ``*`` for any.
        stall_timeout_s: how long a client may send or read nothing, in seconds.
        min_bytes_per_s: least average rate at which a body has to arrive.
        max_image_bytes: memory of the decoded images; further requests wait.
        max_pixels: pixels of an image.
        has_samples: offer the sample images of the demo model.
        span_processor: where a span of each request goes (``server/tracing.py``); None for none.
    """
    app = FastAPI(
        title="coprs-deploy",
        summary="Reasoning segmentation: an image and an instruction become masks.",
        description=DESCRIPTION,
        version=__version__,
        docs_url=None,  # its page loads scripts from another server
        redoc_url=None,
        responses=COMMON_RESPONSES,
    )
    EpsImagePlugin.gs_binary = False  # PostScript is a program, which may never end
    return_freed_blocks()  # else images of many sizes fragment the memory, which grows for hours
    if api_key:
        api_keys = ApiKeys(api_key)
    app.state.coprs = coprs
    app.state.image_memory = ImageMemory(max_image_bytes)
    app.state.max_pixels = max_pixels
    app.state.is_stopping = False
    app.state.active = []
    app.state.samples = _read_samples() if has_samples else []
    app.include_router(public)
    app.mount("/page", StaticFiles(packages=[("coprs_deploy.server", "page")]))
    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_offline", "static")]))
    if has_samples:
        app.mount("/samples", StaticFiles(directory=demo.SAMPLES))
    if api_keys is not None:
        bearer = [Depends(HTTPBearer(auto_error=False))]  # for the document; RequestGuard checks
        app.include_router(protected, dependencies=bearer, responses=KEY_RESPONSES)
    else:
        app.include_router(protected)
    add_document(app)
    app.state.methods = _methods(public, protected)
    paths = frozenset({"/openapi.json", *app.state.methods})
    app.state.metrics = ServerMetrics(coprs, app.state.image_memory, paths)
    app.add_middleware(
        RequestGuard,
        max_bytes=max_upload_bytes,
        api_keys=api_keys,
        root_path=root_path,
        stall_timeout_s=stall_timeout_s,
        min_bytes_per_s=min_bytes_per_s,
    )
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", REQUEST_ID_HEADER],
            expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
        )
    app.add_middleware(RequestLog, metrics=app.state.metrics, root_path=root_path)
    if span_processor is not None:
        from coprs_deploy.server.tracing import RequestTracing

        app.add_middleware(RequestTracing, processor=span_processor)
    add_handlers(app)
    return app


def _get(path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
    """Register an endpoint for GET, and for HEAD, which the server answers without the body."""

    def register(endpoint: Endpoint) -> Endpoint:
        public.head(path, **{**options, "include_in_schema": False})(endpoint)
        return public.get(path, **options)(endpoint)

    return register


@_get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> Response:
    """Return the web page."""
    return _page("index.html")


@_get("/docs", response_class=HTMLResponse, include_in_schema=False)
async def docs() -> Response:
    """Return the page of the interface."""
    return _page("docs.html")


@_get("/samples")
async def samples(request: Request) -> list[SampleBody]:
    """List images with instructions to try; empty but for the demo model."""
    listed: list[SampleBody] = request.app.state.samples
    return listed


@_get("/health", response_model_exclude_none=True)
async def health(request: Request, request_id: str = "") -> HealthBody:
    """Report state, version, runtime, and how many requests are running or queued.

    With `request_id`, the `X-Request-ID` of one that is active, it says how many are before it.
    """
    state = _health(request)
    ids = [record.request_id for record in request.app.state.active]
    if request_id in ids:
        state.requests_ahead = ids.index(request_id)
    return state


@_get("/health/live", response_model_exclude_none=True)
async def live(request: Request) -> HealthBody:
    """Report that the process answers: for a liveness probe."""
    return _health(request)


@_get("/health/ready", response_model=HealthBody, responses=STOPPING)
async def ready(request: Request) -> Response:
    """Report whether requests are accepted: for a readiness probe and load balancers."""
    state = _health(request)
    content = state.model_dump(exclude_none=True)
    return JSONResponse(content, 200 if state.status == "ok" else 503)


@_get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Metrics", "content": {"text/plain": {"schema": {}}}}},
)
async def metrics(request: Request) -> Response:
    """Return metrics in the format of Prometheus, or of OpenMetrics if that is accepted."""
    collected: ServerMetrics = request.app.state.metrics
    content, media_type = collected.write(request.headers.get("accept", ""))
    return Response(content, media_type=media_type)


async def _list_active(request: Request) -> AsyncIterator[None]:
    """List a request among the active ones, in the order of arrival, until its response ends."""
    record, active = RequestRecord.of(request.scope), request.app.state.active
    active.append(record)
    try:
        yield
    finally:
        active[:] = [each for each in active if each is not record]


@protected.post(
    "/segment",
    dependencies=[Depends(_list_active)],
    response_model=ResultBody | ResultsBody,
    responses=SEGMENT_RESPONSES,
    openapi_extra=SEGMENT_BODY,
)
async def segment(request: Request) -> Response:
    """Segment one image by one or several instructions."""
    request.app.state.coprs.check_queue()  # before the body is read
    async with read_request(request) as requested:
        return await respond(request, requested)


def _health(request: Request) -> HealthBody:
    coprs: CoPRS = request.app.state.coprs
    status: ServerStatus = "stopping" if request.app.state.is_stopping else "ok"
    return HealthBody(
        status="closed" if coprs.is_closed else status,
        version=__version__,
        runtime=coprs.description,
        active_requests=coprs.num_active,
    )


def _page(name: str) -> Response:
    return HTMLResponse(PAGE.joinpath(name).read_text("utf-8"), headers=PAGE_HEADERS)


def _methods(*routers: APIRouter) -> dict[str, set[str]]:
    """Return the methods of each path."""
    methods: dict[str, set[str]] = {}
    for route in (each for router in routers for each in router.routes):
        assert isinstance(route, APIRoute)
        methods.setdefault(route.path, set()).update(route.methods or ())
    return methods


def _read_samples() -> list[SampleBody]:
    listed = json.loads((demo.SAMPLES / "samples.json").read_text("utf-8"))
    return [SampleBody(**{**each, "image": f"samples/{each['image']}"}) for each in listed]
