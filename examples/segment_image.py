"""Segment one image: ``python examples/segment_image.py [IMAGE INSTRUCTION]``."""

import sys

from coprs_deploy import CoPRS


def main(arguments: list[str]) -> int:
    """Print reasoning, boxes, scores and timings; write the overlay to ``result/``."""
    image, instruction = arguments or ("examples/scene.png", "the largest red circle")
    with CoPRS.load() as coprs:  # the demo model; CoPRS.load("bundle") loads yours
        result = coprs.segment(image, instruction)
    print(result.reasoning)
    for box, score, area in zip(result.boxes, result.scores, result.areas, strict=True):
        print(f"box {box.tolist()}, score {score:.3f}, {area} pixels")
    timings = result.timings
    print(f"{timings.total_ms:.0f} ms, image encoder {timings.image_encoder_ms:.0f} ms")
    result.save("result")
    return 0 if result.found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
