"""Mapping of errors to HTTP statuses and JSON bodies."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from coprs_deploy.errors import (
    CoPRSError,
    QueueFullError,
    RequestTimeoutError,
    error_body,
    shorten,
)

STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (QueueFullError, 503),
    (RequestTimeoutError, 504),
    (ValueError, 422),  # includes ImageError and InstructionError
    (CoPRSError, 500),
)
"""Status of each error class; the first match counts."""

RETRY_AFTER = {503: {"Retry-After": "1"}}
"""Retry header by status, in seconds."""

FORM = (
    "accepted: a form with image (a file), instruction, and optional max_targets, max_new_tokens, "
    "max_reasoning_tokens, deadline_ms, reasoning"
)
NOT_FOUND = "Not found. Endpoints: GET /, /health, /samples, /openapi.json; POST /segment"


def add_handlers(app: FastAPI) -> None:
    """Register the handlers of all errors."""
    app.add_exception_handler(RequestValidationError, _invalid_form)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(Exception, _unexpected)
    for error_class, _ in STATUSES:
        app.add_exception_handler(error_class, _failed)


async def _failed(request: Request, error: Exception) -> Response:
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    return JSONResponse(error_body(error), status, RETRY_AFTER.get(status))


async def _unexpected(request: Request, error: Exception) -> Response:
    """Hide the text of a bug from the client; the server logs its traceback."""
    message = "internal error; the log of the server has its traceback"
    return JSONResponse(error_body(error, message), 500)


async def _invalid_form(request: Request, error: Exception) -> Response:
    """Convert form validation errors into the JSON error envelope."""
    assert isinstance(error, RequestValidationError)
    problems = "; ".join(_problem(problem) for problem in error.errors())
    return _request_error(f"{problems}; {FORM}", 422)


def _problem(problem: dict[str, Any]) -> str:
    field = problem["loc"][-1]
    if field == "image" and isinstance(problem["input"], str):
        return f"image is {problem['input'][:40]!r}, text instead of a file (curl: image=@FILE)"
    return f"{field}: {problem['msg']}"


async def _not_routed(request: Request, error: Exception) -> Response:
    """Convert 404, 405, 408 and malformed multipart into the JSON error envelope."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {shorten(request.url.path)}"
    if error.status_code in (404, 405):
        message = f"{place}: {NOT_FOUND}"
    else:
        message = f"{place}: {error.detail}; {FORM}"
    return _request_error(message, error.status_code, error.headers)


def _request_error(message: str, status: int, headers: Any = None) -> Response:
    return JSONResponse({"error": message, "type": "RequestError"}, status, headers)
