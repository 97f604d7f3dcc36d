"""Build the demo model of the package from a finished run: checkpoint, bundle, card and report.

    python training/build_demo_model.py RUN [--reports DIRECTORY] [--only-report]

``make demo-model`` calls this after ``coprs-deploy train demo`` and, from its checkpoint,
``coprs-deploy train demo_truncated``. ``--only-report`` copies the report of the run and leaves the
package unchanged; ``--only-bundle`` exports the checkpoint of the package again and ``--only-card``
writes the model card again, both from the report in DIRECTORY.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coprs_deploy import demo
from coprs_deploy.artifacts import new_directory, write_json
from coprs_deploy.checkpoint import CONFIG_FILE, read_checkpoint
from coprs_deploy.console import markdown_table
from coprs_deploy.data.synthetic.presets import PRESETS, Preset
from coprs_deploy.export import ExportOptions, export_checkpoint
from coprs_deploy.training.runs.report import page
from coprs_deploy.training.runs.run_directory import CHECKPOINT_FOLDER, REPORT_FILE, read_report

MAX_BYTES = 12_000_000
"""Maximum size of checkpoint and bundle together in the wheel."""

METRIC_COLUMNS = (
    *("question type", "gIoU", "P@0.5"),
    *("object accuracy", "prior gIoU", "gIoU, teacher-forced"),
)

REPORTS = Path(__file__).parent / "reports" / "demo-model"


def build_demo_model(run: Path, root: Path = demo.ROOT, reports: Path = REPORTS) -> int:
    """Replace the demo model by the model of a finished run.

    Args:
        run: directory of the run.
        root: directory of checkpoint, bundle and model card.
        reports: directory of the report and its plots.

    Returns:
        Size of checkpoint and bundle in bytes.

    Raises:
        ValueError: the run is not finished, or its model is too large.
        EquivalenceError: a graph differs from PyTorch by more than its tolerance.
    """
    report = _read_finished(run)
    source = read_checkpoint(run / CHECKPOINT_FOLDER)
    _check_size(_size(source.path))
    with new_directory(root / "checkpoint", CONFIG_FILE, overwrite=True) as partial:
        shutil.copytree(source.path, partial, dirs_exist_ok=True)
    total = export_bundle(root)
    environment = copy_report(run, reports)
    write_model_card(report, environment, root)
    return total


def export_bundle(root: Path) -> int:
    """Export the checkpoint in ``root``, with the policy as graphs beside its weights.

    Returns:
        Size of checkpoint and bundle in bytes.

    Raises:
        ValueError: they are too large.
        EquivalenceError: a graph differs from PyTorch by more than its tolerance.
    """
    options = ExportOptions(policy_runtime="both", external_policy=True, overwrite=True)
    export_checkpoint(root / "checkpoint", root / "bundle", options)
    total = _model_size(root)
    _check_size(total)
    return total


def copy_report(run: Path, reports: Path) -> dict[str, Any]:
    """Copy metrics, page and plots of a finished run to ``reports``.

    Returns:
        Environment of the run: versions, machine and commit.

    Raises:
        ValueError: the run is not finished.
    """
    report = _read_finished(run)
    environment: dict[str, Any] = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    reports.mkdir(parents=True, exist_ok=True)
    plots = reports / "plots"
    shutil.rmtree(plots, ignore_errors=True)
    shutil.copytree(run / "plots", plots)
    images = [
        f"![{plot.stem.replace('_', ' ')}](plots/{plot.name})"
        for plot in sorted(plots.glob("*.png"))
    ]
    text = page(report) + "\n" + "\n".join(images) + "\n"
    (reports / "report.md").write_text(text, encoding="utf-8")
    kept = {key: value for key, value in report.items() if key != "examples"}
    write_json(reports / REPORT_FILE, {**kept, "environment": environment})
    return environment


def write_model_card(report: Mapping[str, Any], environment: Mapping[str, Any], root: Path) -> None:
    """Write the model card of the checkpoint and bundle in ``root``."""
    text = model_card(report, environment, _model_size(root))
    (root / demo.MODEL_CARD.name).write_text(text, encoding="utf-8")


def model_card(report: Mapping[str, Any], environment: Mapping[str, Any], size_bytes: int) -> str:
    """Return the model card in Markdown, with the metrics of the run."""
    recipe, metrics = report["recipe"], report["generated"]
    data, policy = recipe["data"], recipe["model"]["policy"]
    sam = recipe["model"]["segmentation"]["sam"]
    joint, short = recipe["stages"]["joint"], report["stages"]["joint"]["metrics"]
    preset = PRESETS[data["preset"]]
    targets = "One target" if preset.max_targets == 1 else f"Up to {preset.max_targets} targets"
    wordings = "in many wordings" if preset.has_paraphrases else "in one wording"
    lines = [
        "# The demo model",
        "",
        "A small CoPRS model trained on synthetic scenes alone, so that every command of this",
        "package can be run, tested and measured on trained weights. It does not work on",
        "photographs.",
        "",
        "## Architecture",
        f"- Policy: Qwen2.5-VL, hidden size {policy['hidden_size']}, "
        f"{policy['num_hidden_layers']} layers; vision tower with hidden size "
        f"{policy['vision_hidden_size']} and {policy['vision_depth']} blocks.",
        f"- Segmentation: SAM, image encoder with embedding size {sam['encoder_embed_dim']} and "
        f"{sam['encoder_depth']} blocks, images of {preset.image_size} pixels.",
        f"- {size_bytes / 1e6:.1f} MB: checkpoint in {recipe['save_dtype']}, segmentation "
        "graphs in float32, policy graphs in int8.",
        "",
        "## Training data",
        *_data(preset, data["num_training_scenes"]),
        "",
        "Recipe `demo` from random weights, then `demo_truncated`, with reasoning truncated at "
        f"random lengths: seed {recipe['seed']}, {report['minutes']:.0f} minutes on "
        f"{environment['machine']} in {recipe['precision']}. Both are in "
        "`coprs_deploy/curriculum/recipes`.",
        "",
        "## Evaluation",
        f"One greedy response on each of {data['num_held_out_scenes']:,} held-out scenes, with the "
        "stored weights:",
        "",
        *markdown_table(METRIC_COLUMNS, _rows(report, preset)),
        "",
        f"On {data['num_no_match_scenes']} no-match scenes the recall is "
        f"{100 * metrics['no_match_recall']:.1f} % and the precision "
        f"{100 * metrics['no_match_precision']:.1f} %. Pearson correlation of prior IoU and mask "
        f"IoU: {metrics['pearson_r']:.3f}. Without reasoning gIoU is "
        f"{short['no_reasoning_giou']:.3f} and P@0.5 {short['no_reasoning_precision_at_50']:.3f} "
        f"on the first {joint['num_eval_examples']} scenes. Thresholds of the recipe: "
        f"{_thresholds(report)}.",
        "",
        "## Limits",
        "- Synthetic scenes only; results on photographs are meaningless.",
        f"- Vocabulary: {', '.join(preset.shapes)}; the colors and textures of the scenes; small, "
        "medium, large; left, right, above, below, and the extremes of position and size.",
        f"- {targets} per request; instructions are noun phrases as in training, {wordings}.",
        f"- Images are resized to {preset.image_size} x {preset.image_size} pixels, which limits "
        "the detail of masks.",
    ]
    return "\n".join(lines) + "\n"


def _read_finished(run: Path) -> dict[str, Any]:
    if not (run / REPORT_FILE).is_file():
        raise ValueError(
            f"{run} has no {REPORT_FILE}: the run is not finished; resume it with `coprs-deploy "
            "train` and the same --out"
        )
    return read_report(run)


def _rows(report: Mapping[str, Any], preset: Preset) -> list[list[str]]:
    rows = []
    for question_type in ("all", *(t for t in preset.question_type_weights if t != "none")):
        prefix = "" if question_type == "all" else f"{question_type}."
        names = ("giou", "precision_at_50", "object_accuracy", "prior_giou")
        values = [report["generated"][prefix + name] for name in names]
        values.append(report["teacher_forced"][f"{prefix}giou"])
        rows.append([question_type.replace("_", " "), *(f"{value:.3f}" for value in values)])
    return rows


def _data(preset: Preset, num_scenes: int) -> list[str]:
    types = ", ".join(t.replace("_", " ") for t in preset.question_type_weights)
    return [
        f"Synthetic scenes of the preset `{preset.name}`, {num_scenes:,} in the second training: "
        f"{preset.num_objects[0]} to {preset.num_objects[1]} objects, {len(preset.shapes)} shapes, "
        f"{len(preset.textures)} textures, {len(preset.backgrounds)} kinds of background. Question "
        f"types: {types}; new questions in each step. `coprs-deploy synth --preset {preset.name} "
        "--out sheet.png` shows examples.",
    ]


def _thresholds(report: Mapping[str, Any]) -> str:
    missed = [
        f"{stage} {name} {threshold['value']:.3f} (required {threshold['required']:g})"
        for stage, result in report["stages"].items()
        for name, threshold in result["thresholds"].items()
        if not threshold["passed"]
    ]
    return f"missed {', '.join(missed)}" if missed else "all passed"


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_BYTES:
        raise ValueError(
            f"the model has {size_bytes:,} bytes; accepted: {MAX_BYTES:,} for checkpoint and bundle"
        )


def _model_size(root: Path) -> int:
    return _size(root / "checkpoint") + _size(root / "bundle")


def _size(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the demo model from the run on the command line."""
    parser = argparse.ArgumentParser(description="Build the demo model from a finished run.")
    parser.add_argument("run", type=Path, nargs="?", help="directory of the run")
    parser.add_argument("--root", type=Path, default=demo.ROOT, help="directory of the model")
    parser.add_argument("--reports", type=Path, default=REPORTS, help="directory of the report")
    parser.add_argument("--only-report", action="store_true", help="copy the report only")
    parser.add_argument("--only-bundle", action="store_true", help="export the bundle again")
    parser.add_argument("--only-card", action="store_true", help="write the model card only")
    options = parser.parse_args(arguments)
    if options.only_bundle:
        export_bundle(options.root)
    if options.only_bundle or options.only_card:
        report = read_report(options.reports)
        write_model_card(report, report["environment"], options.root)
        return 0
    if options.run is None:
        parser.error("RUN is missing; accepted: the directory of a finished run")
    if options.only_report:
        copy_report(options.run, options.reports)
        return 0
    total = build_demo_model(options.run, options.root, options.reports)
    print(f"{options.root}: {total / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
