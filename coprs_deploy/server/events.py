"""An answer as server-sent events.

    event: words    {"text"}                     as the policy writes them
    event: prior    {"image"}                    the heatmap over the picture
    event: answer   Answer.to_json and "image"   the masks over the picture
    event: error    {"error", "type"}            instead of what would have followed

``image`` is a JPEG as a ``data:`` address. After ``answer`` or ``error`` the stream ends.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool

from coprs_deploy.errors import CoPRSError
from coprs_deploy.images import RgbArray
from coprs_deploy.policy import TextDelta
from coprs_deploy.runtime import PriorEvent, SegmentationResult
from coprs_deploy.server.error_handlers import failure_body
from coprs_deploy.visualization import draw_heatmap, draw_overlay

EVENT_STREAM = "text/event-stream"
JPEG_QUALITY = 88


async def encode_events(
    rgb: RgbArray, stream: AsyncIterator[TextDelta | PriorEvent | SegmentationResult]
) -> AsyncGenerator[bytes, None]:
    """Encode the events of :meth:`CoPRS.astream`; only the first may raise.

    Args:
        rgb: (H, W, 3) uint8, the picture.
        stream: its events; closed when this ends.
    """
    has_begun = False
    try:
        async for event in stream:
            yield await run_in_threadpool(_encode, rgb, event)
            has_begun = True
    except (CoPRSError, ValueError) as error:
        if not has_begun:
            raise
        yield _write("error", failure_body(error))
    finally:
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()


def _encode(rgb: RgbArray, event: TextDelta | PriorEvent | SegmentationResult) -> bytes:
    if isinstance(event, TextDelta):
        return _write("words", {"text": event.text})
    if isinstance(event, PriorEvent):
        hottest = event.priors.max(axis=0)
        return _write("prior", {"image": _data_address(draw_heatmap(rgb, hottest))})
    picture = _data_address(draw_overlay(rgb, event.masks))
    return _write("answer", {**event.to_json(), "image": picture})


def _write(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _data_address(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
