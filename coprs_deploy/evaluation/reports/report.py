"""Report of an evaluation: one HTML page that stands alone, Markdown, JSON and COCO results.

    report.html, report.md, report.json
    plots/                     correlations, for light and dark pages
    DATASET/gallery/           panels of the examples that are shown
    DATASET/*.coco.json        predictions, and what each of their images is
    reasoning_scores.jsonl     answers of the judge of the reasoning

The report depends on rows, examples and answers alone: it is the same however often the evaluation
was interrupted. Only the foot of the page differs, which has the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import write_json, write_text
from coprs_deploy.console import markdown_table
from coprs_deploy.evaluation.evaluator import Segment
from coprs_deploy.evaluation.judge import JudgeReport, JudgeSettings
from coprs_deploy.evaluation.reports.coco_results import write_coco_results
from coprs_deploy.evaluation.reports.comparison_tables import comparison_json, comparison_lines
from coprs_deploy.evaluation.reports.galleries import (
    FOLDER,
    GALLERIES,
    GalleryExample,
    choose_examples,
    draw_gallery,
)
from coprs_deploy.evaluation.reports.plots import Correlation, prior_against_mask
from coprs_deploy.evaluation.reports.reasoning_quality import (
    ReasoningQuality,
    judge_lines,
    quality_rows,
    rate_datasets,
)
from coprs_deploy.evaluation.reports.report_parts import (
    STYLE,
    Part,
    dataset_lines,
    gallery_part,
    head_lines,
    plot_part,
)
from coprs_deploy.evaluation.reports.training_correlation import read_training_correlation
from coprs_deploy.evaluation.rows import EvaluationRow
from coprs_deploy.evaluation.runner import EvaluationTask
from coprs_deploy.evaluation.summary import EvaluationSummary, row_iou
from coprs_deploy.page import markdown_html, render_page

PAGE_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "report.md", "report.json"
PLOTS = "plots"


@dataclass(frozen=True, eq=False)
class EvaluatedDataset:
    """A finished data set.

    Attributes:
        task: name, examples and protocol.
        description: source and number of the examples.
        folder: folder with its rows.
        rows: all rows, in the order of the source.
        summary: their metrics.
    """

    task: EvaluationTask
    description: str
    folder: Path
    rows: Sequence[EvaluationRow]
    summary: EvaluationSummary


@dataclass(frozen=True, eq=False)
class ReportOptions:
    """What a report has beside the rows.

    Attributes:
        segment: opens the model, for priors of the gallery that are missing; None draws none.
        judge: judge of the reasoning; None for none.
        training_run: run directory or log of the training, for its correlation; None for none.
        head: name and value of what was evaluated, for the head of the report.
        foot: text of what differs from run to run, such as the speed, for the page alone.
        on_step: called with the name of each step.
        on_progress: called with the progress of a step.
    """

    segment: Callable[[], Segment] | None = None
    judge: JudgeSettings | None = None
    training_run: Path | None = None
    head: Sequence[tuple[str, str]] = ()
    foot: str = ""
    on_step: Callable[[str], None] = field(default=lambda step: None)
    on_progress: Callable[[str], None] = field(default=lambda text: None)


def write_report(
    directory: Path, title: str, datasets: Sequence[EvaluatedDataset], options: ReportOptions
) -> JudgeReport | None:
    """Write the report of finished data sets; return the outcome of the judge, if there is one.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ArtifactError: the training log has no values for a correlation.
    """
    training = read_training_correlation(options.training_run) if options.training_run else None
    rated, outcome = dict[str, ReasoningQuality](), None
    if options.judge is not None:
        options.on_step("rate the reasoning")
        pairs = [(dataset.task, dataset.rows) for dataset in datasets]
        rated, outcome = rate_datasets(directory, pairs, options.judge, options.on_progress)
    options.on_step("write the report")
    summaries = {dataset.task.name: dataset.summary for dataset in datasets}
    parts = [
        Part.of([f"# {title}", "", *head_lines(options.head)]),
        Part.of(["## Beside published results", "", *comparison_lines(summaries)]),
    ]
    written: dict[str, Any] = {}
    for dataset in datasets:
        quality = rated.get(dataset.task.name)
        galleries = _draw_galleries(dataset, options)
        parts += _dataset_parts(directory, dataset, quality, galleries)
        write_coco_results(dataset.folder, dataset.rows)
        written[dataset.task.name] = _dataset_json(dataset, quality, galleries)
    parts += [_training_part(directory, training), Part.of(judge_lines(outcome))]
    report = {
        "title": title,
        "evaluated": dict(options.head),
        "datasets": written,
        "published": comparison_json(summaries),
        "judge": outcome.to_json() if outcome else None,
        "training_pearson_r": training.pearson_r if training else None,
    }
    _write(directory, title, parts, report, options.foot)
    return outcome


def _write(
    directory: Path, title: str, parts: Sequence[Part], report: Mapping[str, Any], foot: str
) -> None:
    tail = markdown_html([foot]) if foot else ""
    page = render_page(title, "".join(part.html for part in parts), tail=tail, style=STYLE)
    write_text(directory / PAGE_FILE, page)
    write_text(directory / MARKDOWN_FILE, "\n\n".join("\n".join(p.markdown) for p in parts) + "\n")
    write_json(directory / JSON_FILE, report)


def _draw_galleries(
    dataset: EvaluatedDataset, options: ReportOptions
) -> dict[str, list[GalleryExample]]:
    """Draw the examples of each gallery, and remove the panels of an earlier evaluation."""
    task, folder = dataset.task, dataset.folder / FOLDER
    galleries = {}
    for name, rows in choose_examples(dataset.rows, task.protocol).items():
        options.on_progress(f"{task.name}: {GALLERIES[name].lower()}")
        galleries[name] = draw_gallery(folder, rows, task, options.segment)
    used = {path for shown in galleries.values() for each in shown for path in each.panels.values()}
    for path in set(folder.glob("*.webp")) - used:
        path.unlink()
    return galleries


def _dataset_parts(
    directory: Path,
    dataset: EvaluatedDataset,
    quality: ReasoningQuality | None,
    galleries: Mapping[str, Sequence[GalleryExample]],
) -> list[Part]:
    parts = [Part.of(dataset_lines(dataset.description, dataset.summary, dataset.rows))]
    plots = directory / PLOTS / dataset.folder.name
    counted = [row for row in dataset.rows if row.num_targets and row.error is None]
    if counted:
        protocol = dataset.task.protocol
        ious = [[row_iou(row, protocol, part) for row in counted] for part in ("prior", "mask")]
        text = "Prior against mask: IoU of each example, with least-squares line and band"
        parts.append(
            plot_part(directory, plots / "prior_against_mask", [prior_against_mask(*ious)], text)
        )
    if quality is not None:
        rows = quality_rows(quality.to_json())
        parts.append(Part.of(markdown_table(("reasoning", ""), rows)))
        text = "Quality of the reasoning against the IoU of prior and mask"
        parts.append(plot_part(directory, plots / "reasoning", quality.correlations(), text))
    return parts + [
        gallery_part(directory, GALLERIES[name], shown) for name, shown in galleries.items()
    ]


def _training_part(directory: Path, training: Correlation | None) -> Part:
    heading = Part.of(["## Correlation during training", ""])
    if training is None:
        return Part.of(
            [
                *heading.markdown,
                "No training run was given, so that its correlation (paper, fig. 3) is left out: "
                "`--training-run` names its directory.",
            ]
        )
    text = "Prior against mask: 1 - loss of each logged batch, with least-squares line and band"
    plot = plot_part(directory, directory / PLOTS / "training", [training], text)
    return Part(heading.markdown + plot.markdown, heading.html + plot.html)


def _dataset_json(
    dataset: EvaluatedDataset,
    quality: ReasoningQuality | None,
    galleries: Mapping[str, Sequence[GalleryExample]],
) -> dict[str, Any]:
    return {
        "description": dataset.description,
        **dataset.summary.to_json(),
        "reasoning": quality.to_json() if quality else None,
        "galleries": {name: [e.row.index for e in shown] for name, shown in galleries.items()},
    }
