"""GRPO on the demo model, from a damaged and from the mature policy: run, compare and report.

    python training/grpo_experiments.py RUNS [--jobs 2] [--reports training/reports/grpo]

Each run is one of the recipe ``grpo_demo`` in its own directory below RUNS. Finished runs are kept,
interrupted ones resume. A run uses one core. The report covers the finished runs: a gain is
measured on the same held-out scenes before and after, so its standard error is that of the
difference per scene, averaged over the seeds first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from coprs_deploy import demo
from coprs_deploy.artifacts import write_json
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.console import markdown_table
from coprs_deploy.evaluation.metrics import standard_error
from coprs_deploy.evaluation.reports.plots import pyplot
from coprs_deploy.specs import Record
from coprs_deploy.training.runs.run_directory import REPORT_FILE, RunDirectory, read_report
from coprs_deploy.training.state import state_from_checkpoint

RECIPE = "grpo_demo"

REPORTS = Path(__file__).parent / "reports" / "grpo"

DAMAGED_DIRECTORY = "damaged"

NOISE = 0.44
"""Standard deviation of the noise on each matrix of the damaged policy, relative to its own."""

NOISE_SEED = 0

COMPLETIONS = 32
"""Completions per step, for every group size."""

SMOOTHED_STEPS = 5
"""Steps averaged in a point of a curve: a step has only a few prompts."""


class Experiment(Record, frozen=True):
    """One run.

    Attributes:
        name: name of its directory.
        start: ``damaged`` or ``mature``.
        label: name of the compared setting.
        seed: seed of the run.
        settings: changes of the recipe.
    """

    name: str
    start: str
    label: str
    seed: int
    settings: tuple[str, ...] = ()


class Gain(NamedTuple):
    """One metric before and after.

    Attributes:
        before: mean over held-out scenes.
        after: mean over scenes and seeds.
        gain: mean difference.
        stderr: standard error of the mean difference.
        by_seed: mean difference of each seed.
    """

    before: float
    after: float
    gain: float
    stderr: float
    by_seed: tuple[float, ...]


class Row(Record, frozen=True):
    """One start and setting over its seeds.

    Attributes:
        start: ``damaged`` or ``mature``.
        label: name of the setting.
        seeds: seeds of the finished runs.
        steps: steps of each run.
        minutes: minutes of each run.
        giou: gIoU of greedy responses on held-out scenes.
        reward: reward of the same responses.
        kl: mean KL divergence over the last steps.
        reward_std: mean standard deviation of the rewards of a step.
    """

    start: str
    label: str
    seeds: tuple[int, ...]
    steps: int
    minutes: tuple[float, ...]
    giou: Gain
    reward: Gain
    kl: float
    reward_std: float


def experiments() -> list[Experiment]:
    """Return all planned runs, the most important ones first."""
    modes = {mode: (f"stages.grpo.mode={mode}",) for mode in ("joint", "rl", "segmentation")}
    longer = {
        f"{mode}, 50 steps": (
            *modes[mode],
            "stages.grpo.max_steps=50",
            "stages.grpo.eval_steps=25",
        )
        for mode in ("joint", "rl")
    }
    groups = {
        f"joint, groups of {n}": (
            f"stages.grpo.num_generations={n}",
            f"stages.grpo.global_batch_size={COMPLETIONS // n}",
        )
        for n in (4, 2)
    }
    seeds = (0, 1)
    planned: list[tuple[str, str, int, tuple[str, ...]]] = []
    planned += [("damaged", mode, seed, change) for mode, change in modes.items() for seed in seeds]
    planned += [("mature", "joint", seed, modes["joint"]) for seed in seeds]
    planned += [
        ("damaged", size, seed, change) for size, change in groups.items() for seed in seeds
    ]
    planned += [("damaged", label, 0, change) for label, change in longer.items()]
    return [
        Experiment(f"{start}-{_directory_name(label)}-{seed}", start, label, seed, changes)
        for start, label, seed, changes in planned
    ]


def write_damaged_checkpoint(out: Path) -> None:
    """Write the demo checkpoint with noise on the matrices of its language model.

    The reasoning then fails on some prompts only, which gives groups different rewards; the
    segmentation path is unchanged.
    """
    state = state_from_checkpoint(read_checkpoint(demo.CHECKPOINT))
    generator = torch.Generator().manual_seed(NOISE_SEED)
    with torch.no_grad():
        for name, weight in state.policy.model.named_parameters():
            if "language_model.layers" in name and weight.ndim == 2:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(NOISE * weight.std() * noise)
    provenance = {"from": "the demo model", "noise": NOISE, "seed": NOISE_SEED}
    state.save_checkpoint(out, "float32", provenance, overwrite=True)


def run(experiment: Experiment, runs: Path, more: Sequence[str] = ()) -> None:
    """Run an experiment in its directory, unless it is finished."""
    out = runs / experiment.name
    if (out / REPORT_FILE).is_file():
        return
    command = [sys.executable, "-m", "coprs_deploy", "train", RECIPE, "--out", str(out)]
    settings = [f"seed={experiment.seed}", *experiment.settings, *more]
    if experiment.start == "damaged":
        settings.append(f"model.path={runs / DAMAGED_DIRECTORY}")
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def write_experiment_report(runs: Path, reports: Path) -> list[Row]:
    """Write ``report.md``, ``report.json`` and ``curves.png`` of the finished runs.

    Raises:
        ValueError: no run is finished.
    """
    finished = [e for e in experiments() if (runs / e.name / REPORT_FILE).is_file()]
    if not finished:
        raise ValueError(f"no finished run in {runs}; start them without --only-report")
    rows = []
    for start, label in dict.fromkeys((e.start, e.label) for e in finished):
        rows.append(_row(runs, [e for e in finished if (e.start, e.label) == (start, label)]))
    environment = json.loads((runs / finished[0].name / "environment.json").read_text("utf-8"))
    missing = [e.name for e in experiments() if e not in finished]
    reports.mkdir(parents=True, exist_ok=True)
    _plot(reports / "curves.png", runs, finished, rows)
    (reports / "report.md").write_text(_page(rows, environment, missing), encoding="utf-8")
    write_json(
        reports / "report.json",
        {"rows": [_as_json(row) for row in rows], "missing": missing, "environment": environment},
    )
    return rows


def _directory_name(label: str) -> str:
    return label.replace(",", "").replace(" steps", "").replace("groups of ", "").replace(" ", "-")


def _step_log(run_path: Path) -> list[dict[str, Any]]:
    return [line for line in RunDirectory(run_path).read_log() if "reward" in line]


def _row(runs: Path, chosen: Sequence[Experiment]) -> Row:
    stages = [read_report(runs / e.name)["stages"]["grpo"] for e in chosen]
    steps = stages[0]["steps"]
    logs = [_step_log(runs / e.name) for e in chosen]
    return Row(
        start=chosen[0].start,
        label=chosen[0].label,
        seeds=tuple(e.seed for e in chosen),
        steps=steps,
        minutes=tuple(stage["seconds"] / 60 for stage in stages),
        giou=_gain(runs, chosen, steps, "mask_iou"),
        reward=_gain(runs, chosen, steps, "reward"),
        kl=float(np.mean([line["kl"] for log in logs for line in log[-SMOOTHED_STEPS:]])),
        reward_std=float(np.mean([line["reward_std"] for log in logs for line in log])),
    )


def _gain(runs: Path, chosen: Sequence[Experiment], steps: int, field: str) -> Gain:
    before = np.array([_held_out(runs / e.name, 0, field) for e in chosen])
    after = np.array([_held_out(runs / e.name, steps, field) for e in chosen])
    difference = after - before
    return Gain(
        before=float(before.mean()),
        after=float(after.mean()),
        gain=float(difference.mean()),
        stderr=standard_error(difference.mean(0).tolist()),
        by_seed=tuple(float(x) for x in difference.mean(1)),
    )


def _held_out(run_path: Path, step: int, field: str) -> NDArray[np.float64]:
    """Return a field of the held-out examples, ordered by id."""
    file = run_path / "held_out" / "grpo" / f"step-{step:06d}.json"
    examples = json.loads(file.read_text(encoding="utf-8"))["examples"]
    return np.array([example[field] for example in sorted(examples, key=lambda e: str(e["id"]))])


def _page(rows: Sequence[Row], environment: Mapping[str, Any], missing: Sequence[str]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    lines = [
        "# GRPO on the demo model",
        "",
        f"Recipe `{RECIPE}`; greedy responses on 256 held-out scenes, before and after, with the",
        "standard error of the difference on the same scenes. *Damaged* is the demo model with",
        f"noise of {NOISE:g} standard deviations on each matrix of its language model, so that its",
        "reasoning often fails; *mature* is the demo model itself. A step learns from",
        f"{COMPLETIONS} completions.",
        "",
    ]
    header = (
        *("start", "setting", "seeds", "steps", "gIoU before", "after", "gain", "by seed"),
        *("reward gain", "KL", "reward std", "minutes"),
    )
    cells = []
    for row in rows:
        giou, reward = row.giou, row.reward
        cells.append(
            (
                row.start,
                row.label,
                ", ".join(map(str, row.seeds)),
                str(row.steps),
                f"{giou.before:.4f}",
                f"{giou.after:.4f}",
                f"{giou.gain:+.4f} ± {giou.stderr:.4f}",
                ", ".join(f"{gain:+.4f}" for gain in giou.by_seed),
                f"{reward.gain:+.4f} ± {reward.stderr:.4f}",
                f"{row.kl:.3f}",
                f"{row.reward_std:.3f}",
                ", ".join(f"{minutes:.0f}" for minutes in row.minutes),
            )
        )
    lines += [*markdown_table(header, cells), ""]
    lines += ["![reward of the sampled completions, and gains](curves.png)", ""]
    lines += [_summary(row) for row in rows]
    if missing:
        lines += ["", f"Planned and not finished: {', '.join(missing)}."]
    lines += [
        "",
        f"Run on {environment['machine']}, shared with other work, which affects the minutes; "
        f"{versions}.",
        "To repeat every run:",
        "",
        "```bash",
        "python training/grpo_experiments.py runs/grpo",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _summary(row: Row) -> str:
    giou = row.giou
    ratio = abs(giou.gain) / giou.stderr if giou.stderr else 0.0
    verb = "gains" if giou.gain > 0 else "loses"
    verdict = "significant" if ratio > 2 else "not significant"
    return (
        f"- {row.start}, {row.label}: {verb} {abs(giou.gain):.3f} gIoU, {ratio:.1f} standard "
        f"errors, {verdict}."
    )


def _as_json(row: Row) -> dict[str, Any]:
    return {**row.to_json(), "giou": row.giou._asdict(), "reward": row.reward._asdict()}


def _plot(path: Path, runs: Path, finished: Sequence[Experiment], rows: Sequence[Row]) -> None:
    plt = pyplot()
    canvas, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    colors = {(row.start, row.label): f"C{number % 10}" for number, row in enumerate(rows)}
    kernel = np.ones(SMOOTHED_STEPS) / SMOOTHED_STEPS
    for experiment in finished:
        rewards = np.array([line["reward"] for line in _step_log(runs / experiment.name)])
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
    right.barh(
        [f"{row.start}, {row.label}" for row in rows],
        [row.giou.gain for row in rows],
        xerr=[row.giou.stderr for row in rows],
        color=[colors[row.start, row.label] for row in rows],
    )
    right.axvline(0, color="black", linewidth=0.8)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.set(xlabel="gain of the gIoU, held out", title="greedy, with standard errors")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    canvas.tight_layout()
    canvas.savefig(path, dpi=120)
    plt.close(canvas)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the unfinished experiments, then write the report."""
    parser = argparse.ArgumentParser(description="GRPO experiments on the demo model.")
    parser.add_argument("runs", type=Path, help="directory of the runs")
    parser.add_argument("--reports", type=Path, default=REPORTS, help="directory of the report")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one core each")
    parser.add_argument("--only-report", action="store_true", help="write the report, run nothing")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    if not options.only_report:
        if not (options.runs / DAMAGED_DIRECTORY).is_dir():
            write_damaged_checkpoint(options.runs / DAMAGED_DIRECTORY)
        with ThreadPoolExecutor(options.jobs) as pool:
            futures = [pool.submit(run, e, options.runs, options.set) for e in experiments()]
        for future in futures:
            future.result()
    write_experiment_report(options.runs, options.reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
