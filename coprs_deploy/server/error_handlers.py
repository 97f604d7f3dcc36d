"""Mapping of errors to HTTP statuses and JSON bodies."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from coprs_deploy.errors import (
    MAX_MESSAGE_LENGTH,
    CoPRSError,
    QueueFullError,
    RequestTimeoutError,
    error_body,
    shorten,
)
from coprs_deploy.server.request_body import FILE_EXPECTED
from coprs_deploy.server.request_record import RequestRecord

STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (QueueFullError, 503),
    (RequestTimeoutError, 504),
    (ValueError, 422),  # includes ImageError and InstructionError
    (CoPRSError, 500),
)
"""Status of each error class; the first match counts."""

RETRY_AFTER = {503: {"Retry-After": "1"}}
"""Retry header by status, in seconds."""

FIELDS = (
    "accepted: a form with image (a file), or JSON with image (base64); instruction or "
    "instructions; and optional max_targets, max_new_tokens, max_reasoning_tokens, deadline_ms, "
    "reasoning, return"
)
NOT_FOUND = (
    "Not found. Endpoints: GET /, /docs, /openapi.json, /samples, /health, /health/live, "
    "/health/ready, /metrics; POST /segment"
)

logger = logging.getLogger(__name__)


def add_handlers(app: FastAPI) -> None:
    """Register the handlers of all errors."""
    app.add_exception_handler(RequestValidationError, _invalid_form)
    app.add_exception_handler(HTTPException, _not_routed)
    for error_class, _ in STATUSES:
        app.add_exception_handler(error_class, _failed)


async def _failed(request: Request, error: Exception) -> Response:
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    body = error_body(error)
    record = RequestRecord.of(request.scope)
    record.error = body["type"]
    if status == 500:
        extra = {"request_id": record.request_id}
        logger.error("%s: %s", body["type"], body["error"], extra=extra)
    return JSONResponse(body, status, RETRY_AFTER.get(status))


async def _invalid_form(request: Request, error: Exception) -> Response:
    """Convert form validation errors into the JSON error envelope."""
    assert isinstance(error, RequestValidationError)
    problems = "; ".join(_problem(problem) for problem in error.errors())
    return _request_error(request, f"{problems}; {FIELDS}", 422)


def _problem(problem: dict[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    field = ".".join(map(str, problem["loc"]))
    if message == FILE_EXPECTED:
        return f"image is {problem['input'][:40]!r}, text instead of a file (curl: image=@FILE)"
    return f"{field}: {message}"


async def _not_routed(request: Request, error: Exception) -> Response:
    """Convert 404, 405, 408, 415 and malformed bodies into the JSON error envelope."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {shorten(request.url.path)}"
    if error.status_code in (404, 405):
        message = f"{place}: {NOT_FOUND}"
    else:
        message = f"{place}: {error.detail}; {FIELDS}"
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
    return _request_error(request, message, error.status_code, headers)


def _allowed(request: Request) -> str:
    """Return the methods of a path; those of a file if it is none of the interface."""
    path = request.scope["path"].removeprefix(request.scope["root_path"])
    methods: set[str] = request.app.state.methods.get(path) or {"GET", "HEAD"}
    return ", ".join(sorted(methods))


def _request_error(request: Request, message: str, status: int, headers: Any = None) -> Response:
    kind = RequestRecord.of(request.scope).error = "RequestError"
    body = {"error": shorten(message, MAX_MESSAGE_LENGTH), "type": kind}
    return JSONResponse(body, status, headers)
