"""Encoding of a stream as server-sent events.

    event: text     {"text"}                                    as the policy writes
    event: prior    {"image"}                                   heat map over the image
    event: result   SegmentationResult.to_json() and "image"    masks over the image
    event: error    {"error", "type"}                           instead of the remaining events

``image`` is a JPEG as a ``data:`` URL. The stream ends after ``result`` or ``error``.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool

from coprs_deploy.errors import CoPRSError, error_body
from coprs_deploy.images import RgbArray, sigmoid
from coprs_deploy.policy import TextDelta
from coprs_deploy.runtime import PriorEvent, SegmentationResult
from coprs_deploy.visualization import draw_heatmap, draw_overlay

EVENT_STREAM = "text/event-stream"
JPEG_QUALITY = 88


async def encode_events(
    rgb: RgbArray, stream: AsyncIterator[TextDelta | PriorEvent | SegmentationResult]
) -> AsyncGenerator[bytes, None]:
    """Encode the events of :meth:`CoPRS.astream`; later errors become an ``error`` event.

    Args:
        rgb: (H, W, 3) uint8, the decoded image.
        stream: its events; closed at the end.

    Raises:
        CoPRSError, ValueError: the first event failed.
    """
    has_begun = False
    try:
        async for event in stream:
            yield await run_in_threadpool(_encode, rgb, event)
            has_begun = True
    except (CoPRSError, ValueError) as error:
        if not has_begun:
            raise
        yield _write("error", error_body(error))
    finally:
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()


def _encode(rgb: RgbArray, event: TextDelta | PriorEvent | SegmentationResult) -> bytes:
    if isinstance(event, TextDelta):
        return _write("text", {"text": event.text})
    if isinstance(event, PriorEvent):
        prior = sigmoid(event.prior_logits.max(axis=0))  # all targets
        return _write("prior", {"image": _data_url(draw_heatmap(rgb, prior))})
    overlay = _data_url(draw_overlay(rgb, event.masks))
    return _write("result", {**event.to_json(), "image": overlay})


def _write(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
