"""Bodies of responses as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from coprs_deploy.runtime import Timings

EVENT_STREAM = "text/event-stream"


class ErrorBody(BaseModel):
    """An error."""

    model_config = ConfigDict(extra="forbid")

    error: str
    type: str


class RleBody(BaseModel):
    """Mask as compressed COCO RLE; ``size`` is height and width."""

    model_config = ConfigDict(extra="forbid")

    size: tuple[int, int]
    counts: str


class ResultBody(BaseModel):
    """A result, as ``SegmentationResult.to_json`` returns it."""

    model_config = ConfigDict(extra="forbid")

    found: bool
    instruction: str
    reasoning: str
    response: str
    stop_reason: str
    format_violations: list[str]
    image_size: tuple[int, int]
    scores: list[float]
    boxes: list[tuple[int, int, int, int]]
    areas: list[int]
    masks: list[RleBody]
    timings: Timings
    runtime: str


class HealthBody(BaseModel):
    """State of the server."""

    model_config = ConfigDict(extra="forbid")

    status: str
    version: str
    runtime: str
    active_requests: int


class SampleBody(BaseModel):
    """An image with an instruction to try; ``image`` is a path relative to the page."""

    model_config = ConfigDict(extra="forbid")

    image: str
    instruction: str


def _error(description: str) -> dict[str, Any]:
    return {"model": ErrorBody, "description": description}


COMMON_RESPONSES: dict[int | str, dict[str, Any]] = {
    404: _error("unknown path"),
    405: _error("unknown method"),
    500: _error("the policy or a graph failed"),
}
"""Responses of any request."""

SEGMENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The result, or with `Accept: text/event-stream` the events `text`, `prior` "
        "and `result`; `error` ends a stream that fails.",
        "content": {
            EVENT_STREAM: {
                "itemSchema": {
                    "type": "object",
                    "properties": {
                        "event": {"enum": ["text", "prior", "result", "error"]},
                        "data": {"type": "string", "contentMediaType": "application/json"},
                    },
                    "required": ["event", "data"],
                }
            }
        },
    },
    400: _error("malformed form"),
    408: _error("the body stopped arriving"),
    411: _error("no Content-Length"),
    413: _error("larger than --max-upload"),
    422: _error("image, instruction or another field is not accepted"),
    503: {
        **_error("the queue is full, or the server is stopping"),
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}},
    },
    504: _error("--timeout was exceeded"),
}
"""Responses of ``POST /segment``."""

UNAUTHORIZED: dict[int | str, dict[str, Any]] = {401: _error("the API key is missing or wrong")}
"""Response of a server with an API key."""
