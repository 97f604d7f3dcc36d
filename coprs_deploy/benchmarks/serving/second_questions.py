"""A second question on a picture, and the two policies beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from coprs_deploy import demo
from coprs_deploy.benchmarks.serving.asking import (
    ask,
    median,
    open_policy,
    questions,
    wall,
)
from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.policy.vllm_policy.policy import VllmPolicy
from coprs_deploy.runtime import CoPRS, Timings


def measure_questions(rounds: int) -> dict[str, Any]:
    """Compare a second question on a picture with the first, and the two policies with each other.

    Every picture is new when its first question is asked; the second is another question. Sixteen
    questions at once are on pictures that neither policy has seen.
    """
    first: list[Timings] = []
    second: list[Timings] = []
    bundle = open_bundle(demo.BUNDLE)
    options = RunnerOptions()
    with (
        SegmentationGraphs(
            {n: open_bundle_graph(bundle, n, options) for n in bundle.manifest.graphs}
        ) as stages,
        open_policy(VllmPolicy) as vllm,
        open_policy(TransformersPolicy) as transformers,
    ):
        coprs = CoPRS(stages, vllm, bundle.manifest.geometry)
        asked = questions(rounds + 3, skip=200)
        for number, (request, other) in enumerate(pairwise(asked)):
            texts = (request.instruction, other.instruction)
            one, two = (coprs.segment(request.rgb, text).timings for text in texts)
            if number >= 2:
                first.append(one)
                second.append(two)
        walls: dict[str, dict[str, list[float]]] = {}
        for number in range(max(3, rounds // 4)):
            single, *several = questions(17, skip=400 + 17 * number)
            policies = [("vllm", vllm), ("transformers", transformers)]
            for name, policy in policies if number % 2 else policies[::-1]:
                found = walls.setdefault(name, {"one": [], "sixteen": []})
                found["one"].append(1e3 * wall(ask, policy, [single]))
                found["sixteen"].append(1e3 * wall(ask, policy, several))
    return {
        "pictures": len(first),
        "first": _question_row(first),
        "second": _question_row(second),
        "rounds_of_policies": len(walls["vllm"]["one"]),
        "policies": {
            name: {f"{count}_ms": median(values) for count, values in found.items()}
            for name, found in walls.items()
        },
    }


def _question_row(timings: Sequence[Timings]) -> dict[str, float]:
    return {name: median([getattr(timing, name) for timing in timings]) for name in _ROW_NAMES}


_ROW_NAMES = (
    "prefill_ms",
    "decode_ms",
    "image_encoder_ms",
    "reference_to_mask_ms",
    "total_ms",
    "cached_prompt_tokens",
    "prompt_tokens",
    "response_tokens",
)
