"""What it costs to capture the hidden state inside vLLM."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

from coprs_deploy.benchmarks.serving.asking import (
    interval,
    median,
    open_policy,
    questions,
    wall,
)
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.policy.vector_files import VectorFiles
from coprs_deploy.policy.vllm_policy import VllmPolicy, _Progress

MOST_CAPTURE_SHARE = 0.01
"""What capturing may cost of an answer's decoding time."""


class PlainVllmPolicy(VllmPolicy):
    """The same engine without the capture: its answers have no concentrations."""

    @staticmethod
    def _plug_ins() -> dict[str, Any]:
        return {}


def decode(policy: VllmPolicy, request: PolicyRequest) -> tuple[float, int]:
    """Answer once: milliseconds behind the first token to the vector, and tokens."""

    async def answer() -> tuple[float, int]:
        progress = _Progress()
        with policy._files.for_request() as vectors:
            async for _ in policy._tokens_of(policy._encode(request, vectors), progress):
                pass
            policy._files.take(vectors)
        return 1e3 * (time.perf_counter() - progress.first_token), len(progress.token_ids)

    return policy._run(answer())


def measure_capture(rounds: int) -> dict[str, Any]:
    """Compare vLLM with the capture against the same engine without it, in pairs.

    Without it there are no logits processor and no vector in the request's file. Both
    write the same tokens: the shipped model ends its answer behind ``<REF_POS>`` of itself, where
    the capture makes it end.
    """
    requests = questions(12)
    captured, plain = (open_policy(kind) for kind in (VllmPolicy, PlainVllmPolicy))
    assert isinstance(captured, VllmPolicy)
    assert isinstance(plain, VllmPolicy)
    both = (captured, plain)
    with captured, plain:
        for request in requests:
            (_, one), (_, other) = (decode(policy, request) for policy in both)
            assert one == other, "the two engines wrote different answers"
        pairs, together = [], []
        for number in range(rounds * len(requests)):
            times = {}
            for policy in both if number % 2 else both[::-1]:
                times[policy], steps = decode(policy, requests[number % len(requests)])
            pairs.append((times[captured], times[plain], steps - 1))
        for number in range(2 * rounds):
            walls = {}
            for policy in both if number % 2 else both[::-1]:
                walls[policy] = wall(decode, policy, [*requests, *requests[:4]])
            together.append(walls[captured] / walls[plain] - 1)
    shares = [a / b - 1 for a, b, _ in pairs]
    return {
        "pairs": len(pairs),
        "decode_ms": median([a for a, _, _ in pairs]),
        "plain_decode_ms": median([b for _, b, _ in pairs]),
        "share": median(shares),
        "share_interval": interval(shares),
        "steps": median([n for _, _, n in pairs]),
        "microseconds_a_step": median([1e3 * (a - b) / n for a, b, n in pairs]),
        "sixteen_pairs": len(together),
        "sixteen_share": median(together),
        "sixteen_share_interval": interval(together),
        "limit": MOST_CAPTURE_SHARE,
    }


def measure_capture_work(rounds: int) -> dict[str, Any]:
    """Time what the capture itself does in a step of the engine, without an engine.

    The logits processor over a batch in which nobody reads ``<REF_POS>``, over one in which
    everybody does, and the lookup of a batch that has not changed; medians.
    """
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from coprs_deploy.policy.vllm_capture import STEP, CaptureOrder, ConcentrationCapture

    torch.set_num_threads(1)
    width, vocabulary, reference, stop = 3584, 152_064, 7, 2
    config = SimpleNamespace(speculative_config=None)
    rows = []
    for requests in (1, 16):
        found: dict[str, float] = {}
        for kind, last in (("writing", 5), ("reading_reference", reference)):
            with VectorFiles(width) as files:
                capture = ConcentrationCapture(config, torch.device("cpu"), False)
                paths = [files.open() for _ in range(requests)]
                added = []
                for row, path in enumerate(paths):
                    order = CaptureOrder(str(path), reference, stop, 1, 2000)
                    params = SamplingParams(
                        max_tokens=2001, stop_token_ids=[stop], extra_args=order.extra_args()
                    )
                    added.append((row, params, None, [4] * 300 + [last]))
                capture.update_state(BatchUpdate(requests, [], added, []))
                STEP.rows = torch.zeros(requests, width)
                logits = torch.zeros(requests, vocabulary)
                times = []
                for _ in range(100 * rounds):
                    start = time.perf_counter()
                    capture.update_state(None)
                    capture.apply(logits)
                    times.append(1e6 * (time.perf_counter() - start))
                    for path in paths:
                        os.truncate(path, 0)
            found[f"{kind}_microseconds"] = median(times)
        rows.append({"requests": requests, **found})
    return {"width": width, "vocabulary": vocabulary, "steps": 100 * rounds, "rows": rows}
