"""Use a server: ``python examples/http_client.py [IMAGE INSTRUCTION [URL]]``.

Start it with ``coprs-deploy serve``. Needs the extra ``client`` only, no model and no runtime.
"""

import sys

from coprs_deploy.client import Client, RemotePrior, RemoteResult, TextDelta


def main(arguments: list[str]) -> int:
    """Print the reasoning as it arrives, then boxes, scores and timings."""
    image, instruction, *url = arguments or ("examples/scene.png", "the largest red circle")
    found = False
    with Client(*url) as client:  # http://127.0.0.1:8000; segment() returns the result alone
        for event in client.stream(image, instruction):
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
            elif isinstance(event, RemotePrior):
                print(f"\nprior: {event.prior.shape}, at most {event.prior.max():.2f}")
            elif isinstance(event, RemoteResult):
                found = event.found
                for box, score, mask in zip(event.boxes, event.scores, event.masks, strict=True):
                    print(f"box {box.tolist()}, score {score:.3f}, {mask.sum()} pixels")
                print(f"{event.timings['total_ms']:.0f} ms")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
