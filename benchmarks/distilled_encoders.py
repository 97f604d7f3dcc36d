"""Distilled image encoders: size against accuracy, from finished runs of `coprs-deploy train`.

    python benchmarks/distilled_encoders.py RUN... --out benchmarks/reports

All runs have the same teacher and the same held-out examples. Of each run, the last stage counts.
A run's ``evaluation/``, written by `coprs-deploy evaluate` with a bundle of its checkpoint, adds
gIoU with the policy's own responses; ``--teacher-evaluation`` is the teacher's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import write_json
from coprs_deploy.console import markdown_table
from coprs_deploy.evaluation.reports.plots import pyplot

NAME = "distilled-encoders"
SHARE_GOAL, GIOU_GOAL = 1 / 3, 0.01
"""Largest share of the teacher's multiply-adds, and largest loss of gIoU beside the teacher."""

METRICS = (
    *("embedding_error", "agreement_giou", "agreement_prior_giou"),
    *("giou", "prior_giou", "teacher_giou", "teacher_prior_giou"),
)


def read_run(path: Path) -> dict[str, Any]:
    """Read the row of a finished run."""
    report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    recipe, encoders, stages = report["recipe"], report["encoders"], report["stages"]
    last = list(stages.values())[-1]
    first = next(iter(stages.values()))
    inputs = json.loads((path / "inputs.json").read_text(encoding="utf-8"))
    row = {
        "run": path.name,
        "seed": recipe["seed"],
        "encoder": encoders["student"]["encoder"],
        "sizes": recipe["model"]["image_encoder"],
        "parameters": encoders["student"]["parameters"],
        "multiply_adds": encoders["student"]["multiply_adds"],
        "share": encoders["student"]["multiply_adds"] / encoders["teacher"]["multiply_adds"],
        "teacher": encoders["teacher"],
        "steps": {name: stage["steps"] for name, stage in stages.items()},
        "changed_steps": _changed_steps(path / "log.jsonl"),
        "minutes": report["minutes"],
        "images": inputs["images"]["examples"],
        "held_out": inputs["held_out"],
        "after_first_stage": {name: first["metrics"][name] for name in METRICS},
        **{name: last["metrics"][name] for name in METRICS},
        "environment": environment,
    }
    if (path / "evaluation/report.json").is_file():
        row["generated"] = read_evaluation(path / "evaluation")
    return row


def _changed_steps(log: Path) -> list[str]:
    """List changes of the number of steps when a run was resumed, which the log records."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [
        f"{key} from {old} to {new} at step {line['step']} of {line['stage']}"
        for line in map(json.loads, lines)
        for key, (old, new) in line.get("changed", {}).items()
        if key.endswith(".max_steps")
    ]


def read_evaluation(path: Path) -> dict[str, float]:
    """Read gIoU and P@0.5 of the one data set of an evaluation."""
    report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    (dataset,) = report["datasets"].values()
    return {name: dataset["metrics"][name] for name in ("giou", "precision_at_50")}


def goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """State for each run within the share whether it keeps the teacher's gIoU."""
    lines = []
    for row in rows:
        if row["share"] <= SHARE_GOAL:
            loss = _loss(row)
            state = "reached" if loss <= GIOU_GOAL else "missed"
            lines.append(
                f"{row['run']}, seed {row['seed']}: {row['share']:.3f} of the multiply-adds, gIoU "
                f"{loss:.4f} below the teacher's, goal at most {GIOU_GOAL:g}: {state}"
            )
    return lines


def _loss(metrics: dict[str, Any]) -> float:
    """Return how far gIoU is below the teacher's on the same examples."""
    return float(metrics["teacher_giou"] - metrics["giou"])


def render(report: dict[str, Any]) -> str:
    """Render the report as Markdown."""
    rows = report["rows"]
    teacher = rows[0]["teacher"]
    table = [
        (
            row["run"],
            row["encoder"],
            str(row["seed"]),
            " + ".join(map(str, row["steps"].values())),
            f"{row['parameters'] / 1e3:,.0f} k",
            f"{row['multiply_adds'] / 1e6:.1f} M",
            f"{row['share']:.3f}",
            f"{row['embedding_error']:.3f}",
            f"{row['agreement_giou']:.4f}",
            f"{row['giou']:.4f}",
            f"{_loss(row['after_first_stage']):.4f}",
            f"{_loss(row):.4f}",
            f"{row['prior_giou']:.4f}",
            f"{row['minutes']:.1f}",
        )
        for row in rows
    ]
    heads = (
        *("run", "student", "seed", "steps", "parameters", "multiply-adds", "of the teacher's"),
        *("embedding error", "mask IoU with the teacher", "gIoU"),
        *("below the teacher's after the first stage", "at the end", "prior gIoU", "minutes"),
    )
    first = rows[0]
    lines = [
        "# Distilled image encoders",
        "",
        f"Teacher: {teacher['encoder']}, {teacher['parameters'] / 1e3:,.0f} k parameters, "
        f"{teacher['multiply_adds'] / 1e6:.1f} M multiply-adds; on the same held-out examples its "
        f"gIoU is {first['teacher_giou']:.4f}, its prior's {first['teacher_prior_giou']:.4f}. "
        f"{first['images']:,} training images, {first['held_out']['examples']:,} held-out examples "
        "with the concentrations of the teacher's policy, teacher-forced; masks are compared at "
        "the size of their logits, after the first stage on the first of the examples. Minutes are "
        "those of one process with one thread on a busy machine.",
        "",
        *markdown_table(heads, table),
        "",
        f"![multiply-adds against gIoU]({NAME}.png)",
        "",
        *(f"- {line}" for line in goals(rows)),
        *(
            f"- {row['run']} was resumed with {', '.join(row['changed_steps'])}."
            for row in rows
            if row["changed_steps"]
        ),
        *_generated_lines(report),
        "",
        "Made by `python benchmarks/distilled_encoders.py RUN... --out benchmarks/reports`. "
        f"Machine: {first['environment'].get('processor', 'unknown')}.",
    ]
    return "\n".join(lines) + "\n"


def _generated_lines(report: dict[str, Any]) -> list[str]:
    """State gIoU with the policy's own responses, where it was measured."""
    found = {row["run"]: row["generated"] for row in report["rows"] if "generated" in row}
    if report["teacher_generated"]:
        found = {"teacher": report["teacher_generated"], **found}
    if not found:
        return []
    cells = [(run, f"{m['giou']:.4f}", f"{m['precision_at_50']:.4f}") for run, m in found.items()]
    text = "End to end, exported and with the policy's own responses (`coprs-deploy evaluate`):"
    return ["", text, "", *markdown_table(("run", "gIoU", "P@0.5"), cells)]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot gIoU against multiply-adds, a curve for each family, all seeds as points."""
    plt = pyplot()
    mpl_figure, axes = plt.subplots(figsize=(6.4, 4.2))
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        families[row["sizes"]["family"]].append(row)
    for family, members in sorted(families.items()):
        members.sort(key=lambda row: row["multiply_adds"])
        x = [row["multiply_adds"] / 1e6 for row in members]
        label = {"vit": "SAM's architecture", "tiny_vit": "TinyViT"}.get(family, family)
        axes.plot(x, [row["giou"] for row in members], marker="o", label=f"{label}: masks")
        axes.plot(
            x, [row["prior_giou"] for row in members], marker="s", ls="--", label=f"{label}: priors"
        )
    teacher = rows[0]["teacher"]["multiply_adds"] / 1e6
    axes.plot(teacher, rows[0]["teacher_giou"], "k*", markersize=12, label="teacher: masks")
    axes.plot(teacher, rows[0]["teacher_prior_giou"], "kP", markersize=8, label="teacher: priors")
    axes.axvline(teacher * SHARE_GOAL, color="gray", lw=0.8, ls=":")
    axes.axhline(rows[0]["teacher_giou"] - GIOU_GOAL, color="gray", lw=0.8, ls=":")
    axes.set(xlabel="multiply-adds of the image encoder, millions", ylabel="gIoU, held out")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    mpl_figure.tight_layout()
    mpl_figure.savefig(path, dpi=120)
    plt.close(mpl_figure)


def main(arguments: Sequence[str]) -> int:
    """Write ``distilled-encoders.json``, ``.md`` and ``.png``; print the goals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs")
    parser.add_argument("--teacher-evaluation", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    given = parser.parse_args(arguments)
    rows = sorted((read_run(path) for path in given.runs), key=lambda row: row["multiply_adds"])
    if len({(row["held_out"]["hash"], row["teacher_giou"]) for row in rows}) > 1:
        parser.error("the runs have other held-out examples or teachers; accepted: equal ones")
    evaluation = given.teacher_evaluation
    teacher = read_evaluation(evaluation) if evaluation else None
    report = {"suite": NAME, "rows": rows, "teacher_generated": teacher}
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / f"{NAME}.json", report)
    plot(rows, given.out / f"{NAME}.png")
    (given.out / f"{NAME}.md").write_text(render(report), encoding="utf-8")
    for line in goals(rows):
        print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
