"""Whole requests and the policy alone as workloads, on held-out scenes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coprs_deploy.bench.case import OUTPUT_FILE, TOTAL, Values, Workload, write_arrays
from coprs_deploy.bench.reference import ask, open_policy, open_torch_graphs, scenes
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.policy import Policy
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
    bundle: str, count: int, *, device: str, runtime: str | None = None, **settings: Any
) -> Workload:
    """Open a bundle as a user does, with requests on ``count`` scenes in turn."""
    max_cached_images = settings.pop("max_cached_images", 0)
    options = RuntimeOptions(device=device, runtime=runtime, max_cached_images=max_cached_images)
    return RequestWorkload(CoPRS.load(bundle, options), count, **settings)


def open_torch_requests(checkpoint: str, count: int, side: int | None = None) -> RequestWorkload:
    """Open PyTorch's float32 modules in place of the graphs, on the CPU."""
    source = read_checkpoint(checkpoint)
    graphs, policy = open_torch_graphs(checkpoint), open_policy(source)
    coprs = CoPRS(graphs, policy, source.config.model.geometry, RuntimeOptions(max_cached_images=0))
    return RequestWorkload(coprs, count, side=side)


def open_batch(bundle: str, images: int, device: str) -> Workload:
    """Open one request on each of several images; a run is all of them."""
    options = RuntimeOptions(device=device, max_cached_images=2)
    return _BatchWorkload(CoPRS.load(bundle, options), images)


class RequestWorkload(Workload):
    """Requests on one scene after the other.

    Args:
        coprs: closed with the workload.
        count: number of scenes.
        cached: compute the embeddings of all scenes before.
        questions: requests on the same image in one run, whose mean counts.
        side: enlarge images to this side; None keeps the scenes' own.
    """

    def __init__(
        self,
        coprs: CoPRS,
        count: int,
        *,
        cached: bool = False,
        questions: int = 1,
        side: int | None = None,
    ) -> None:
        self._coprs, self._questions, self._scenes = coprs, questions, scenes(count)
        self._images: list[Any] = [scene.image for scene in self._scenes]
        if side is not None:
            images = (Image.fromarray(image) for image in self._images)
            enlarged = (image.resize((side, side), Image.Resampling.BICUBIC) for image in images)
            self._images = [np.asarray(image) for image in enlarged]
        self._next, self._tokens = itertools.cycle(range(count)), list[int]()
        for image in self._images if cached else ():
            coprs.segment(image, "the circle", max_new_tokens=1)

    def _ask(self, index: int) -> list[SegmentationResult]:
        image, instruction = self._images[index], self._scenes[index].instruction
        return [self._coprs.segment(image, instruction) for _ in range(self._questions)]

    def run(self) -> Mapping[str, float]:
        """Answer the next question, or several on one image; their mean counts."""
        timings = [result.timings for result in self._ask(next(self._next))]
        self._tokens += [each.response_tokens for each in timings]
        stages = [stage_times(each) for each in timings]
        return {name: sum(each[name] for each in stages) / len(stages) for name in stages[0]}

    def results(self) -> Iterable[SegmentationResult]:
        """Return the last result on every scene."""
        return (self._ask(index)[-1] for index in range(len(self._scenes)))

    def masks(self) -> Values:
        """Return mask and ground truth of every scene, at the size of the image."""
        found: Values = {}
        for index, (result, scene) in enumerate(zip(self.results(), self._scenes, strict=True)):
            found[f"{index}.mask"] = result.mask
            ground_truth = Image.fromarray(np.any(scene.masks, axis=0))
            ground_truth = ground_truth.resize(result.mask.shape[::-1], Image.Resampling.NEAREST)
            found[f"{index}.ground_truth"] = np.asarray(ground_truth)
        return found

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Write mask and ground truth of every scene."""
        write_arrays(folder / OUTPUT_FILE, self.masks())
        tokens = {"response_tokens": float(np.median(self._tokens))} if self._tokens else {}
        return {"metrics": tokens}

    def close(self) -> None:
        """Free graphs and policy."""
        self._coprs.close()


class _BatchWorkload(RequestWorkload):
    """One request on each of several images, the next of which is encoded meanwhile."""

    def run(self) -> Mapping[str, float]:
        """Answer all requests; the time of one image counts."""
        start = time.perf_counter()
        for _ in self.results():
            pass
        return {TOTAL: 1e3 * (time.perf_counter() - start) / len(self._scenes)}

    def results(self) -> Iterable[SegmentationResult]:
        return self._coprs.segment_many([(s.image, s.instruction) for s in self._scenes])


def stage_times(timings: Timings) -> dict[str, float]:
    """Split the time of a request into stages that add up."""
    known = asdict(timings)
    waited = max(0.0, timings.image_encoder_ms - timings.image_encoder_overlap_ms)
    stages = {name: float(known[key]) if key else waited for name, key in STAGES.items()}
    stages["other"] = max(0.0, timings.total_ms - sum(stages.values()))
    return {TOTAL: timings.total_ms, **stages}


def open_policy_alone(
    checkpoint: str, count: int, *, library: str, dtype: str, device: str = "cpu"
) -> Workload:
    """Open the policy of a checkpoint by a library, without any graph."""
    return _PolicyWorkload(open_policy(read_checkpoint(checkpoint), dtype, library, device), count)


class _PolicyWorkload(Workload):
    """Responses of the policy, one after the other."""

    def __init__(self, policy: Policy, count: int) -> None:
        self._policy, self._scenes = policy, scenes(count)
        self._next = itertools.cycle(self._scenes)
        self._speeds: list[float] = []
        self._prompt_tokens = 0

    def run(self) -> Mapping[str, float]:
        result = ask(self._policy, next(self._next))
        self._speeds.append(1e3 * len(result.token_ids) / result.decode_ms)
        self._prompt_tokens = result.num_prompt_tokens
        return {"prefill": result.prefill_ms, "decode": result.decode_ms}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Write the concentrations of every scene; report tokens per second."""
        vectors = [ask(self._policy, scene).concentrations for scene in self._scenes]
        found = {f"{i}.concentration": each for i, each in enumerate(vectors)}
        write_arrays(folder / OUTPUT_FILE, found)
        speed = float(np.median(self._speeds))
        return {"metrics": {"tokens_per_s": speed, "prompt_tokens": float(self._prompt_tokens)}}

    def close(self) -> None:
        self._policy.close()
