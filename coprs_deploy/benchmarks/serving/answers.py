"""Whole answers beside the policy alone, by split of the cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from coprs_deploy import demo
from coprs_deploy.benchmarks.serving.asking import (
    ask,
    interval,
    median,
    open_policy,
    questions,
)
from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.images import prepare_image
from coprs_deploy.policy import Policy, PolicyRequest
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.runtime import CoPRS, Timings
from coprs_deploy.runtime.target_decoding import decode_targets


def measure_answers(rounds: int) -> dict[str, Any]:
    """Compare whole answers with the policy alone and with encoding first, by split of the cores.

    Each question shows a picture that is new to the runtime; the three ways take turns.
    """
    import torch

    cores = len(os.sched_getaffinity(0))
    rows = []
    for policy_threads, graph_threads in sorted({(a, b) for a in (1, cores) for b in (1, cores)}):
        torch.set_num_threads(policy_threads)
        with _parts(graph_threads) as (stages, policy, geometry):
            coprs = CoPRS(stages, policy, geometry, cached_images=0)
            found: dict[str, list[float]] = {"answer": [], "policy": [], "one_by_one": []}
            timings: list[Timings] = []
            for number, request in enumerate(questions(rounds + 2, skip=100)):
                ways: dict[str, Callable[[], Any]] = {
                    "answer": partial(coprs.segment, request.rgb, request.instruction),
                    "policy": partial(ask, policy, request),
                    "one_by_one": partial(_one_by_one, stages, policy, geometry, request),
                }
                order = list(ways)[number % 3 :] + list(ways)[: number % 3]
                for way in order:
                    start = time.perf_counter()
                    result = ways[way]()
                    if number >= 2:  # the first two warm up
                        found[way].append(1e3 * (time.perf_counter() - start))
                        if way == "answer":
                            timings.append(result.timings)
            rows.append(_answer_row(policy_threads, graph_threads, found, timings))
    return {"policy": "transformers", "rows": rows}


def _answer_row(
    policy_threads: int,
    graph_threads: int,
    found: dict[str, list[float]],
    timings: Sequence[Timings],
) -> dict[str, Any]:
    over_policy = [a / p - 1 for a, p in zip(found["answer"], found["policy"], strict=True)]
    over_one_by_one = [a / b - 1 for a, b in zip(found["answer"], found["one_by_one"], strict=True)]
    return {
        "policy_threads": policy_threads,
        "graph_threads": graph_threads,
        **{f"{way}_ms": median(values) for way, values in found.items()},
        "answer_over_policy": median(over_policy),
        "answer_over_policy_interval": interval(over_policy),
        "answer_over_one_by_one": median(over_one_by_one),
        "image_encoder_ms": median([t.image_encoder_ms for t in timings]),
        "image_encoder_hidden_ms": median([t.image_encoder_hidden_ms for t in timings]),
        "reference_to_mask_ms": median([t.reference_to_mask_ms for t in timings]),
    }


@contextmanager
def _parts(graph_threads: int) -> Iterator[tuple[SegmentationGraphs, Policy, Any]]:
    bundle = open_bundle(demo.BUNDLE)
    options = RunnerOptions(num_threads=graph_threads)
    names = bundle.manifest.graphs
    with (
        SegmentationGraphs(
            {name: open_bundle_graph(bundle, name, options) for name in names}
        ) as stages,
        open_policy(TransformersPolicy) as policy,
    ):
        yield stages, policy, bundle.manifest.geometry


def _one_by_one(
    stages: SegmentationGraphs, policy: Policy, geometry: Any, request: PolicyRequest
) -> None:
    """Answer without overlap: the image encoder first, then the policy, then the mask."""
    prepared = prepare_image(request.rgb, geometry)
    embedding = stages.encode(prepared)
    _, result = ask(policy, request)
    if len(result.concentrations):
        for _ in decode_targets(stages, embedding, result.concentrations, prepared, geometry):
            pass
