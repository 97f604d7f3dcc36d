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

from coprs_deploy.errors import CoPRSError, error_body
from coprs_deploy.images import RgbArray
from coprs_deploy.policy import TextDelta
from coprs_deploy.runtime import PriorEvent, SegmentationResult
from coprs_deploy.runtime.concurrency import UploadedImage
from coprs_deploy.server.steps import run_step
from coprs_deploy.visualization import MAX_LONG_SIDE_PX, draw_heatmap, draw_overlay

JPEG_QUALITY = 88


async def encode_events(
    image: UploadedImage, stream: AsyncIterator[TextDelta | PriorEvent | SegmentationResult]
) -> AsyncGenerator[bytes, None]:
    """Encode the events of :meth:`CoPRS.astream`; later errors become an ``error`` event.

    Args:
        image: image of the stream.
        stream: its events; closed at the end.

    Raises:
        CoPRSError, ValueError: the first event failed.
    """
    has_begun = False
    try:
        async for event in stream:
            if isinstance(event, TextDelta):
                yield _write("text", {"text": event.text})
            elif isinstance(event, PriorEvent):
                yield await run_step(_encode_prior, image.rgb, event)
            else:
                overlay = await run_step(draw_overlay, image.rgb, event.masks)
                yield await run_step(_encode_result, event, overlay)
            has_begun = True
    except (CoPRSError, ValueError) as error:
        if not has_begun:
            raise
        yield _write("error", error_body(error))
    finally:
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()


def _encode_prior(rgb: RgbArray, event: PriorEvent) -> bytes:
    heatmap = draw_heatmap(rgb, event.reduced_prior(MAX_LONG_SIDE_PX))
    return _write("prior", {"image": _data_url(heatmap)})


def _encode_result(result: SegmentationResult, overlay: Image.Image) -> bytes:
    return _write("result", {**result.to_json(), "image": _data_url(overlay)})


def _write(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
