"""What a request is told when it cannot be answered."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from coprs_deploy.errors import CoPRSError, QueueFullError, RequestTimeoutError

STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (QueueFullError, 503),
    (RequestTimeoutError, 504),
    (ValueError, 422),  # also ImageError and InstructionError
    (CoPRSError, 500),
)
"""The first that fits is the status of an error."""

RETRY_AFTER = {503: {"Retry-After": "1"}}
"""Seconds after which to ask again, by status."""

FORM = "send a form with image (a file) and instruction, and if wanted targets and max_new_tokens"
PATHS = "there are GET /, GET /health, GET /docs and POST /segment"


def failure_body(error: Exception) -> dict[str, str]:
    """Say what went wrong, as every answer says it."""
    return {"error": str(error), "type": type(error).__name__}


def add_handlers(app: FastAPI) -> None:
    """Answer every error that is raised on purpose with its status."""
    app.add_exception_handler(RequestValidationError, _bad_form)
    app.add_exception_handler(HTTPException, _not_routed)
    for kind, _ in STATUSES:
        app.add_exception_handler(kind, _failed)


async def _failed(request: Request, error: Exception) -> Response:
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    return JSONResponse(failure_body(error), status, RETRY_AFTER.get(status))


async def _bad_form(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = "; ".join(_fault(fault) for fault in error.errors())
    return JSONResponse({"error": f"{faults}; {FORM}", "type": "RequestError"}, 422)


def _fault(fault: dict[str, Any]) -> str:
    field = fault["loc"][-1]
    if field == "image" and isinstance(fault["input"], str):
        return f"image: {fault['input'][:40]!r} is text, not a file (curl takes image=@FILE)"
    return f"{field}: {fault['msg']}"


async def _not_routed(request: Request, error: Exception) -> Response:
    """Tell of a path or method that there is not, or of a body that is no form."""
    assert isinstance(error, HTTPException)
    mend = PATHS if error.status_code in (404, 405) else FORM
    message = f"{request.method} {request.url.path}: {error.detail}; {mend}"
    body = {"error": message, "type": "RequestError"}
    return JSONResponse(body, error.status_code, error.headers)
