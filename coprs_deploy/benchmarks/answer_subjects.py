"""Whole answers as subjects: one question, several on one picture, several pictures at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.benchmarks.arrays import OUTPUT_FILE, write_arrays
from coprs_deploy.benchmarks.case import TOTAL, Subject
from coprs_deploy.benchmarks.inputs import ask, open_policy, open_torch_stages, scenes
from coprs_deploy.bundle import open_bundle, read_manifest
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_graph
from coprs_deploy.policy import Policy
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.runtime import CoPRS
from coprs_deploy.runtime.options import RuntimeOptions
from coprs_deploy.runtime.result import SegmentationResult, Timings
from coprs_deploy.specs import IMAGE_ENCODER

if TYPE_CHECKING:
    from coprs_deploy.data.examples import Example

STAGES = {
    "picture": "image_ms",
    "picture for the policy": "policy_image_ms",
    "image encoder, not hidden": "",
    "policy prefill": "prefill_ms",
    "policy decode": "decode_ms",
    "prior": "prior_ms",
    "mask decoder": "mask_decoder_ms",
    "back to original size": "resize_ms",
}
"""Parts of an answer; together with ``other`` they are its whole time."""


def open_answers(
    bundle: str,
    count: int,
    *,
    runtime: str | None = None,
    device: str = "cpu",
    kept: bool = False,
    side: int | None = None,
) -> Subject:
    """Open a bundle as a user does.

    Args:
        bundle: a bundle.
        count: how many scenes are asked about in turn.
        runtime: that runs the graphs; None takes the bundle's own.
        device: of graphs and policy.
        kept: whether the embedding of a picture is kept, and was computed before.
        side: of the pictures, enlarged to it; None leaves the scenes as they are.
    """
    return AnswerSubject(_open(bundle, runtime, device, count if kept else 0), count, kept, side)


def _open(bundle: str, runtime: str | None, device: str, cached_images: int) -> CoPRS:
    manifest = read_manifest(bundle)
    own = manifest.graphs[IMAGE_ENCODER].runtime
    if runtime in (None, own):
        return CoPRS.load(bundle, RuntimeOptions(device=device, cached_images=cached_images))
    opened = open_bundle(bundle)
    options = RunnerOptions(device=device)
    runners = {
        name: open_graph(runtime or own, opened.graph_path(name), graph.spec, options, graph.engine)
        for name, graph in manifest.graphs.items()
    }
    record = manifest.policy
    policy = TransformersPolicy(
        opened.policy_path, record.prompt, record.min_pixels, record.max_pixels, device=device
    )
    return CoPRS(SegmentationGraphs(runners), policy, manifest.geometry, cached_images)


def open_torch_answers(checkpoint: str, count: int, side: int | None = None) -> Subject:
    """Open the same with PyTorch's float32 modules in place of the graphs, on the CPU."""
    source = read_checkpoint(checkpoint)
    stages, policy = open_torch_stages(checkpoint), open_policy(source)
    coprs = CoPRS(stages, policy, source.config.model.geometry, 0)
    return AnswerSubject(coprs, count, False, side)


def write_answers(folder: str, checkpoint: str, count: int, side: int | None) -> None:
    """Leave the answers of PyTorch in float32, as :class:`AnswerSubject` leaves its own."""
    with open_torch_answers(checkpoint, count, side) as subject:
        Path(folder).mkdir(parents=True, exist_ok=True)
        subject.finish(Path(folder))


class AnswerSubject(Subject):
    """Asks about one scene after the other."""

    def __init__(self, coprs: CoPRS, count: int, kept: bool, side: int | None) -> None:
        self._coprs = coprs
        self._scenes = scenes(count)
        self._pictures = [_enlarge(scene.image, side) for scene in self._scenes]
        self._next = itertools.cycle(range(count))
        self._tokens: list[int] = []
        if kept:
            for picture in self._pictures:
                coprs.segment(picture, "the circle", max_new_tokens=1)

    def run(self) -> Mapping[str, float]:
        """Answer the next question."""
        index = next(self._next)
        answer = self._coprs.segment(self._pictures[index], self._scenes[index].instruction)
        self._tokens.append(answer.timings.response_tokens)
        return stage_times(answer.timings)

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Leave the mask of every scene and the true ones."""
        answers = (
            self._coprs.segment(picture, scene.instruction)
            for scene, picture in zip(self._scenes, self._pictures, strict=True)
        )
        leave_masks(folder, answers, self._scenes)
        if not self._tokens:
            return {}
        return {"figures": {"response_tokens": float(np.median(self._tokens))}}

    def close(self) -> None:
        """Free graphs and policy."""
        self._coprs.close()


def leave_masks(
    folder: Path, answers: Iterable[SegmentationResult], asked: Sequence[Example]
) -> None:
    """Leave the masks of answers for the judge, and the true ones at the size of the picture."""
    found: dict[str, NDArray[np.bool_]] = {}
    for index, (answer, scene) in enumerate(zip(answers, asked, strict=True)):
        found[f"{index}.mask"] = answer.mask
        truth = Image.fromarray(np.any(scene.masks, axis=0))
        size = answer.mask.shape[::-1]
        found[f"{index}.truth"] = np.asarray(truth.resize(size, Image.Resampling.NEAREST))
    write_arrays(folder / OUTPUT_FILE, found)


def stage_times(timings: Timings) -> dict[str, float]:
    """Split an answer's time into parts that add up."""
    known = asdict(timings)
    parts = {name: float(known[key]) for name, key in STAGES.items() if key}
    waited = max(0.0, timings.image_encoder_ms - timings.image_encoder_hidden_ms)
    ordered = {name: waited if not key else parts[name] for name, key in STAGES.items()}
    ordered["other"] = max(0.0, timings.total_ms - sum(ordered.values()))
    return {TOTAL: timings.total_ms, **ordered}


def open_questions(bundle: str, questions: int, count: int, device: str = "cpu") -> Subject:
    """Open several questions on one new picture; a run is all of them.

    Args:
        bundle: a bundle.
        questions: how many on each picture.
        count: how many scenes are taken in turn.
        device: of graphs and policy.
    """
    coprs = CoPRS.load(bundle, RuntimeOptions(device=device, cached_images=1))
    return QuestionsSubject(coprs, questions, count)


class QuestionsSubject(Subject):
    """Asks several questions on one picture, whose embedding is computed once."""

    def __init__(self, coprs: CoPRS, questions: int, count: int) -> None:
        self._coprs = coprs
        self._questions = questions
        self._asked = scenes(count)
        self._scenes = itertools.cycle(self._asked)

    def run(self) -> Mapping[str, float]:
        """Answer all questions on the next picture; it counts by the question."""
        scene = next(self._scenes)
        answers = [
            self._coprs.segment(scene.image, scene.instruction) for _ in range(self._questions)
        ]
        total = sum(answer.timings.total_ms for answer in answers)
        return {TOTAL: total / self._questions}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Leave the last answer on every picture."""
        answers = (
            [self._coprs.segment(s.image, s.instruction) for _ in range(self._questions)][-1]
            for s in self._asked
        )
        leave_masks(folder, answers, self._asked)
        return {}

    def close(self) -> None:
        """Free graphs and policy."""
        self._coprs.close()


def open_pictures(bundle: str, pictures: int, device: str = "cpu") -> Subject:
    """Open several pictures at once; a run is all of them."""
    return PicturesSubject(
        CoPRS.load(bundle, RuntimeOptions(device=device, cached_images=2)), pictures
    )


class PicturesSubject(Subject):
    """Answers one question on each of several pictures; the next is encoded meanwhile."""

    def __init__(self, coprs: CoPRS, pictures: int) -> None:
        self._coprs = coprs
        self._scenes = scenes(pictures)
        self._asked = [(scene.image, scene.instruction) for scene in self._scenes]

    def run(self) -> Mapping[str, float]:
        """Answer them all; it counts by the picture."""
        start = time.perf_counter()
        for _ in self._coprs.segment_many(self._asked):
            pass
        return {TOTAL: 1e3 * (time.perf_counter() - start) / len(self._asked)}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Leave the answer on every picture."""
        leave_masks(folder, self._coprs.segment_many(self._asked), self._scenes)
        return {}

    def close(self) -> None:
        """Free graphs and policy."""
        self._coprs.close()


def open_policy_alone(
    checkpoint: str, count: int, *, library: str, dtype: str, device: str = "cpu"
) -> Subject:
    """Open the policy of a checkpoint by a library, without any graph."""
    return PolicySubject(open_policy(read_checkpoint(checkpoint), dtype, library, device), count)


class PolicySubject(Subject):
    """Lets the policy write one response after the other."""

    def __init__(self, policy: Policy, count: int) -> None:
        self._policy = policy
        self._scenes = scenes(count)
        self._next = itertools.cycle(self._scenes)
        self._speeds: list[float] = []
        self._prompt_tokens = 0

    def run(self) -> Mapping[str, float]:
        """Write the response to the next question."""
        result = ask(self._policy, next(self._next))
        self._speeds.append(1e3 * len(result.token_ids) / result.decode_ms)
        self._prompt_tokens = result.num_prompt_tokens
        return {"prefill": result.prefill_ms, "decode": result.decode_ms}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Leave the concentration of every scene, and say how fast tokens come."""
        found = {
            f"{index}.concentration": ask(self._policy, scene).concentrations
            for index, scene in enumerate(self._scenes)
        }
        write_arrays(folder / OUTPUT_FILE, found)
        figures = {
            "tokens_per_s": float(np.median(self._speeds)),
            "prompt_tokens": float(self._prompt_tokens),
        }
        return {"figures": figures}

    def close(self) -> None:
        """Free the policy."""
        self._policy.close()


def _enlarge(image: Any, side: int | None) -> Any:
    if side is None:
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
