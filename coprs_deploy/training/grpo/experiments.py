"""GRPO on the shipped model, from a damaged and from the mature policy: runs, and their report.

    python -m coprs_deploy.training.grpo.experiments RUNS [--jobs 2] [--reports docs/reports/grpo]

Each run is an ordinary one of the recipe ``grpo_shipped`` in a folder of its own below RUNS; what
has ended is kept, what was stopped goes on. A run keeps one core busy. The report is written from
the runs that have ended.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from coprs_deploy import demo
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.training.grpo.experiment_report import write_experiment_report
from coprs_deploy.training.grpo.planned_experiments import (
    DAMAGE,
    RECIPE,
    Experiment,
    experiments,
)
from coprs_deploy.training.run_directory import REPORT_FILE
from coprs_deploy.training.state import state_from_checkpoint

DAMAGE_SEED = 0
DAMAGED_FOLDER = "damaged"


def damage(out: Path) -> None:
    """Write the shipped checkpoint with noise on the matrices of its language model.

    The reasoning then goes wrong in some cases and right in others, which is what a group needs;
    the segmentation path is untouched.
    """
    workbench = state_from_checkpoint(read_checkpoint(demo.CHECKPOINT))
    generator = torch.Generator().manual_seed(DAMAGE_SEED)
    with torch.no_grad():
        for name, weight in workbench.policy.model.named_parameters():
            if "language_model.layers" in name and weight.ndim == 2:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(DAMAGE * weight.std() * noise)
    provenance = {"from": "the shipped model", "noise": DAMAGE, "seed": DAMAGE_SEED}
    workbench.save_checkpoint(out, "float32", provenance, overwrite=True)


def run(experiment: Experiment, runs: Path, more: Sequence[str] = ()) -> None:
    """Run an experiment in its folder, unless it has ended there."""
    out = runs / experiment.name
    if (out / REPORT_FILE).is_file():
        return
    command = [sys.executable, "-m", "coprs_deploy.cli.main", "train", RECIPE, "--out", str(out)]
    settings = [f"seed={experiment.seed}", *experiment.settings, *more]
    if experiment.start == "damaged":
        settings.append(f"model.path={runs / DAMAGED_FOLDER}")
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Run what has not ended, then write the report."""
    parser = argparse.ArgumentParser(description="GRPO on the shipped model.")
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--reports", type=Path, default=Path("docs/reports/grpo"))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, a core each")
    parser.add_argument("--only-report", action="store_true", help="start no run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if not arguments.only_report:
        if not (arguments.runs / DAMAGED_FOLDER).is_dir():
            damage(arguments.runs / DAMAGED_FOLDER)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            ending = [pool.submit(run, e, arguments.runs, arguments.set) for e in experiments()]
        for ended in ending:
            ended.result()
    write_experiment_report(arguments.runs, arguments.reports)


if __name__ == "__main__":
    main()
