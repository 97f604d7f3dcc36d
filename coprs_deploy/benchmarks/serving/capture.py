"""What it costs to capture the hidden state inside vLLM."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

from coprs_deploy.benchmarks.serving.asking import (
    interval,
    median,
    open_policy,
    questions,
    wall,
)
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.policy.vllm_policy.policy import VllmPolicy, _Progress
from coprs_deploy.policy.vllm_policy.transport import HiddenStateTransport

STARTS = 5
"""How often the two engines are started: they differ from start to start."""

MOST_CAPTURE_SHARE = 0.01
"""What capturing may cost of an answer's decoding time."""


class PlainVllmPolicy(VllmPolicy):
    """The same engine without the capture: its answers have no concentrations."""

    @staticmethod
    def _plug_ins() -> dict[str, Any]:
        return {}


def decode(policy: VllmPolicy, request: PolicyRequest, asks: bool = True) -> tuple[float, int]:
    """Answer once.

    Args:
        policy: whose engine decodes.
        request: the question.
        asks: whether the engine is asked for the vector.

    Returns:
        Milliseconds behind the first token, to the vector; and tokens.
    """

    async def answer() -> tuple[float, int]:
        progress = _Progress()
        with policy._files.for_request() as vectors:
            prompt = policy._encode(request, vectors)
            if not asks:
                prompt.params.extra_args = None
            async for _ in policy._tokens_of(prompt, progress):
                pass
            policy._files.take(vectors)
        return 1e3 * (time.perf_counter() - progress.first_token), len(progress.token_ids)

    return policy._run(answer())


def measure_capture(rounds: int) -> dict[str, Any]:
    """Compare decoding with the capture and without it, in pairs that take turns.

    Inside one engine a request asks for its vector or does not. Beside it stands an engine without
    the plug-in; such engines differ from start to start, so several pairs of them are started. All
    write the same tokens: the shipped model ends its answer behind ``<REF_POS>`` of itself, where
    the capture makes it end.
    """
    inside: list[tuple[float, float, int]] = []
    engines: list[list[tuple[float, float]]] = []
    together: list[float] = []
    for start in range(STARTS):
        found = _measure_engines(max(2, rounds // STARTS), is_plain_first=bool(start % 2))
        inside += found.inside
        engines.append(found.engines)
        together += found.together
    shares = [a / b - 1 for a, b, _ in inside]
    by_start = [median([a / b - 1 for a, b in pairs]) for pairs in engines]
    return {
        "pairs": len(inside),
        "decode_ms": median([a for a, _, _ in inside]),
        "plain_decode_ms": median([b for _, b, _ in inside]),
        "share": median(shares),
        "share_interval": interval(shares),
        "steps": median([n for _, _, n in inside]),
        "microseconds_a_step": median([1e3 * (a - b) / n for a, b, n in inside]),
        "engine_pairs": sum(map(len, engines)),
        "engine_shares": sorted(by_start),
        "engine_share": median(by_start),
        "sixteen_pairs": len(together),
        "sixteen_share": median(together),
        "sixteen_share_interval": interval(together),
        "limit": MOST_CAPTURE_SHARE,
    }


class _Found(NamedTuple):
    """What one start of the two engines gave.

    Attributes:
        inside: with and without a vector in one engine, milliseconds, and steps.
        engines: in the engine with the plug-in, asked for a vector, and in the one without it.
        together: sixteen at once, the engine with the plug-in over the one without it, less 1.
    """

    inside: list[tuple[float, float, int]]
    engines: list[tuple[float, float]]
    together: list[float]


def _measure_engines(rounds: int, is_plain_first: bool) -> _Found:
    requests = questions(12)
    kinds = [VllmPolicy, PlainVllmPolicy]
    opened = {kind: open_policy(kind) for kind in (kinds[::-1] if is_plain_first else kinds)}
    captured, plain = opened[VllmPolicy], opened[PlainVllmPolicy]
    assert isinstance(captured, VllmPolicy)
    assert isinstance(plain, VllmPolicy)
    found = _Found([], [], [])
    with captured, plain:
        ways = {
            "asked": (captured, True),
            "not asked": (captured, False),
            "without": (plain, False),
        }
        for request in requests:
            written = {decode(policy, request, asks)[1] for policy, asks in ways.values()}
            assert len(written) == 1, "the engines wrote different answers"
        for number in range(rounds * len(requests)):
            times = {}
            order = list(ways)[number % 3 :] + list(ways)[: number % 3]
            for way in order:
                policy, asks = ways[way]
                times[way], steps = decode(policy, requests[number % len(requests)], asks)
            found.inside.append((times["asked"], times["not asked"], steps - 1))
            found.engines.append((times["asked"], times["without"]))
        both = (captured, plain)
        for number in range(2 * rounds):
            walls = {}
            for policy in both if number % 2 else both[::-1]:
                walls[policy] = wall(decode, policy, [*requests, *requests[:4]])
            found.together.append(walls[captured] / walls[plain] - 1)
    return found


def measure_capture_work(rounds: int) -> dict[str, Any]:
    """Time what the capture itself does in a step of the engine, without an engine.

    The logits processor over a batch in which nobody reads ``<REF_POS>``, over one in which
    everybody does, and the lookup of a batch that has not changed; medians.
    """
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from coprs_deploy.policy.vllm_policy.capture import STEP, CaptureRequest, HiddenStateCapture

    torch.set_num_threads(1)
    width, vocabulary, reference, stop = 3584, 152_064, 7, 2
    config = SimpleNamespace(speculative_config=None)
    rows = []
    for requests in (1, 16):
        found: dict[str, float] = {}
        for kind, last in (("writing", 5), ("reading_reference", reference)):
            with HiddenStateTransport(width) as files:
                capture = HiddenStateCapture(config, torch.device("cpu"), False)
                paths = [files.open() for _ in range(requests)]
                added = []
                for row, path in enumerate(paths):
                    order = CaptureRequest(str(path), reference, stop, 1, 2000)
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
