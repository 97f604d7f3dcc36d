"""Body of ``POST /segment``: a form with a file, or JSON with the file in base64."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO, Annotated, Any, Literal, Self, TypeAlias

import msgspec
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from coprs_deploy.docstrings import attribute_docs
from coprs_deploy.errors import ImageDecodeError
from coprs_deploy.prompts import MAX_INSTRUCTION_CHARS
from coprs_deploy.runtime.options import RequestOptions
from coprs_deploy.server.result_formats import MASK_FORMATS, MaskFormat
from coprs_deploy.server.steps import run_step

MAX_INSTRUCTIONS = 16
"""Instructions of one request."""

MAX_FORM_FIELDS = 64
"""Fields of a form, repeated ones included."""

MAX_JSON_BYTES = 1 << 21
"""Size of a JSON body without its image; ``MAX_INSTRUCTIONS`` of full length fit."""

MAX_BYTES_IN_MEMORY = 1 << 20
"""Larger files are on the disk until they are decoded."""

MULTIPART, URL_ENCODED, JSON = (
    "multipart/form-data",
    "application/x-www-form-urlencoded",
    "application/json",
)

FILE_EXPECTED = "a file is expected"

_ABOUT = attribute_docs(RequestOptions)

Instruction: TypeAlias = Annotated[str, Field(max_length=MAX_INSTRUCTION_CHARS)]
MaskFormats: TypeAlias = Annotated[
    list[MaskFormat], Field(min_length=1, max_length=len(MASK_FORMATS))
]


class SegmentFields(BaseModel):
    """Fields of a request but the image."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "oneOf": [{"required": ["instruction"]}, {"required": ["instructions"]}]
        },
    )

    instruction: Instruction = Field("", description="what to segment")
    instructions: Annotated[list[Instruction], Field(min_length=1, max_length=MAX_INSTRUCTIONS)] = (
        Field(
            [],
            description="several instructions on the image, which is encoded once; the response is "
            "a list of results in their order",
        )
    )
    max_targets: int = Field(1, ge=1, description=_ABOUT["max_targets"])
    max_new_tokens: int | None = Field(None, ge=1, description=_ABOUT["max_new_tokens"])
    max_reasoning_tokens: int | None = Field(None, ge=1, description=_ABOUT["max_reasoning_tokens"])
    deadline_ms: float | None = Field(None, gt=0, description=_ABOUT["deadline_ms"])
    reasoning: Literal["full", "none"] = Field("full", description=_ABOUT["reasoning"])
    return_: MaskFormat | MaskFormats = Field(
        "rle",
        alias="return",
        description="form of the masks, or several: RLE (masks), PNG files in base64 (mask_pngs), "
        "COCO polygons (mask_polygons), logits on the mask grid (mask_logits, prior_logits)",
    )

    @model_validator(mode="after")
    def _check_instructions(self) -> Self:
        given = {"instruction", "instructions"} & self.model_fields_set
        if len(given) != 1:
            both = "instruction and instructions are given" if given else "no instruction is given"
            raise ValueError(f"{both}; accepted: one of instruction and instructions")
        return self


class SegmentJson(SegmentFields):
    """Body of a request in JSON."""

    image: str = Field(
        description="an image file that Pillow can read, in base64; a data: URL is accepted too",
        min_length=1,
        json_schema_extra={"contentEncoding": "base64"},
    )


_NAMES = {name: field.alias or name for name, field in SegmentJson.model_fields.items()}
_RawJson = msgspec.defstruct(
    "_RawJson",
    [(name, msgspec.Raw, msgspec.Raw()) for name in _NAMES],
    rename=_NAMES,
    forbid_unknown_fields=True,
)


@dataclass(frozen=True)
class SegmentRequest:
    """A request that was read.

    Attributes:
        image: the image file.
        instructions: what to segment.
        is_list: whether the response is a list of results.
        options: options of each instruction.
        formats: forms of the masks.
    """

    image: IO[bytes]
    instructions: Sequence[str]
    is_list: bool
    options: RequestOptions
    formats: frozenset[MaskFormat]

    @classmethod
    def of(cls, image: IO[bytes], fields: SegmentFields) -> SegmentRequest:
        """Check the options, and combine fields and image."""
        options = RequestOptions(
            fields.max_targets,
            fields.max_new_tokens,
            fields.max_reasoning_tokens,
            fields.deadline_ms,
            fields.reasoning,
        )
        is_list = "instructions" in fields.model_fields_set
        instructions = fields.instructions if is_list else [fields.instruction]
        formats = [fields.return_] if isinstance(fields.return_, str) else fields.return_
        return cls(image, instructions, is_list, options, frozenset(formats))


@asynccontextmanager
async def read_request(request: Request) -> AsyncIterator[SegmentRequest]:
    """Read and check a body; its file is closed at the end of the block.

    Raises:
        HTTPException: 400 for a malformed body, 415 for another media type.
        RequestValidationError: a field is missing or not accepted.
        ValueError: the fields do not fit together, or the image is not base64.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == JSON:
        with SpooledTemporaryFile(MAX_BYTES_IN_MEMORY) as body:
            async for chunk in request.stream():
                body.write(chunk)
            fields, image = await run_step(_parse_json, body)
        with image:
            yield SegmentRequest.of(image, fields)
    elif media_type in (MULTIPART, URL_ENCODED):
        async with request.form(max_files=1, max_fields=MAX_FORM_FIELDS) as form:
            yield _read_form(form)
    else:
        raise HTTPException(
            415, f"Content-Type is {media_type[:80]!r}; send {MULTIPART}, or {JSON} with base64"
        )


def _read_form(form: FormData) -> SegmentRequest:
    values: dict[str, Any] = {}
    for name in form:
        given = form.getlist(name)
        is_list = name == "instructions" or len(given) > 1
        values[name] = given if is_list else given[0]
    image = values.pop("image", None)
    problems: list[Mapping[str, Any]] = []
    if image is None:
        problems.append({"loc": ("image",), "msg": "Field required", "input": None})
    elif not isinstance(image, UploadFile):
        problems.append({"loc": ("image",), "msg": FILE_EXPECTED, "input": image})
    try:
        fields = SegmentFields.model_validate(values)
    except ValidationError as error:
        problems += error.errors()
    if problems:
        raise RequestValidationError(problems)
    return SegmentRequest.of(image.file, fields)


def _parse_json(body: IO[bytes]) -> tuple[SegmentJson, IO[bytes]]:
    """Parse a body and decode its image to a file of its own."""
    body.seek(0)
    text = body.read()
    _check_json(text)
    try:
        fields = SegmentJson.model_validate_json(text, strict=True)
    except ValidationError as error:
        problems = error.errors()
        if problems[0]["type"] == "json_invalid":
            raise HTTPException(400, problems[0]["msg"]) from error
        raise RequestValidationError(problems) from error
    content = _decode_base64(fields.image)
    image = SpooledTemporaryFile(MAX_BYTES_IN_MEMORY)  # noqa: SIM115
    image.write(content)
    return fields.model_copy(update={"image": ""}), image


def _check_json(text: bytes) -> None:
    """Refuse malformed JSON, unknown fields and large ones before they become Python objects.

    pydantic goes on after the first error: two million unknown fields take it 20 s and 3 GB.
    """
    try:
        fields: Any = msgspec.json.decode(text, type=_RawJson)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except msgspec.DecodeError as error:
        raise HTTPException(400, str(error)) from error
    image = memoryview(fields.image)
    num_bytes = len(text) - (len(image) if bytes(image[:1]) == b'"' else 0)
    if num_bytes > MAX_JSON_BYTES:
        raise _invalid(
            f"the fields without the image have {num_bytes} bytes; accepted: at most "
            f"{MAX_JSON_BYTES}"
        )


def _invalid(message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": (), "msg": message, "input": None}])


def _decode_base64(text: str) -> bytes:
    head, comma, content = text.partition(",") if text.startswith("data:") else ("", "", text)
    try:
        if comma and not head.endswith(";base64"):
            raise ValueError(f"it starts with {head[:40]!r}")
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise ImageDecodeError(
            f"image is not base64 ({error}); accepted: an image file in base64, as text or as a "
            "data: URL with ;base64"
        ) from error
