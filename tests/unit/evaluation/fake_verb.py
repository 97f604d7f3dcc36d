"""``coprs-deploy evaluate`` in a process of its own, with a runtime that computes masks at once.

    python -m tests.unit.evaluation.fake_verb KILL_AT ARGUMENTS...

The process kills itself at request number KILL_AT; 0 for never, and -1 for a bundle
that cannot be opened.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from contextlib import contextmanager

import numpy as np

from coprs_deploy.cli import evaluation_workers
from coprs_deploy.cli.main import main
from coprs_deploy.errors import BundleError
from tests.unit.evaluation.fake_source import result_of


class FakeRuntime:
    """Predicts a mask that depends on the image and the instruction only; some requests fail."""

    description = "fake"
    concurrency = 1

    def __init__(self, kill_at=0):
        self.num_requests, self.kill_at = 0, kill_at

    def check_image(self, image):
        pass

    def segment(self, image, instruction, max_targets):
        self.num_requests += 1
        if self.num_requests == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        height, width = image.shape[:2]
        digest = hashlib.sha256(instruction.encode() + image.tobytes()).digest()
        if digest[0] < 3:
            raise RuntimeError("this one fails")
        start, length = np.frombuffer(digest[:8], np.uint32) % (height * width // 2)
        pixels = range(int(start), int(start) + int(length))
        masks = [pixels] if digest[1] < 240 else []
        return result_of(masks, [pixels[::2]] * len(masks), (height, width))


@contextmanager
def open_runtime(bundle, options):
    kill_at = int(sys.argv[1])
    if kill_at < 0:
        raise BundleError("there is no bundle")
    yield FakeRuntime(kill_at)


evaluation_workers.open_runtime = open_runtime  # worker processes import this module as well

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
