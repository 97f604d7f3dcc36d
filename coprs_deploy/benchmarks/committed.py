"""Tables in README and docs, written from the committed reports.

    python -m coprs_deploy.benchmarks.committed           writes them
    python -m coprs_deploy.benchmarks.committed --check   exit code 1 where one is out of date

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. Of the reports of a theme
one counts: of a machine with a GPU, else of the widest vector units, and of those the newest.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from coprs_deploy.benchmarks.cells import milliseconds, number_of_bytes
from coprs_deploy.benchmarks.machine import QUESTION_TYPES
from coprs_deploy.benchmarks.report import GroupResult, Report, Row, read_report
from coprs_deploy.benchmarks.text import markdown_table
from coprs_deploy.specs import IMAGE_ENCODER

REPORTS = Path("docs/reports/benchmarks")

ENCODER_THEMES = ("full-size", "vit-b")
"""Themes of reports on encoders of real size: on a CPU, and on a GPU."""


def shown(root: Path, theme: str) -> Report | None:
    """Give the report of a theme that counts; None where there is none."""
    reports = [read_report(path) for path in sorted((root / REPORTS).glob(f"{theme}-*.json"))]
    chosen = [report for report in reports if report.theme == theme]
    return max(chosen, key=_rank, default=None)


def _rank(report: Report) -> tuple[bool, int, str]:
    """Order reports: the GPU's last, then by vector units, then by date."""
    units = [kind for _, kind in reversed(QUESTION_TYPES)]
    unit = report.machine.kind.rpartition("-")[2]
    width = units.index(unit) if unit in units else -1
    return report.machine.gpu is not None, width, report.date


def speed_table(root: Path) -> list[str]:
    """Lay out answers, start and image encoders for the README."""
    lines: list[str] = []
    shipped = shown(root, "shipped")
    if shipped is not None:
        rows = [
            (row.name, *_speed(row))
            for group in shipped.groups
            if group.suite in ("answer", "start")
            for row in group.rows
            if row.latency is not None and row.labels.get("runtime")
        ]
        lines += [_title(shipped, "the shipped model, whole answers and start"), ""]
        lines += markdown_table(("", "median", "p90", "memory", "mask IoU with the truth"), rows)
    for theme in ENCODER_THEMES:
        full = shown(root, theme)
        if full is not None:
            lines += _encoder_tables(full)
    return lines


def _encoder_tables(full: Report) -> list[str]:
    """Lay out the image encoders of a report, the fastest row first."""
    lines: list[str] = []
    for group in full.groups:
        if group.suite != "engines" or IMAGE_ENCODER not in group.name:
            continue
        lines += ["", _title(full, f"{_size(group)} image encoder, random weights"), ""]
        rows = [
            (row.name, *_encoder(row))
            for row in sorted(group.rows, key=lambda r: r.latency.p50 if r.latency else 1e12)
        ]
        on_gpu = group.rows[0].labels.get("device") == "cuda"
        memory = "GPU memory" if on_gpu else "memory"
        lines += markdown_table(("", "median", "over PyTorch", memory, "embedding cosine"), rows)
    return lines


def _title(report: Report, what: str) -> str:
    link = f"{REPORTS}/{report.stem}.md"
    machine = report.machine
    unit = machine.kind.rpartition("-")[2]
    where = machine.gpu or f"{machine.processor}, {machine.cores} cores, {unit}"
    return f"[{what[0].upper()}{what[1:]}]({link}), {where}, {report.date}:"


def _size(group: GroupResult) -> str:
    """Write ``vit_b`` as people do."""
    return group.name.partition(":")[0].upper().replace("VIT_", "ViT-")


def _speed(row: Row) -> tuple[str, ...]:
    assert row.latency is not None
    truth = row.accuracy.truth_iou if row.accuracy is not None else None
    peak = row.figures.get("peak_bytes", row.memory.host)
    return (
        milliseconds(row.latency.p50),
        milliseconds(row.latency.p90),
        number_of_bytes(peak) if peak else "",
        "" if truth is None else f"{truth:.3f}",
    )


def _encoder(row: Row) -> tuple[str, ...]:
    if row.latency is None:
        return (row.reason, "", "", "")
    ratio = "1" if row.ratio is None else f"{row.ratio.value:.2f}"
    cosine = row.accuracy.embedding_cosine if row.accuracy is not None else None
    on_gpu = row.labels.get("device") == "cuda"
    memory = row.memory.device if on_gpu else row.memory.host
    return (
        milliseconds(row.latency.p50),
        ratio,
        number_of_bytes(memory) if memory else "",
        "" if cosine is None else f"{cosine:.6f}",
    )


def precision_table(root: Path) -> list[str]:
    """Lay out what half precision costs on held-out scenes."""
    report = shown(root, "precision")
    if report is None:
        return []
    rows: list[tuple[str, ...]] = []
    inputs = 0
    for group in report.groups:
        for row in group.rows:
            accuracy = row.accuracy
            if accuracy is None:
                rows.append((row.labels.get("precision", row.name), row.reason, "", "", ""))
                continue
            inputs = accuracy.inputs
            values = (
                (accuracy.mask_iou, ".5f"),
                (accuracy.mask_iou_worst, ".4f"),
                (accuracy.truth_iou, ".4f"),
                (accuracy.precision_at_half, ".3f"),
            )
            cells = ("" if value is None else format(value, form) for value, form in values)
            rows.append((row.labels["precision"], *cells))
    heads = ("", "mask IoU with float32, mean", "worst", "mask IoU with the truth", "P@0.5")
    link = f"reports/benchmarks/{report.stem}.md"
    return [f"{inputs} held-out scenes ([report]({link})):", "", *markdown_table(heads, rows)]


TABLES: Sequence[tuple[str, str, Callable[[Path], list[str]]]] = (
    ("README.md", "speed", speed_table),
    ("docs/tensorrt.md", "half-precision", precision_table),
)
"""File, name of the table in it, and what writes it."""


def stale_files(root: Path) -> Mapping[str, str]:
    """Give the files whose tables are not those of the reports, with their new text."""
    texts: dict[str, str] = {}
    for file, name, render in TABLES:
        text = texts.get(file) or (root / file).read_text(encoding="utf-8")
        texts[file] = replace_table(text, name, render(root))
    return {
        file: text
        for file, text in texts.items()
        if text != (root / file).read_text(encoding="utf-8")
    }


def replace_table(text: str, name: str, lines: Sequence[str]) -> str:
    """Put lines between the marks of a table.

    Raises:
        ValueError: the marks are not there.
    """
    marks = re.compile(rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if marks.search(text) is None:
        raise ValueError(f"there is no <!-- {name}:begin --> ... <!-- {name}:end --> to write into")
    body = "\n".join(lines) + "\n" if lines else ""
    return marks.sub(lambda found: f"{found[1]}\n{body}\n{found[2]}", text)


def main(arguments: Sequence[str]) -> int:
    """Write the tables, or only say which are out of date."""
    root = Path.cwd()
    stale = stale_files(root)
    for file, text in stale.items():
        print(f"{file} {'is out of date' if '--check' in arguments else 'is written'}")
        if "--check" not in arguments:
            (root / file).write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
