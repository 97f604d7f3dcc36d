"""Bodies of responses as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from coprs_deploy.runtime import Timings

EVENT_STREAM = "text/event-stream"


class ErrorBody(BaseModel):
    """An error: its message, and the name of its class."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "error": "the instruction is empty; say what to segment, as in 'the red cup'",
                    "type": "InstructionError",
                }
            ]
        },
    )

    error: str
    type: str


class RleBody(BaseModel):
    """Mask as compressed COCO RLE; ``size`` is height and width."""

    model_config = ConfigDict(extra="forbid")

    size: tuple[int, int]
    counts: str


class LogitsBody(BaseModel):
    """Logits (N, M, M) on the mask grid: little-endian float32 in base64, row by row.

    The grid covers the padded square input of ``image_size`` pixels a side, of which the image is
    the upper left part with ``unpadded_size`` (height, width).
    """

    model_config = ConfigDict(extra="forbid")

    dtype: Literal["float32"]
    shape: tuple[int, int, int]
    data: Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]
    image_size: int
    unpadded_size: tuple[int, int]

    @classmethod
    def none(cls) -> LogitsBody:
        """Return the logits of no target."""
        return cls(
            dtype="float32",
            shape=(0, 256, 256),
            data="",
            image_size=1024,
            unpadded_size=(1024, 1024),
        )


EXAMPLE_RESULT: dict[str, Any] = {
    "found": True,
    "instruction": "the largest red circle",
    "reasoning": "There are two red circles. The left one is larger.",
    "response": "<think>There are two red circles. The left one is larger.</think> "
    "The target is <REF_POS>.",
    "stop_reason": "targets_reached",
    "format_violations": [],
    "image_size": [4, 6],
    "scores": [0.97],
    "boxes": [[1, 1, 3, 3]],
    "areas": [4],
    "masks": [{"size": [4, 6], "counts": "5220;"}],
    "timings": {
        "queue_ms": 0.0,
        "image_decode_ms": 1.2,
        "policy_preprocess_ms": 2.1,
        "image_encoder_ms": 30.5,
        "image_encoder_overlap_ms": 30.5,
        "prefill_ms": 41.0,
        "decode_ms": 120.3,
        "prior_ms": 1.1,
        "mask_decoder_ms": 4.2,
        "resize_ms": 0.4,
        "reference_to_mask_ms": 6.0,
        "total_ms": 171.9,
        "prompt_tokens": 96,
        "cached_prompt_tokens": 0,
        "response_tokens": 24,
        "tokens_per_second": 199.5,
    },
    "runtime": "graphs: openvino cpu fp32; policy: openvino cpu int8",
}
"""A result on an image of 4 x 6 pixels."""


class ResultBody(BaseModel):
    """A result; masks are in the forms that the request names with ``return``."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE_RESULT]})

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
    masks: list[RleBody] = Field([], description="with `rle`, the default")
    mask_pngs: list[str] = Field(
        [], description="with `png`: PNG files of one bit per pixel, in base64"
    )
    mask_polygons: list[list[list[int]]] = Field(
        [], description="with `polygons`: COCO polygons of each mask, x1, y1, x2, y2, ..."
    )
    mask_logits: LogitsBody = Field(default_factory=LogitsBody.none, description="with `logits`")
    prior_logits: LogitsBody = Field(default_factory=LogitsBody.none, description="with `logits`")
    timings: Timings
    runtime: str
    index: int = Field(
        0, description="place of the instruction; in the stream of several instructions only"
    )


EXAMPLE_ERROR: dict[str, Any] = {
    "error": "the policy named a target without its hidden state",
    "type": "HiddenStateError",
}
"""Error of one of several instructions."""


class ResultsBody(BaseModel):
    """The result or the error of each of several instructions, in their order.

    If all failed, the response is the error of the first that did, with its status.
    """

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"results": [EXAMPLE_RESULT, EXAMPLE_ERROR]}]},
    )

    results: list[ResultBody | ErrorBody]


ServerStatus: TypeAlias = Literal["ok", "stopping", "closed"]


class HealthBody(BaseModel):
    """State of the server; it is ``stopping`` after a signal to stop."""

    model_config = ConfigDict(extra="forbid")

    status: ServerStatus
    version: str
    runtime: str
    active_requests: int
    requests_ahead: Annotated[
        int | None, Field(description="active requests that arrived before `request_id`")
    ] = None


class SampleBody(BaseModel):
    """An image with an instruction to try; ``image`` is a path relative to the page."""

    model_config = ConfigDict(extra="forbid")

    image: str
    instruction: str


def _error(description: str, **headers: str) -> dict[str, Any]:
    response: dict[str, Any] = {"model": ErrorBody, "description": description}
    if headers:
        response["headers"] = {
            name.replace("_", "-"): {"schema": {"type": "string"}, "description": about}
            for name, about in headers.items()
        }
    return response


COMMON_RESPONSES: dict[int | str, dict[str, Any]] = {
    404: _error("unknown path"),
    405: _error("unknown method", Allow="the methods of the path"),
    411: _error("a body without Content-Length"),
    413: _error("larger than --max-upload"),
    500: _error("the policy or a graph failed"),
}
"""Responses of any request."""

EVENT_EXAMPLE = """\
event: text
data: {"text": "<think>There are two"}

event: prior
data: {"image": "data:image/png;base64,iVBORw0KGgo..."}

event: result
data: {"found": true, "instruction": "the largest red circle", ...}

"""

SEGMENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The result, or with `instructions` the list of results. With `Accept: "
        "text/event-stream` the events `text` (`{text}`, as the policy writes), `prior` "
        "(`{image}`, the heat map as a PNG in a `data:` URL) and `result`; with `instructions` "
        "their data have the `index` of the instruction. `error` (`{error, type}`) ends a stream "
        "that fails, or with `index` the events of one instruction.",
        "content": {
            EVENT_STREAM: {
                "itemSchema": {
                    "type": "object",
                    "properties": {
                        "event": {"enum": ["text", "prior", "result", "error"]},
                        "data": {"type": "string", "contentMediaType": "application/json"},
                    },
                    "required": ["event", "data"],
                },
                "example": EVENT_EXAMPLE,
            }
        },
    },
    400: _error("malformed form or JSON"),
    408: _error("the body stopped arriving, or arrives too slowly"),
    415: _error("the body is neither a form nor JSON"),
    422: _error("image, instruction or another field is not accepted"),
    503: _error("the queue is full, or the server is stopping", Retry_After="seconds"),
    504: _error("--timeout was exceeded"),
}
"""Responses of ``POST /segment``."""

KEY_RESPONSES: dict[int | str, dict[str, Any]] = {
    401: _error("the API key is missing or wrong", WWW_Authenticate="Bearer"),
    429: _error("the limit of the API key is reached", Retry_After="seconds"),
}
"""Responses of a server with API keys."""

STOPPING: dict[int | str, dict[str, Any]] = {
    503: {"model": HealthBody, "description": "the server is stopping"}
}
"""Response of ``GET /health/ready``."""
