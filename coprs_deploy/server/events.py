"""Encoding of a stream as server-sent events.

    event: text     {"text"}                                    as the policy writes
    event: prior    {"image"}                                   heat map of all targets
    event: result   the result, its masks in the requested forms
    event: error    {"error", "type"}                           instead of the remaining events

With several instructions, the data have the ``index`` of the instruction too, and an ``error`` with
``index`` ends the events of that one only. ``image`` is a gray PNG as a ``data:`` URL: 0 to 255 for
0 to 1, the whole image on at most ``MAX_PRIOR_SIDE_PX`` pixels a side. The stream ends after the
last ``result`` or ``error``.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from coprs_deploy.errors import CoPRSError, error_body
from coprs_deploy.policy import TextDelta
from coprs_deploy.runtime import PriorEvent, SegmentationResult
from coprs_deploy.server.request_record import RequestRecord
from coprs_deploy.server.steps import run_step

StreamEvent: TypeAlias = TextDelta | PriorEvent | SegmentationResult | CoPRSError | ValueError

ResultWriter: TypeAlias = Callable[[SegmentationResult], dict[str, Any]]
"""Returns the JSON of a result."""

MAX_PRIOR_SIDE_PX = 256
"""Long side of the heat map that is sent: that of the prior itself."""


async def encode_events(
    stream: AsyncGenerator[tuple[int | None, StreamEvent], None],
    write_result: ResultWriter,
    record: RequestRecord,
) -> AsyncGenerator[bytes, None]:
    """Encode the events of :meth:`CoPRS.astream_instructions`; later errors become an event.

    Args:
        stream: index of the instruction, None for a single one, and event; closed at the end.
        write_result: returns the JSON of a result.
        record: the request; it gets the type of an error.

    Raises:
        CoPRSError, ValueError: the first event failed.
    """
    has_begun = False
    try:
        async for index, event in stream:
            place = {} if index is None else {"index": index}
            if isinstance(event, TextDelta):
                yield _write("text", {"text": event.text, **place})
            elif isinstance(event, PriorEvent):
                yield await run_step(_encode_prior, event, place)
            elif isinstance(event, Exception):
                yield _write("error", {**error_body(event), **place})
            else:
                yield await run_step(_encode_result, event, write_result, place)
            has_begun = True
    except (CoPRSError, ValueError) as error:
        if not has_begun:
            raise
        body = error_body(error)
        record.error = body["type"]
        yield _write("error", body)
    finally:
        await stream.aclose()


def _encode_prior(event: PriorEvent, place: dict[str, int]) -> bytes:
    prior = np.rint(255 * event.reduced_prior(MAX_PRIOR_SIDE_PX)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(prior).save(file, "PNG", compress_level=1)
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return _write("prior", {"image": f"data:image/png;base64,{content}", **place})


def _encode_result(
    result: SegmentationResult, write_result: ResultWriter, place: dict[str, int]
) -> bytes:
    return _write("result", {**write_result(result), **place})


def _write(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
