"""Segment a video or a webcam: ``python examples/video_frames.py [SOURCE INSTRUCTION]``.

SOURCE is a video file, an image, or a webcam such as ``/dev/video0`` (end it with Ctrl-C). The
policy runs on keyframes only: frames that differ from the last keyframe, and each 30th. Others
reuse its masks. Writes ``annotated.mp4``. Needs PyAV, which the extra ``supervision`` brings.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy import CoPRS, SegmentationResult
from coprs_deploy.visualization import draw_overlay

GRID = 16
CHANGE = 8.0
"""Change of the mean gray value (0 to 255) in one of 16 x 16 cells that makes a keyframe."""

MAX_REUSED = 29


def segment_frames(
    coprs: CoPRS, frames: Iterator[NDArray[np.uint8]], instruction: str
) -> Iterator[tuple[NDArray[np.uint8], SegmentationResult, bool]]:
    """Yield each frame (H, W, 3), the result of its keyframe, and whether it is the keyframe."""
    result: SegmentationResult | None = None
    key, reused = np.zeros((GRID, GRID), np.float32), 0
    for frame in frames:
        cells = Image.fromarray(frame).convert("L").resize((GRID, GRID), Image.Resampling.BOX)
        gray = np.asarray(cells, np.float32)
        if result is None or reused == MAX_REUSED or np.abs(gray - key).max() > CHANGE:
            key, reused = gray, 0
            result = coprs.segment(frame, instruction)
            yield frame, result, True
        else:
            reused += 1
            yield frame, result, False


def write_frame(file: av.container.OutputContainer, image: NDArray[np.uint8], rate: object) -> None:
    """Write a frame (H, W, 3); the first one sets the size, which is to be even."""
    height, width = (side - side % 2 for side in image.shape[:2])
    if not file.streams.video:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), "rgb24")
    file.mux(file.streams.video[0].encode(frame))


def main(arguments: list[str]) -> int:
    """Print what was found in each frame; write the masks over the frames."""
    source, instruction = arguments or ("examples/scene.png", "the largest red circle")
    webcam = "v4l2" if source.startswith("/dev/video") else None
    num_found = 0
    with CoPRS.load() as coprs, av.open(source, format=webcam) as video:
        rate = video.streams.video[0].average_rate or 25
        frames = (frame.to_ndarray(format="rgb24") for frame in video.decode(video=0))
        start = time.perf_counter()
        with av.open("annotated.mp4", "w") as file:
            with suppress(KeyboardInterrupt):
                segmented = segment_frames(coprs, frames, instruction)
                for number, (frame, result, is_key) in enumerate(segmented):
                    elapsed_ms = 1e3 * (time.perf_counter() - start)
                    kind = f"{'keyframe' if is_key else 'reused'}, {elapsed_ms:.0f} ms"
                    print(f"{number}: {result.areas.tolist() or 'nothing found'}, {kind}")
                    num_found += result.found
                    overlay = np.asarray(draw_overlay(frame, result.masks, instruction))
                    write_frame(file, overlay, rate)
                    start = time.perf_counter()
            file.mux(file.streams.video[0].encode())
    return 0 if num_found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
