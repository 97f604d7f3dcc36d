"""Whole requests and the policy alone as workloads, on held-out scenes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.bench import accuracy
from coprs_deploy.bench.case import TOTAL, Values, Workload
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.data.synthetic.presets import PLAIN
from coprs_deploy.evaluation.metrics import union
from coprs_deploy.runtime import CoPRS
from coprs_deploy.runtime.options import RuntimeOptions
from coprs_deploy.runtime.result import SegmentationResult, Timings

STAGES = {
    "image decode": "image_decode_ms",
    "policy preprocessing": "policy_preprocess_ms",
    "image encoder, not overlapped": "",
    "policy prefill": "prefill_ms",
    "policy decode": "decode_ms",
    "prior": "prior_ms",
    "mask decoder": "mask_decoder_ms",
    "mask resize": "resize_ms",
}
"""Stages of a request; together with ``other`` they are its whole time."""


def open_requests(
    bundle: Path,
    *,
    device: str,
    policy: str,
    runtime: str | None = None,
    cached: int = 2,
    prompt_lookup: int = 0,
    **settings: Any,
) -> Workload:
    """Open a bundle as a user does, with requests on held-out scenes in turn."""
    options = RuntimeOptions(
        device=device,
        runtime=runtime,
        policy=policy,
        max_cached_images=cached,
        prompt_lookup_num_tokens=prompt_lookup,
    )
    coprs = CoPRS.load(bundle, options)
    workload = _LimitedWorkload if "limits" in settings else _RequestWorkload
    return workload(coprs, **settings)


def open_torch_requests(checkpoint: Path, **settings: Any) -> Workload:
    """Open PyTorch's float32 modules in place of the graphs, on the CPU."""
    modules = accuracy.open_reference(checkpoint)
    policy = accuracy.open_policy(read_checkpoint(checkpoint))
    options = RuntimeOptions(max_cached_images=0)
    return _RequestWorkload(CoPRS(modules.graphs(), policy, modules.geometry, options), **settings)


@dataclass
class _RequestWorkload(Workload):
    """Requests on ``count`` scenes, one after the other; the mean of ``questions`` on each counts.

    ``images`` is a number of scenes on which requests are made at once; a run is all of them.
    ``side`` enlarges scenes. ``warms_cache`` computes the embeddings of all scenes before.
    """

    coprs: CoPRS
    reference: accuracy.SceneReference
    count: int
    warms_cache: bool = False
    questions: int = 1
    images: int = 0
    side: int | None = None
    preset: str = PLAIN.name

    def __post_init__(self) -> None:
        self._scenes = accuracy.scenes(self.images or self.count, self.side, self.preset)
        self._tokens: list[int] = []
        self._next = itertools.cycle(self._scenes)
        for scene in self._scenes if self.warms_cache else ():
            self.coprs.segment(scene.image, "the circle", max_new_tokens=1)

    def run(self) -> Mapping[str, float]:
        if self.images:
            start = time.perf_counter()
            self._results()
            return {TOTAL: 1e3 * (time.perf_counter() - start) / len(self._scenes)}
        scene = next(self._next)
        results = [
            self.coprs.segment(scene.image, scene.instruction) for _ in range(self.questions)
        ]
        self._tokens += [result.timings.response_tokens for result in results]
        stages = [stage_times(result.timings) for result in results]
        return {name: sum(each[name] for each in stages) / len(stages) for name in stages[0]}

    def _results(self) -> list[SegmentationResult]:
        """Return a result on every scene."""
        requests = [(scene.image, scene.instruction) for scene in self._scenes]
        if self.images:  # the next image is encoded meanwhile
            return list(self.coprs.segment_many(requests))
        return [self.coprs.segment(*request) for request in requests]

    def finish(self) -> Mapping[str, Any]:
        """Compare the mask of every scene; report the length of responses."""
        found: Values = {}
        for index, (result, scene) in enumerate(zip(self._results(), self._scenes, strict=True)):
            found[f"{index}.mask"] = result.mask
            found[f"{index}.ground_truth"] = union(scene.masks)
        tokens = {"response_tokens": float(np.median(self._tokens))} if self._tokens else {}
        return {"metrics": tokens, "accuracy": self.reference.accuracy(found)}

    def close(self) -> None:
        self.coprs.close()


@dataclass
class _LimitedWorkload(_RequestWorkload):
    """Requests with limits of the reasoning; the accuracy is that of the measured requests."""

    limits: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.coprs.warm_up()
        self._found: dict[int, SegmentationResult] = {}
        self._number = 0

    def run(self) -> Mapping[str, float]:
        index = self._number % self.count
        self._number += 1
        scene = self._scenes[index]
        result = self.coprs.segment(scene.image, scene.instruction, **self.limits)
        self._found.setdefault(index, result)
        self._tokens.append(result.timings.response_tokens)
        return stage_times(result.timings)

    def _results(self) -> list[SegmentationResult]:
        while len(self._found) < self.count:
            self.run()
        return [self._found[index] for index in range(self.count)]

    def finish(self) -> Mapping[str, Any]:
        """Report also the share of requests that ended in time, if there was a deadline."""
        found = dict(super().finish())
        if deadline_ms := self.limits.get("deadline_ms"):
            times = [result.timings.total_ms for result in self._found.values()]
            share = float(np.mean([time <= deadline_ms for time in times]))
            found["metrics"] = {**found["metrics"], "in_time_share": share}
        return found


def stage_times(timings: Timings) -> dict[str, float]:
    """Split the time of a request into stages that add up."""
    known = asdict(timings)
    waited = max(0.0, timings.image_encoder_ms - timings.image_encoder_overlap_ms)
    stages = {name: float(known[key]) if key else waited for name, key in STAGES.items()}
    stages["other"] = max(0.0, timings.total_ms - sum(stages.values()))
    return {TOTAL: timings.total_ms, **stages}


@dataclass
class PolicyWorkload(Workload):
    """The policy of a checkpoint by a library, without any graph, on scenes in turn."""

    checkpoint: Path
    reference: accuracy.SceneReference
    count: int
    library: str
    dtype: str
    device: str = "cpu"
    preset: str = PLAIN.name

    def __post_init__(self) -> None:
        source = read_checkpoint(self.checkpoint)
        self._policy = accuracy.open_policy(source, self.dtype, self.library, self.device)
        self._scenes = accuracy.scenes(self.count, preset=self.preset)
        self._metrics = dict[str, list[float]]()
        self._next = itertools.cycle(self._scenes)

    def run(self) -> Mapping[str, float]:
        """Ask about the next scene."""
        result = accuracy.ask(self._policy, next(self._next))
        speed = 1e3 * len(result.token_ids) / result.decode_ms
        self._metrics.setdefault("tokens_per_s", []).append(speed)
        self._metrics["prompt_tokens"] = [float(result.num_prompt_tokens)]
        return {"prefill": result.prefill_ms, "decode": result.decode_ms}

    def finish(self) -> Mapping[str, Any]:
        """Compare concentrations, and their masks by float32 graphs; report tokens per second."""
        found = accuracy.scene_outputs(
            self._policy, accuracy.open_reference(self.checkpoint), self._scenes
        )
        metrics = {name: float(np.median(values)) for name, values in self._metrics.items()}
        return {"metrics": metrics, "accuracy": self.reference.accuracy(found)}

    def close(self) -> None:
        """Free the policy."""
        self._policy.close()
