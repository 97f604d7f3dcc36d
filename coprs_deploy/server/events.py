"""Encoding of a stream as server-sent events.

    event: text     {"text"}                                    as the policy writes
    event: prior    {"image"}                                   heat map of all targets
    event: result   SegmentationResult.to_json()
    event: error    {"error", "type"}                           instead of the remaining events

``image`` is a gray PNG as a ``data:`` URL: 0 to 255 for 0 to 1, the whole image on at most
``MAX_PRIOR_SIDE_PX`` pixels a side. The stream ends after ``result`` or ``error``.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import numpy as np
from PIL import Image

from coprs_deploy.errors import CoPRSError, error_body
from coprs_deploy.policy import TextDelta
from coprs_deploy.runtime import PriorEvent, SegmentationResult
from coprs_deploy.server.steps import run_step

MAX_PRIOR_SIDE_PX = 256
"""Long side of the heat map that is sent: that of the prior itself."""


async def encode_events(
    stream: AsyncIterator[TextDelta | PriorEvent | SegmentationResult],
) -> AsyncGenerator[bytes, None]:
    """Encode the events of :meth:`CoPRS.astream`; later errors become an ``error`` event.

    Args:
        stream: the events; closed at the end.

    Raises:
        CoPRSError, ValueError: the first event failed.
    """
    has_begun = False
    try:
        async for event in stream:
            if isinstance(event, TextDelta):
                yield _write("text", {"text": event.text})
            elif isinstance(event, PriorEvent):
                yield await run_step(_encode_prior, event)
            else:
                yield await run_step(_encode_result, event)
            has_begun = True
    except (CoPRSError, ValueError) as error:
        if not has_begun:
            raise
        yield _write("error", error_body(error))
    finally:
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()


def _encode_prior(event: PriorEvent) -> bytes:
    prior = np.rint(255 * event.reduced_prior(MAX_PRIOR_SIDE_PX)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(prior).save(file, "PNG", compress_level=1)
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return _write("prior", {"image": f"data:image/png;base64,{content}"})


def _encode_result(result: SegmentationResult) -> bytes:
    return _write("result", result.to_json())


def _write(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
