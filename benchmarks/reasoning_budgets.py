"""Measure accuracy against the number of reasoning tokens, for several checkpoints of one preset.

Each checkpoint generates its responses once, greedily. At each budget the reasoning is truncated
and the tail forced, as the runtime does, and the masks are compared with the ground truth of
held-out scenes with one target. The first checkpoint is the baseline of the differences, which are
paired by scene. `--latency NAME=REPORT.json`, of `coprs-deploy bench BUNDLE --suite latency`, adds
the times of a request, and `--draw` makes one chart of several presets.

  python benchmarks/reasoning_budgets.py before=CHECKPOINT after=runs/x/checkpoint --out plain.md
  python benchmarks/reasoning_budgets.py --draw plain.json full.json --out chart.png
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coprs_deploy.bench.request_suites import REASONING_BUDGETS
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.console import format_ms, markdown_table
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
from coprs_deploy.evaluation.reports.plots import pyplot
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
    parser.add_argument("checkpoints", nargs="*", type=_named, metavar="NAME=CHECKPOINT")
    parser.add_argument("--latency", nargs="+", type=_named, default=[], metavar="NAME=REPORT.json")
    parser.add_argument(
        "--draw", nargs="+", type=Path, metavar="JSON", help="draw these into --out"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="plain")
    parser.add_argument("--count", type=int, default=512, help="number of scenes (default: 512)")
    parser.add_argument(
        "--first-scene",
        type=int,
        default=FIRST_SCENE,
        help="number of the first held-out scene; choose on other scenes than you report "
        f"(default: {FIRST_SCENE})",
    )
    parser.add_argument("--out", type=Path, help="table, with its JSON beside it; or chart")
    parsed = parser.parse_args(arguments)
    if parsed.draw:
        if not parsed.out:
            parser.error("--draw needs --out; accepted: a PNG file")
        parsed.out.write_bytes(draw([json.loads(path.read_text("utf-8")) for path in parsed.draw]))
        return 0
    if not parsed.checkpoints:
        parser.error("NAME=CHECKPOINT is missing; the first one is the baseline")
    times = {name: _times(path) for name, path in parsed.latency}
    preset = PRESETS[parsed.preset]
    questions = _questions(preset, parsed.first_scene, parsed.count)
    found = {}
    for name, path in parsed.checkpoints:
        found[name] = _measure(path, preset, questions)
        for budget, quantiles in times.get(name, {}).items():
            found[name]["budgets"][budget] |= quantiles
        print(name, json.dumps(found[name]["budgets"]), file=sys.stderr, flush=True)
    report = {
        "preset": preset.name,
        "first_scene": parsed.first_scene,
        "num_scenes": len(questions),
        "checkpoints": found,
    }
    table = _table(found)
    print(table)
    print(json.dumps(report))
    if parsed.out:
        parsed.out.write_text(table + "\n", encoding="utf-8")
        parsed.out.with_suffix(".json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    return 0


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator:
        raise ValueError(f"{text} names no file")
    return name, Path(path)


def _times(path: Path) -> dict[str, dict[str, float]]:
    """Read p50 and p99 of a request in ms, by budget."""
    groups = json.loads(path.read_text("utf-8"))["groups"]
    (group,) = (g for g in groups if g["suite"] == "latency")
    names = {"no reasoning": "0", "whole reasoning": "all"}
    names |= {f"{budget} tokens": str(budget) for budget in REASONING_BUDGETS}
    return {
        names[case["name"]]: {q: case["latency"][q] for q in ("p50", "p99")}
        for case in group["cases"]
        if case["name"] in names and case["latency"]
    }


def _questions(preset: Preset, first: int, count: int) -> list[SceneExample]:
    """Ask a question about each of the scenes, and keep those with one target."""
    made = [make_scene(preset, HELD_OUT_SEED + first + number) for number in range(count)]
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


def draw(reports: Sequence[dict[str, Any]]) -> bytes:
    """Draw gIoU over tokens and over the median time of a request, one row for each report.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    plt = pyplot()
    canvas, grid = plt.subplots(
        len(reports), 2, figsize=(9.6, 3.1 * len(reports)), squeeze=False, sharey="row"
    )
    for (by_tokens, by_time), report in zip(grid, reports, strict=True):
        for name, measured in report["checkpoints"].items():
            cells = list(measured["budgets"].values())
            ious, timed = [c["giou"] for c in cells], [c for c in cells if "p50" in c]
            by_tokens.plot([c["reasoning_tokens"] for c in cells], ious, "o-", label=name)
            by_time.plot([c["p50"] for c in timed], [c["giou"] for c in timed], "o-", label=name)
        by_tokens.set(xlabel="mean reasoning tokens", ylabel=f"gIoU, {report['preset']} scenes")
        by_time.set(xlabel="median time of a request, ms", xlim=(0, None))
        by_tokens.set_ylim(0, 1.02)
        for axes in (by_tokens, by_time):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        by_tokens.legend(fontsize=8, loc="lower right")
    canvas.tight_layout()
    data = io.BytesIO()
    canvas.savefig(data, dpi=110, format="png")
    plt.close(canvas)
    return data.getvalue()


def _table(found: dict[str, Any]) -> str:
    """Write gIoU and P@0.5 by budget, and the paired difference from the first checkpoint."""
    baseline, *others = found
    heads = ["reasoning tokens, at most", *(f"{name}: gIoU, P@0.5" for name in found)]
    heads += [f"gIoU, {name} - {baseline}" for name in others]
    timed = [name for name in found if "p50" in found[name]["budgets"]["all"]]
    heads += [f"{name}: p50, p99 of a request" for name in timed]
    rows = []
    for budget in next(iter(found.values()))["budgets"]:
        cells = [found[name]["budgets"][budget] for name in found]
        row = [budget, *(f"{c['giou']:.3f}, {c['precision_at_50']:.3f}" for c in cells)]
        for other in cells[1:]:
            paired = np.array(other["ious"]) - np.array(cells[0]["ious"])
            row.append(f"{paired.mean():+.4f} ± {standard_error(paired.tolist()):.4f}")
        for name in timed:
            cell = found[name]["budgets"][budget]
            row.append(", ".join(format_ms(cell[q]) for q in ("p50", "p99") if q in cell))
        rows.append(row)
    return "\n".join(markdown_table(heads, rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
