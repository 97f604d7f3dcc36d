"""The report of the GRPO experiments: a table with errors, curves, and the figures as JSON.

A gain is measured on the same held-out scenes before and after, so its standard error is that of
the difference of each scene, averaged over the seeds first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.artifacts import write_json
from coprs_deploy.evaluation.metrics import standard_error
from coprs_deploy.evaluation.plots import pyplot
from coprs_deploy.specs import Record
from coprs_deploy.training.grpo.planned_experiments import (
    DAMAGE,
    RECIPE,
    RESPONSES,
    Experiment,
    experiments,
)
from coprs_deploy.training.run_directory import REPORT_FILE, RunDirectory, read_report

FIGURES = ("mask_iou", "reward")
SMOOTHED_STEPS = 5
"""Steps that one point of a curve averages: a step has only a few prompts."""


class Gain(NamedTuple):
    """One figure before and after.

    Attributes:
        before: mean over held-out scenes.
        after: mean over scenes and seeds.
        gain: mean difference.
        error: its standard error.
        by_seed: the gain of each seed.
    """

    before: float
    after: float
    gain: float
    error: float
    by_seed: tuple[float, ...]


class Row(Record, frozen=True):
    """What is compared: one start and one setting, over its seeds.

    Attributes:
        start: ``damaged`` or ``mature``.
        label: of the setting.
        seeds: that have ended.
        steps: of each run.
        minutes: of each run.
        mask_iou: of greedy answers on held-out scenes.
        reward: of the same.
        kl: mean divergence over the last steps.
        spread: mean standard deviation of the rewards of a step.
    """

    start: str
    label: str
    seeds: tuple[int, ...]
    steps: int
    minutes: tuple[float, ...]
    mask_iou: Gain
    reward: Gain
    kl: float
    spread: float


def write_experiment_report(runs: Path, reports: Path) -> list[Row]:
    """Write ``report.md``, ``report.json`` and ``curves.png`` from the runs that have ended.

    Raises:
        ValueError: none has.
    """
    ended = [e for e in experiments() if (runs / e.name / REPORT_FILE).is_file()]
    if not ended:
        raise ValueError(f"no run has ended in {runs}")
    rows = []
    for start, label in dict.fromkeys((e.start, e.label) for e in ended):
        chosen = [e for e in ended if (e.start, e.label) == (start, label)]
        rows.append(_row(runs, chosen))
    environment = json.loads((runs / ended[0].name / "environment.json").read_text("utf-8"))
    reports.mkdir(parents=True, exist_ok=True)
    _plot(reports / "curves.png", runs, ended, rows)
    missing = [e.name for e in experiments() if e not in ended]
    (reports / "report.md").write_text(_page(rows, environment, missing), encoding="utf-8")
    write_json(
        reports / "report.json",
        {"rows": [_as_json(row) for row in rows], "missing": missing, "environment": environment},
    )
    return rows


def _row(runs: Path, chosen: Sequence[Experiment]) -> Row:
    reports = [read_report(runs / e.name) for e in chosen]
    phases = [report["phases"]["grpo"] for report in reports]
    steps = phases[0]["steps"]
    logs = [[x for x in RunDirectory(runs / e.name).read_log() if "reward" in x] for e in chosen]
    last = [line for log in logs for line in log[-SMOOTHED_STEPS:]]
    return Row(
        start=chosen[0].start,
        label=chosen[0].label,
        seeds=tuple(e.seed for e in chosen),
        steps=steps,
        minutes=tuple(phase["seconds"] / 60 for phase in phases),
        mask_iou=_gain(runs, chosen, steps, "mask_iou"),
        reward=_gain(runs, chosen, steps, "reward"),
        kl=float(np.mean([line["kl"] for line in last])),
        spread=float(np.mean([line["reward_spread"] for log in logs for line in log])),
    )


def _gain(runs: Path, chosen: Sequence[Experiment], steps: int, figure: str) -> Gain:
    before = np.array([_answers(runs / e.name, 0, figure) for e in chosen])
    after = np.array([_answers(runs / e.name, steps, figure) for e in chosen])
    difference = after - before
    return Gain(
        before=float(before.mean()),
        after=float(after.mean()),
        gain=float(difference.mean()),
        error=standard_error(difference.mean(0).tolist()),
        by_seed=tuple(float(x) for x in difference.mean(1)),
    )


def _answers(run: Path, step: int, figure: str) -> NDArray[np.float64]:
    file = run / "held_out" / "grpo" / f"step-{step:06d}.json"
    answers = json.loads(file.read_text(encoding="utf-8"))["answers"]
    return np.array([answer[figure] for answer in sorted(answers, key=lambda a: str(a["id"]))])


def _page(rows: Sequence[Row], environment: Mapping[str, Any], missing: Sequence[str]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    lines = [
        "# GRPO on the shipped model",
        "",
        f"Recipe `{RECIPE}`; greedy answers on 256 held-out scenes, before and after, with the",
        "standard error of the difference on the same scenes. *Damaged* is the shipped model with",
        f"noise of {DAMAGE:g} standard deviations on each matrix of its language model, so that",
        "its reasoning often goes wrong; *mature* is the shipped model as it is. A step learns",
        f"from {RESPONSES} responses.",
        "",
        "| start | setting | seeds | steps | mask IoU before | after | gain | by seed "
        "| reward gain | KL | reward spread | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        iou, reward = row.mask_iou, row.reward
        cells = [
            row.start,
            row.label,
            ", ".join(map(str, row.seeds)),
            str(row.steps),
            f"{iou.before:.4f}",
            f"{iou.after:.4f}",
            f"{iou.gain:+.4f} ± {iou.error:.4f}",
            ", ".join(f"{gain:+.4f}" for gain in iou.by_seed),
            f"{reward.gain:+.4f} ± {reward.error:.4f}",
            f"{row.kl:.3f}",
            f"{row.spread:.3f}",
            ", ".join(f"{minutes:.0f}" for minutes in row.minutes),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "![reward of the sampled responses, and gains](curves.png)", ""]
    lines += [_judgement(row) for row in rows]
    if missing:
        lines += ["", f"Planned, and not run to their end: {', '.join(missing)}."]
    lines += [
        "",
        f"Made on {environment['machine']}, shared with other work, hence the minutes; {versions}.",
        "Again, with every run:",
        "",
        "```bash",
        "python -m coprs_deploy.training.grpo.experiments runs/grpo --reports docs/reports/grpo",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _judgement(row: Row) -> str:
    gain = row.mask_iou
    size = abs(gain.gain) / gain.error if gain.error else 0.0
    word = "gains" if gain.gain > 0 else "loses"
    sure = "more than twice its standard error" if size > 2 else "within its standard error's reach"
    return (
        f"- {row.start}, {row.label}: {word} {abs(gain.gain):.3f} IoU, {size:.1f} errors, {sure}."
    )


def _as_json(row: Row) -> dict[str, Any]:
    data = row.to_json()
    for figure in FIGURES:
        data[figure] = getattr(row, figure)._asdict()
    return data


def _plot(path: Path, runs: Path, ended: Sequence[Experiment], rows: Sequence[Row]) -> None:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    colors = {(row.start, row.label): f"C{number % 10}" for number, row in enumerate(rows)}
    for experiment in ended:
        log = [x for x in RunDirectory(runs / experiment.name).read_log() if "reward" in x]
        rewards = np.array([line["reward"] for line in log])
        kernel = np.ones(SMOOTHED_STEPS) / SMOOTHED_STEPS
        smooth = np.convolve(rewards, kernel, mode="valid")
        key = (experiment.start, experiment.label)
        left.plot(
            np.arange(len(smooth)) + SMOOTHED_STEPS,
            smooth,
            color=colors[key],
            linestyle="--" if experiment.seed else "-",
            linewidth=1.2,
            label=None if experiment.seed else f"{key[0]}, {key[1]}",
        )
    left.set(xlabel="step", ylabel=f"reward, mean of {SMOOTHED_STEPS} steps", title="sampled")
    left.legend(fontsize=7)
    names = [f"{row.start}, {row.label}" for row in rows]
    right.barh(
        names,
        [row.mask_iou.gain for row in rows],
        xerr=[row.mask_iou.error for row in rows],
        color=[colors[row.start, row.label] for row in rows],
    )
    right.axvline(0, color="black", linewidth=0.8)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.set(xlabel="gain of the mask IoU, held out", title="greedy, with standard errors")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
