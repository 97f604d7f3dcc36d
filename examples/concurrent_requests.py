"""Answer several requests on one image at once: ``python examples/concurrent_requests.py``.

The image is encoded once; with ``CoPRS.load(policy="vllm")`` the reasoning is decoded in one batch.
"""

import asyncio
import sys

from coprs_deploy import CoPRS

INSTRUCTIONS = ("the largest red circle", "the leftmost circle", "the topmost triangle")


async def segment_all(image: str) -> int:
    """Return how many of the instructions were found."""
    with CoPRS.load() as coprs:
        requests = [coprs.asegment(image, instruction) for instruction in INSTRUCTIONS]
        results = await asyncio.gather(*requests)
    for instruction, result in zip(INSTRUCTIONS, results, strict=True):
        print(f"{instruction}: {result.areas.tolist() or 'nothing found'}")
    return sum(result.found for result in results)


def main(arguments: list[str]) -> int:
    """Print the area of each mask."""
    image = arguments[0] if arguments else "examples/scene.png"
    return 0 if asyncio.run(segment_all(image)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
