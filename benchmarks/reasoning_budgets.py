"""Measure accuracy against the number of reasoning tokens, for several checkpoints of one preset.

Each checkpoint generates its responses once, greedily. At each budget the reasoning is truncated
and the tail forced, as the runtime does, and the masks are compared with the ground truth of
held-out scenes with one target. The first checkpoint is the baseline of the differences, which are
paired by scene. Times belong to `coprs-deploy bench --suite latency`.

  python benchmarks/reasoning_budgets.py before=coprs_deploy/demo/checkpoint after=runs/x/checkpoint
"""

from __future__ import annotations

import argparse
import json
import sys
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coprs_deploy.bench.request_suites import REASONING_BUDGETS
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.console import markdown_table
from coprs_deploy.curriculum.evaluation import (
    BATCH_SIZE,
    SceneEvaluator,
    SceneExample,
    held_out_questions,
)
from coprs_deploy.curriculum.packed_forward import PackedForward
from coprs_deploy.curriculum.packing import QuestionPacker
from coprs_deploy.curriculum.scenes import StoredScenes
from coprs_deploy.data.synthetic import HELD_OUT_SEED, make_scene
from coprs_deploy.data.synthetic.presets import PRESETS, Preset
from coprs_deploy.evaluation.metrics import standard_error
from coprs_deploy.evaluation.protocols import TARGETS
from coprs_deploy.evaluation.rows import EvaluationRow
from coprs_deploy.evaluation.summary import row_iou
from coprs_deploy.training.state import state_from_checkpoint

FIRST_SCENE = 5000
"""First held-out scene: trainings choose and report on the ones before."""

BUDGETS = (0, *REASONING_BUDGETS, None)
"""Largest numbers of reasoning tokens; None truncates nothing."""


def main(arguments: list[str]) -> int:
    """Measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="plain")
    parser.add_argument("--count", type=int, default=512, help="number of scenes (default: 512)")
    parser.add_argument("--out", type=Path, help="file for the table; its JSON lies beside it")
    parsed = parser.parse_args(arguments)
    preset = PRESETS[parsed.preset]
    questions = _questions(preset, parsed.count)
    found = {}
    for named in parsed.checkpoints:
        name, _, path = named.partition("=")
        found[name] = _measure(Path(path), preset, questions)
        print(name, json.dumps(found[name]["budgets"]), file=sys.stderr, flush=True)
    report = {"preset": preset.name, "num_scenes": len(questions), "checkpoints": found}
    table = _table(found)
    print(table)
    print(json.dumps(report))
    if parsed.out:
        parsed.out.write_text(table + "\n", encoding="utf-8")
        parsed.out.with_suffix(".json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    return 0


def _questions(preset: Preset, count: int) -> list[SceneExample]:
    """Ask a question about each of the scenes, and keep those with one target."""
    made = [make_scene(preset, HELD_OUT_SEED + FIRST_SCENE + number) for number in range(count)]
    scenes = StoredScenes(
        np.stack([scene.image for scene in made]),
        np.stack([scene.instance_map for scene in made]),
        [scene.objects for scene in made],
    )
    questions = held_out_questions(preset, scenes, count, 0)
    return [question for question in questions if len(question.targets) == 1]


def _measure(path: Path, preset: Preset, questions: list[SceneExample]) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    state = state_from_checkpoint(checkpoint)
    state.policy.model.eval()
    state.segmentation.eval()
    vision = state.policy.model.config.vision_config
    side = isqrt(checkpoint.config.policy_image.max_pixels)
    grid = side // vision.patch_size // vision.spatial_merge_size
    packer = QuestionPacker(state.policy.tokenizer, state.policy.prompt, grid)
    forward = PackedForward(state.policy.model, preset.image_size, torch.float32)
    evaluator = SceneEvaluator(state, forward, packer)
    responses: list[list[int]] = []
    for start in range(0, len(questions), BATCH_SIZE):
        requested = [(q.image, q.instruction) for q in questions[start : start + BATCH_SIZE]]
        responses += evaluator.generate(*zip(*requested, strict=True))
    lengths = np.array([len(packer.reasoning_columns(each)) for each in responses])
    budgets = {}
    for budget in BUDGETS:
        given = responses
        if budget is not None:
            given = [evaluator.truncate(each, budget) for each in responses]
        rows = evaluator.evaluate(questions, given)
        kept = lengths if budget is None else np.minimum(lengths, budget)
        budgets["all" if budget is None else str(budget)] = _metrics(rows, float(kept.mean()))
    return {
        "fingerprint": checkpoint.fingerprint(),
        "median_reasoning_tokens": float(np.median(lengths)),
        "budgets": budgets,
    }


def _metrics(rows: list[EvaluationRow], num_kept: float) -> dict[str, Any]:
    ious = [row_iou(row, TARGETS) for row in rows]
    return {
        "giou": float(np.mean(ious)),
        "giou_stderr": standard_error(ious),
        "precision_at_50": float(np.mean(np.array(ious) > 0.5)),
        "reasoning_tokens": num_kept,
        "ious": [round(iou, 4) for iou in ious],
    }


def _table(found: dict[str, Any]) -> str:
    """Write gIoU and P@0.5 by budget, and the paired difference from the first checkpoint."""
    baseline, *others = found
    heads = ["reasoning tokens, at most", *(f"{name}: gIoU, P@0.5" for name in found)]
    heads += [f"gIoU, {name} - {baseline}" for name in others]
    rows = []
    for budget in next(iter(found.values()))["budgets"]:
        cells = [found[name]["budgets"][budget] for name in found]
        row = [budget, *(f"{c['giou']:.3f}, {c['precision_at_50']:.3f}" for c in cells)]
        for other in cells[1:]:
            paired = np.array(other["ious"]) - np.array(cells[0]["ious"])
            row.append(f"{paired.mean():+.4f} ± {standard_error(paired.tolist()):.4f}")
        rows.append(row)
    return "\n".join(markdown_table(heads, rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
