"""Fake graphs and a fake policy for tests of the runtime."""

import threading

import numpy as np

from coprs_deploy.engines.runner import HostTensor, Runner
from coprs_deploy.policy import Policy, PolicyResult, StopReason, TextDelta
from coprs_deploy.prompts import Response
from coprs_deploy.specs import Geometry, graph_specs

WAIT = 30
"""Seconds after which a thread counts as stuck."""

GEOMETRY = Geometry(image_size=32, patch_size=8, out_chans=8)
DIMENSION = 4
SPECS = graph_specs(GEOMETRY, DIMENSION)


class FakeRunner(Runner):
    """A graph that counts its calls; prior logits are the first value of the concentration."""

    def __init__(self, name, before=lambda: None):
        super().__init__(SPECS[name], "fake graphs")
        self.before = before
        self.calls = 0
        self.is_closed = False

    def _run(self, inputs):
        self.calls += 1
        self.before()
        spec = self.spec.outputs[0]
        value = {
            "image_embedding": lambda: float(inputs["image"].mean()),
            "prior_logits": lambda: inputs["concentration"][0, 0],
            "mask_logits": lambda: inputs["prior_logits"].numpy()[0, 0, 0, 0] - 10,
        }[spec.name]()
        return {spec.name: HostTensor(np.full(spec.shape, value, dtype=np.float32))}

    def close(self):
        self.is_closed = True


class FakePolicy(Policy):
    """A policy whose concentrations are 11, 12, ...; ``during`` runs before each text delta."""

    def __init__(
        self,
        deltas=("some", " text"),
        during=lambda: None,
        found=None,
        concurrency=1,
        checks_deadline=False,
    ):
        self.description = "fake policy"
        self.hidden_size = DIMENSION
        self.concurrency = concurrency
        self.deltas = deltas
        self.during = during
        self.found = found
        self.checks_deadline = checks_deadline
        self.requests = []
        self.num_abandoned = 0
        self.was_abandoned = threading.Event()
        self.is_closed = False

    def stream(self, request):
        self.requests.append(request)
        done = False
        try:
            for delta in self.deltas:
                if self.checks_deadline:
                    request.remaining_s()
                self.during()
                yield TextDelta(delta)
            num_targets = request.max_targets if self.found is None else self.found
            values = np.arange(11, 11 + num_targets, dtype=np.float32)
            text = "".join(self.deltas)
            yield PolicyResult(
                response=Response(text, text, tuple(range(num_targets)), ()),
                concentrations=np.repeat(values[:, None], DIMENSION, axis=1),
                stop_reason=StopReason.TARGETS_REACHED if num_targets else StopReason.END_OF_TEXT,
                token_ids=tuple(range(7)),
                num_prompt_tokens=21,
                prefill_ms=1.0,
                decode_ms=2.0,
            )
            done = True
        finally:
            if not done:
                self.num_abandoned += 1
                self.was_abandoned.set()

    def close(self):
        self.is_closed = True


def image_of(value=0, shape=(20, 30)):
    return np.full((*shape, 3), value, dtype=np.uint8)


def join_stream_threads():
    """Wait until the threads of asynchronous streams have closed their generators."""
    for thread in threading.enumerate():
        if thread.name.startswith("stream"):
            thread.join(WAIT)
            assert not thread.is_alive()
