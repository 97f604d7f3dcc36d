"""Graphs and a policy that are played, for tests of what the runtime does with them."""

from dataclasses import dataclass

import numpy as np

from coprs_deploy.engines.runner import Runner
from coprs_deploy.policy import Policy, PolicyResult, StopReason, TextDelta
from coprs_deploy.prompts import Response
from coprs_deploy.specs import Geometry, graph_specs

WAIT = 30
"""Seconds after which a thread that should have moved on is taken for stuck."""

GEOMETRY = Geometry(image_size=32, patch_size=8, out_chans=8)
DIMENSION = 4
SPECS = graph_specs(GEOMETRY, DIMENSION)


@dataclass(frozen=True)
class HostTensor:
    values: np.ndarray

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return str(self.values.dtype)

    def numpy(self):
        return self.values


class FakeRunner(Runner):
    """A stage that counts its calls; the prior is the concentration's first number everywhere."""

    def __init__(self, name, before=lambda: None):
        super().__init__(SPECS[name], "fake graphs")
        self.before = before
        self.calls = 0
        self.is_closed = False

    def _run(self, inputs):
        self.calls += 1
        self.before()
        spec = self.spec.outputs[0]
        values = {
            "image_embedding": lambda: float(inputs["image"].mean()),
            "prior_logits": lambda: inputs["concentration"][0, 0],
            "mask_logits": lambda: inputs["prior_logits"].numpy()[0, 0, 0, 0] - 10,
        }[spec.name]()
        return {spec.name: HostTensor(np.full(spec.shape, values, dtype=np.float32))}

    def close(self):
        self.is_closed = True


class FakePolicy(Policy):
    """A policy that gives each target its number, and may wait or fail on the way."""

    def __init__(self, words=("a", " thought"), during=lambda: None, found=None, concurrency=1):
        self.description = "fake policy"
        self.hidden_size = DIMENSION
        self.concurrency = concurrency
        self.words = words
        self.during = during
        self.found = found
        self.requests = []
        self.abandoned = 0
        self.is_closed = False

    def stream(self, request):
        self.requests.append(request)
        done = False
        try:
            for word in self.words:
                self.during()
                yield TextDelta(word)
            targets = request.max_targets if self.found is None else self.found
            numbers = np.arange(11, 11 + targets, dtype=np.float32)
            text = "".join(self.words)
            yield PolicyResult(
                response=Response(text, text, tuple(range(targets)), ()),
                concentrations=np.repeat(numbers[:, None], DIMENSION, axis=1),
                stop_reason=StopReason.TARGETS_REACHED if targets else StopReason.END_OF_TEXT,
                token_ids=tuple(range(7)),
                num_prompt_tokens=21,
                prefill_ms=1.0,
                decode_ms=2.0,
            )
            done = True
        finally:
            self.abandoned += not done

    def close(self):
        self.is_closed = True


def picture(value=0, shape=(20, 30)):
    return np.full((*shape, 3), value, dtype=np.uint8)
