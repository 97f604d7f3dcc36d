"""The OpenAPI document: what FastAPI does not find out by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from coprs_deploy.server.request_body import JSON, MULTIPART, SegmentFields, SegmentJson
from coprs_deploy.server.request_record import REQUEST_ID_HEADER

DESCRIPTION = """\
The policy writes its reasoning and names one target or more; each becomes a positional
prior and a mask. Send the image as a form:

    curl -F image=@photo.jpg -F "instruction=the cup that is about to fall" HOST/segment

or as JSON with the file in base64. With `Accept: text/event-stream`, the response is a stream of
events while the policy writes. Responses have an `X-Request-ID`: the client's, or a new one.
"""

OPENAPI_VERSION = "3.2.0"
"""The first version that describes event streams (``itemSchema``)."""

EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAIklEQVR42mP4TyJgGIQa7sjJYSK4NKbkqAZMDUMj"
    "pmmuAQA9QlwWFvGDVgAAAABJRU5ErkJggg=="
)
"""A PNG file of 16 x 16 pixels."""


def _form_schema() -> dict[str, Any]:
    schema = _schema(SegmentFields)
    file = {
        "type": "string",
        "contentMediaType": "application/octet-stream",
        "description": "an image file that Pillow can read",
    }
    properties = {"image": file, **schema["properties"]}
    for each in properties.values():  # a form has no null
        if {"type": "null"} in each.get("anyOf", ()):
            each.update(each.pop("anyOf")[0])
    return {**schema, "properties": properties, "required": ["image"]}


def _json_schema() -> dict[str, Any]:
    schema = _schema(SegmentJson)
    image = schema["properties"].pop("image")
    schema["properties"] = {"image": image, **schema["properties"]}
    return schema


def _schema(model: type[SegmentFields]) -> dict[str, Any]:
    """Return the schema of a body, without the defaults of the two that exclude each other."""
    schema = model.model_json_schema()
    for name in ("instruction", "instructions"):
        del schema["properties"][name]["default"]
    del schema["title"], schema["description"]
    return schema


SEGMENT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {"schema": _form_schema()},
            JSON: {
                "schema": _json_schema(),
                "examples": {
                    "one": {
                        "summary": "one instruction",
                        "value": {"image": EXAMPLE_IMAGE, "instruction": "the red square"},
                    },
                    "several": {
                        "summary": "several instructions, masks as polygons",
                        "value": {
                            "image": EXAMPLE_IMAGE,
                            "instructions": ["the red square", "the blue square"],
                            "reasoning": "none",
                            "return": ["polygons"],
                        },
                    },
                },
            },
        },
    }
}
"""Body of ``POST /segment`` in the document."""


def add_document(app: FastAPI) -> None:
    """Describe the header of all responses, and leave out the schemas that only FastAPI uses."""
    app.openapi_version = OPENAPI_VERSION
    original = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = original()
            for path in schema["paths"].values():
                for operation in path.values():
                    for response in operation["responses"].values():
                        response.setdefault("headers", {})[REQUEST_ID_HEADER] = {
                            "schema": {"type": "string"},
                            "description": "id of the request",
                        }
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
