"""What an evaluation leaves behind: a page of figures, the plot, and every answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from coprs_deploy.evaluation.evaluator import Scored
from coprs_deploy.evaluation.metrics import summarize
from coprs_deploy.evaluation.plots import plot_correlation

PLOT_FILE = "prior_against_mask.png"


def write_evaluation(folder: Path, title: str, scored: Sequence[Scored]) -> None:
    """Write ``report.md``, ``answers.jsonl`` and ``prior_against_mask.png``.

    Args:
        folder: made if it is not there; files of an earlier evaluation are replaced.
        title: what was asked.
        scored: the answers.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = [answer.score for answer in scored if answer.score.num_targets]
    lines = [f"# {title}", "", *figure_table(summarize([answer.score for answer in scored]))]
    if present:
        plot_correlation(
            folder / PLOT_FILE,
            [score.prior.iou for score in present],
            [score.mask.iou for score in present],
        )
        lines += ["", f"![IoU of the prior against IoU of the mask]({PLOT_FILE})"]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for answer in scored:
            file.write(json.dumps(_line(answer), ensure_ascii=False) + "\n")


def figure_table(figures: dict[str, float]) -> list[str]:
    """Lay figures out as a Markdown table, figures by kind as one row a kind."""
    kinds = sorted({name.partition(".")[0] for name in figures if "." in name})
    columns = [name for name in figures if "." not in name]
    lines = ["| figure | value |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {figures[name]:.4f} |" for name in columns]
    if kinds:
        parts = [name for name in columns if f"{kinds[0]}.{name}" in figures]
        heads = " | ".join(part.replace("_", " ") for part in parts)
        lines += ["", f"| kind of question | {heads} |", "|---" * (len(parts) + 1) + "|"]
        for kind in kinds:
            values = " | ".join(f"{figures[f'{kind}.{part}']:.4f}" for part in parts)
            lines.append(f"| {kind.replace('_', ' ')} | {values} |")
    return lines


def _line(answer: Scored) -> dict[str, object]:
    score = answer.score
    return {
        "id": score.id,
        "kind": score.kind,
        "instruction": answer.asked.instruction,
        "response": answer.given.response,
        "num_targets": score.num_targets,
        "num_found": score.num_found,
        "mask_iou": round(score.mask.iou, 6),
        "prior_iou": round(score.prior.iou, 6),
    }
