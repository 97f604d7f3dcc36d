"""Asking the shipped policy, and the figures that are made of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from coprs_deploy import demo
from coprs_deploy.benchmarks.statistics import median_interval
from coprs_deploy.bundle import open_bundle
from coprs_deploy.policy import Policy, PolicyRequest, PolicyResult


def median(values: Sequence[float]) -> float:
    """Return the median, rounded to where a figure still means something."""
    return round(statistics.median(values), 4)


def questions(count: int, skip: int = 0) -> list[PolicyRequest]:
    """Ask about held-out scenes of the shipped model, one question each."""
    from coprs_deploy.data.synthetic import PLAIN
    from coprs_deploy.data.synthetic.examples import held_out_examples

    examples = held_out_examples(PLAIN, skip + count, 0)[skip:]
    return [PolicyRequest(example.image, example.instruction) for example in examples]


def ask(policy: Policy, request: PolicyRequest) -> tuple[float, PolicyResult]:
    """Ask once: milliseconds and the result."""
    start = time.perf_counter()
    (result,) = (e for e in policy.stream(request) if isinstance(e, PolicyResult))
    return 1e3 * (time.perf_counter() - start), result


def open_policy(kind: Callable[..., Policy], **options: Any) -> Policy:
    """Open the shipped policy."""
    bundle = open_bundle(demo.BUNDLE)
    record = bundle.manifest.policy
    return kind(bundle.policy_path, record.prompt, record.min_pixels, record.max_pixels, **options)


def interval(values: Sequence[float]) -> list[float]:
    """Bound the median with 95 % confidence, rounded as the median is."""
    return [round(bound, 4) for bound in median_interval(values)]


def wall(
    work: Callable[[Any, PolicyRequest], Any], policy: Policy, requests: Sequence[PolicyRequest]
) -> float:
    """Ask all at once; seconds until the last answer."""
    with ThreadPoolExecutor(len(requests)) as pool:
        start = time.perf_counter()
        for _ in pool.map(lambda request: work(policy, request), requests):
            pass
        return time.perf_counter() - start
