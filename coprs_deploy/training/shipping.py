"""From a finished run to the model that the package ships: checkpoint, bundle, card and report.

    python -m coprs_deploy.training.shipping RUN [--reports DIR]

is what ``make shipped`` calls after ``coprs-deploy train shipped``. With ``--only-report`` the
report is kept and the package stays as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coprs_deploy import demo
from coprs_deploy.artifacts import new_directory, write_json
from coprs_deploy.checkpoint import CONFIG_FILE, read_checkpoint
from coprs_deploy.data.synthetic.presets import PRESETS, Preset
from coprs_deploy.export import ExportOptions, export_checkpoint
from coprs_deploy.training.report import page
from coprs_deploy.training.run_directory import CHECKPOINT_FOLDER, REPORT_FILE, read_report

LARGEST_BYTES = 12_000_000
"""Checkpoint and bundle together: what a wheel may carry."""

REPORT_FOLDER = Path("docs/reports/shipped-model")


def ship(run: Path, root: Path = demo.ROOT, reports: Path = REPORT_FOLDER) -> int:
    """Put the model of a finished run in the package's place for it.

    Args:
        run: folder of the run.
        root: where checkpoint, bundle and card shall stand; older ones are replaced.
        reports: where its report and plots go.

    Returns:
        Bytes of checkpoint and bundle together.

    Raises:
        ValueError: the run has no report yet, or its model is too large.
        EquivalenceError: a graph does not compute what PyTorch computes.
    """
    report = _read_ended(run)
    source = read_checkpoint(run / CHECKPOINT_FOLDER)
    size = _size(source.path)
    if size > LARGEST_BYTES:
        raise ValueError(f"{source.path} has {size:,} bytes; at most {LARGEST_BYTES:,} are shipped")
    with new_directory(root / "checkpoint", CONFIG_FILE, overwrite=True) as partial:
        shutil.copytree(source.path, partial, dirs_exist_ok=True)
    options = ExportOptions(external_policy=True, overwrite=True)
    export_checkpoint(root / "checkpoint", root / "bundle", options)
    total = _size(root / "checkpoint") + _size(root / "bundle")
    if total > LARGEST_BYTES:
        raise ValueError(f"checkpoint and bundle have {total:,} bytes; at most {LARGEST_BYTES:,}")
    environment = keep_report(run, reports)
    (root / demo.MODEL_CARD.name).write_text(card(report, environment, total), encoding="utf-8")
    return total


def _read_ended(run: Path) -> dict[str, Any]:
    if not (run / REPORT_FILE).is_file():
        raise ValueError(
            f"{run} holds no {REPORT_FILE}: the run has not ended; `coprs-deploy train` with the "
            "same --out goes on with it"
        )
    return read_report(run)


def card(report: Mapping[str, Any], environment: Mapping[str, Any], size_bytes: int) -> str:
    """Write the model card from the figures of the run."""
    recipe, figures, fed = report["recipe"], report["generated"], report["teacher_forced"]
    tier = PRESETS[recipe["data"]["tier"]]
    kinds = [kind for kind in tier.kinds if kind != "none"]
    rows = ["all", *kinds]

    def row(kind: str) -> str:
        names = ("mask_iou", "precision_at_50", "right_object", "prior_iou")
        found = [figures[name if kind == "all" else f"{kind}.{name}"] for name in names]
        forced = fed["mask_iou" if kind == "all" else f"{kind}.mask_iou"]
        values = " | ".join(f"{value:.3f}" for value in (*found, forced))
        return f"| {kind.replace('_', ' ')} | {values} |"

    sizes = recipe["model"]
    policy, sam = sizes["policy"], sizes["segmentation"]["sam"]
    lines = [
        "# The shipped model",
        "",
        "A small CoPRS trained from random weights on generated scenes, so that every command of",
        "this package can be tried, tested and measured on weights that mean something. It knows",
        "nothing about photographs.",
        "",
        "## What it is",
        f"- Policy: Qwen2.5-VL's architecture, width {policy['width']}, {policy['depth']} layers, "
        f"vision tower of width {policy['vision_hidden_size']} with {policy['vision_depth']} blocks.",
        f"- Segmentation: SAM's architecture, image encoder of width {sam['encoder_embed_dim']} with "
        f"{sam['encoder_depth']} blocks, images of {tier.image_size} pixels.",
        f"- {size_bytes / 1e6:.1f} MB: checkpoint in {recipe['store']}, and the three graphs in "
        "float32.",
        "",
        "## What it was trained on",
        *_world(tier, recipe["data"]["num_training_scenes"]),
        "",
        f"The recipe is `coprs_deploy/training/recipes/shipped.toml`, seed {recipe['seed']}, "
        f"{report['minutes']:.0f} minutes on {environment['machine']} in {recipe['precision']}.",
        "",
        "## How well it answers",
        f"One generated (greedy) answer on each of {recipe['data']['num_held_out_scenes']:,} scenes "
        "that it never saw, weights as stored:",
        "",
        "| kind of question | mask IoU | P@0.5 | right object | prior IoU | IoU, reasoning given |",
        "|---|---|---|---|---|---|",
        *(row(kind) for kind in rows),
        "",
        f"Asked about something that is not there ({recipe['data']['num_no_match_scenes']} more "
        f"scenes), it says so in {100 * figures['no_match_recall']:.1f} % of the cases; "
        f"{100 * figures['no_match_precision']:.1f} % of its refusals are right. Pearson R of "
        f"prior IoU and mask IoU: {figures['pearson_r']:.3f}. Gates of the recipe: "
        f"{_gates(report)}.",
        "",
        "## Limits",
        "- Generated scenes only. A photograph is outside its world, and its answer then means "
        "nothing.",
        f"- Its words: {', '.join(tier.shapes)}; the colors and textures of its scenes; small, "
        "medium, large; left, right, above, below, and the extremes of place and size.",
        f"- {'One target' if tier.max_targets == 1 else f'Up to {tier.max_targets} targets'} an "
        "answer; instructions are noun phrases as in its training"
        f"{', in many wordings' if tier.has_paraphrases else ', in one wording'}.",
        "- Pictures are seen in a square of "
        f"{tier.image_size} pixels: thin parts of a mask are as coarse as that.",
    ]
    return "\n".join(lines) + "\n"


def _world(tier: Preset, num_scenes: int) -> list[str]:
    return [
        f"{num_scenes:,} generated scenes of the tier `{tier.name}`: {tier.num_objects[0]} to "
        f"{tier.num_objects[1]} objects, {len(tier.shapes)} shapes, {len(tier.textures)} textures, "
        f"{len(tier.backgrounds)} kinds of background; questions of the kinds "
        f"{', '.join(kind.replace('_', ' ') for kind in tier.kinds)}, asked afresh in each step. "
        f"`coprs-deploy scenes --tier {tier.name} --out sheet.png` shows them.",
    ]


def _gates(report: Mapping[str, Any]) -> str:
    missed = [
        f"{phase} {name} {gate['found']:.3f} (wanted {gate['wanted']:g})"
        for phase, result in report["phases"].items()
        for name, gate in result["gates"].items()
        if not gate["passed"]
    ]
    return f"missed {', '.join(missed)}" if missed else "all passed"


def keep_report(run: Path, reports: Path) -> dict[str, Any]:
    """Copy figures, page and plots of a finished run to where they are kept.

    Returns:
        Versions, machine and commit of the run.

    Raises:
        ValueError: the run has no report yet.
    """
    report = _read_ended(run)
    environment: dict[str, Any] = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    reports.mkdir(parents=True, exist_ok=True)
    plots = reports / "plots"
    shutil.rmtree(plots, ignore_errors=True)
    shutil.copytree(run / "plots", plots)
    shown = [f"![{plot.stem.replace('_', ' ')}](plots/{plot.name})" for plot in _plots(plots)]
    text = page(report) + "\n" + "\n".join(shown) + "\n"
    (reports / "report.md").write_text(text, encoding="utf-8")
    figures = {key: value for key, value in report.items() if key != "answers"}
    write_json(reports / REPORT_FILE, {**figures, "environment": environment})
    return environment


def _plots(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def _size(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def main() -> None:
    """Ship the run that is named on the command line."""
    parser = argparse.ArgumentParser(description="Ship the model of a finished run.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--root", type=Path, default=demo.ROOT)
    parser.add_argument("--reports", type=Path, default=REPORT_FOLDER)
    parser.add_argument("--only-report", action="store_true", help="ship no model")
    arguments = parser.parse_args()
    if arguments.only_report:
        keep_report(arguments.run, arguments.reports)
        return
    total = ship(arguments.run, arguments.root, arguments.reports)
    print(f"{arguments.root}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
