"""Show reasoning, prior and mask as they arrive: ``python examples/stream_reasoning.py``."""

import sys

from coprs_deploy import CoPRS, PriorEvent, SegmentationResult, TextDelta


def main(arguments: list[str]) -> int:
    """Print each event of one request."""
    image, instruction = arguments or ("examples/scene.png", "the leftmost circle")
    found = False
    with CoPRS.load() as coprs:
        for event in coprs.stream(image, instruction):
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
            elif isinstance(event, PriorEvent):
                print(f"\nprior: logits of shape {event.prior_logits.shape}")
            elif isinstance(event, SegmentationResult):
                found = event.found
                print(f"mask: {event.areas.tolist()} pixels")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
