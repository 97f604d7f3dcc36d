"""Write the tables of README and docs from the committed reports and from computed sizes.

    python benchmarks/update_tables.py           write them
    python benchmarks/update_tables.py --check   exit code 1 if one is out of date

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` in README.md or a page of
docs/. Of the reports of a tag one is shown: of a machine with a GPU, else of the widest vector
units, and of those the newest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coprs_deploy.bench.hardware import (
    GPUS,
    JETSONS,
    encoder_bytes,
    gpu_graph_bytes,
    named_sizes,
)
from coprs_deploy.bench.hardware_tables import (
    ENCODERS,
    cpu_memory_table,
    cpu_speed_table,
    device_table,
    gpu_memory_table,
)
from coprs_deploy.bench.report import CaseResult, GroupResult, Report, read_report
from coprs_deploy.console import format_bytes, format_ms, markdown_table
from coprs_deploy.export.precision import BF16, FP32
from coprs_deploy.machine import KINDS
from coprs_deploy.model_config import SAM_SIZES
from coprs_deploy.specs import IMAGE_ENCODER
from coprs_deploy.training.planning.estimate import BFLOAT16_BYTES

REPORTS = Path("benchmarks/reports")
REAL_SIZES = "real-size-policy"
IMAGE_ENCODERS = "image-encoders"
ENGINES = Path("engines/records/full-size-engines.json")

MODEL_TAG, POLICY_TAG, PRECISION_TAG = "demo", "openvino-policy", "precision"
ENCODER_TAGS = ("full-size", "vit-b")
"""Tags of reports on encoders of real size: on a CPU, and on a GPU."""

RUNTIME_NAMES = {
    "segment-anything ": "segment-anything, ",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "PyTorch",
}


def latest(root: Path, tag: str) -> Report | None:
    """Return the report of a tag that is shown; None where there is none."""
    reports = [read_report(path) for path in sorted((root / REPORTS).glob(f"{tag}-*.json"))]
    return max((report for report in reports if report.tag == tag), key=_rank, default=None)


def _rank(report: Report) -> tuple[bool, int, str]:
    return report.machine.gpu is not None, _width(report.machine.kind), report.date


def _width(kind: str) -> int:
    """Rank a kind of machine by its vector units."""
    units = [unit for _, unit in reversed(KINDS)]
    unit = kind.rpartition("-")[2]
    return units.index(unit) if unit in units else -1


def speed_table(root: Path, folder: Path) -> list[str]:
    """Lay out requests, start and image encoders."""
    lines: list[str] = []
    if (report := latest(root, MODEL_TAG)) is not None:
        lines += [_title(root, folder, report, "demo model, requests and start"), ""]
        rows = [_request_row(case) for case in _requests(report)]
        lines += markdown_table(("", "median", "95 % CI", "p90", "memory", "gIoU"), rows)
    for tag in ENCODER_TAGS:
        if (report := latest(root, tag)) is not None:
            for group in _encoder_groups(report):
                lines += ["", *_encoder_table(root, folder, report, group)]
    return lines


def readme_table(root: Path, folder: Path) -> list[str]:
    """Lay out the fastest case of this package beside the fastest of its peer, in few rows."""
    rows: list[tuple[str, ...]] = []
    for report in filter(None, (latest(root, tag) for tag in (MODEL_TAG, POLICY_TAG))):
        cases = [case for case in _requests(report) if case.labels["precision"] == FP32]
        graphs = [case for case in cases if "new image" in case.name]
        modules = [case for case in cases if "PyTorch" in case.name]
        rows += _compared(f"demo model, whole request, {_cores(report)}", graphs, modules)
    for report in filter(None, (latest(root, tag) for tag in ENCODER_TAGS)):
        for group in _encoder_groups(report):
            cases = [case for case in group.cases if "aspect_ratio" not in case.labels]
            ours = [case for case in cases if case.name.startswith("coprs-deploy")]
            peers = [case for case in cases if case.name.startswith("segment-anything")]
            what = f"{_size(group)} image encoder, {_cores(report)}"
            for precision in (FP32, BF16):  # what most products are computed in
                mine, theirs = (
                    [case for case in side if _matmul(case) == precision] for side in (ours, peers)
                )
                rows += _compared(what, mine, theirs)
    heads = ("", "coprs-deploy", "median", "compared with", "median")
    return markdown_table(heads, rows) if rows else []


def _compared(
    what: str, ours: Sequence[CaseResult], peers: Sequence[CaseResult]
) -> list[tuple[str, ...]]:
    if not any(case.latency for case in ours) or not any(case.latency for case in peers):
        return []
    best, peer = min(ours, key=_median), min(peers, key=_median)
    times = [format_ms(_median(case)) for case in (best, peer)]
    return [(what, _described(best), times[0], _described(peer), times[1])]


def _described(case: CaseResult) -> str:
    words = case.labels["runtime"]
    for name, written in RUNTIME_NAMES.items():
        words = words.replace(name, written)
    words += f" {case.labels['precision']}"
    if rest := case.labels.get("matmul_precision"):
        words += f", the rest in {rest}"
    if case.labels.get("policy") == "openvino":
        words += ", the policy as OpenVINO graphs"
    return words


def _matmul(case: CaseResult) -> str:
    return case.labels.get("matmul_precision") or case.labels["precision"]


def _cores(report: Report) -> str:
    machine = report.machine
    if machine.gpu:
        return machine.gpu.partition(" (")[0]
    unit = machine.kind.rpartition("-")[2].upper().replace("AVX512", "AVX-512")
    return f"{machine.cores} CPU cores with {unit}"


def precision_table(root: Path, folder: Path) -> list[str]:
    """Lay out the accuracy of half precision on held-out scenes."""
    report = latest(root, PRECISION_TAG)
    if report is None:
        return []
    rows: list[tuple[str, ...]] = []
    inputs = 0
    for case in (case for group in report.groups for case in group.cases):
        accuracy = case.accuracy
        if accuracy is None:
            rows.append((case.labels.get("precision", case.name), case.error, "", "", ""))
            continue
        inputs = accuracy.inputs
        values = (
            (accuracy.mask_iou_mean, ".5f"),
            (accuracy.mask_iou_min, ".4f"),
            (accuracy.giou, ".4f"),
            (accuracy.precision_at_50, ".3f"),
        )
        cells = ("" if value is None else format(value, form) for value, form in values)
        rows.append((case.labels["precision"], *cells))
    heads = ("", "mean mask IoU with float32", "smallest", "gIoU", "P@0.5")
    link = _link(root, folder, report)
    return [f"{inputs} held-out scenes ([report]({link})):", "", *markdown_table(heads, rows)]


def _requests(report: Report) -> list[CaseResult]:
    groups = [group for group in report.groups if group.suite in ("answer", "start")]
    cases = [case for group in groups for case in group.cases]
    return [case for case in cases if case.latency is not None and case.labels.get("runtime")]


def _request_row(case: CaseResult) -> tuple[str, ...]:
    assert case.latency is not None
    giou = case.accuracy.giou if case.accuracy is not None else None
    return (
        case.name,
        format_ms(case.latency.p50),
        " to ".join(map(format_ms, case.latency.ci)),
        format_ms(case.latency.p90),
        format_bytes(case.peak_bytes) if case.peak_bytes else "",
        "" if giou is None else f"{giou:.3f}",
    )


def _encoder_groups(report: Report) -> list[GroupResult]:
    return [g for g in report.groups if g.suite == "engines" and IMAGE_ENCODER in g.name]


def _encoder_table(root: Path, folder: Path, report: Report, group: GroupResult) -> list[str]:
    """Lay out the cases of an image encoder, the fastest first."""
    rows = [(case.name, *_encoder_cells(case)) for case in sorted(group.cases, key=_median)]
    on_gpu = group.cases[0].labels.get("device") == "cuda"
    memory = "GPU memory" if on_gpu else "memory"
    heads = ("", "median", "95 % CI", "over PyTorch", memory, "embedding cosine")
    title = f"{_size(group)} image encoder, random weights"
    return [_title(root, folder, report, title), "", *markdown_table(heads, rows)]


def _encoder_cells(case: CaseResult) -> tuple[str, ...]:
    if case.latency is None:
        return (case.error, "", "", "", "")
    cosine = case.accuracy.embedding_cosine if case.accuracy is not None else None
    on_gpu = case.labels.get("device") == "cuda"
    memory = case.memory.device if on_gpu else case.memory.host
    return (
        format_ms(case.latency.p50),
        " to ".join(map(format_ms, case.latency.ci)),
        "1" if case.ratio is None else f"{case.ratio.value:.2f}",
        format_bytes(memory) if memory else "",
        "" if cosine is None else f"{cosine:.6f}",
    )


def _median(case: CaseResult) -> float:
    return case.latency.p50 if case.latency is not None else float("inf")


def _size(group: GroupResult) -> str:
    """Write ``vit_b`` as people do."""
    return group.name.partition(":")[0].upper().replace("VIT_", "ViT-")


def _machine(report: Report) -> str:
    machine = report.machine
    unit = machine.kind.rpartition("-")[2]
    return machine.gpu or f"{machine.processor}, {machine.cores} cores, {unit}"


def _link(root: Path, folder: Path, report: Report) -> str:
    return os.path.relpath(root / REPORTS / f"{report.stem}.md", folder)


def _title(root: Path, folder: Path, report: Report, what: str) -> str:
    link = _link(root, folder, report)
    return f"[{what[0].upper()}{what[1:]}]({link}), {_machine(report)}, {report.date}:"


def cpu_memory(root: Path, folder: Path) -> list[str]:
    """Lay out the memory of the policy's graphs on a CPU, computed and measured."""
    return cpu_memory_table({_kind(report): report["cases"] for report in _real_sizes(root)})


def cpu_speed(root: Path, folder: Path) -> list[str]:
    """Lay out bounds of the decoding speed on a CPU, and what was measured."""
    reports = _real_sizes(root)
    lines = cpu_speed_table({_kind(report): report["cases"] for report in reports})
    places = []
    for report in reports:
        file = root / REPORTS / f"{REAL_SIZES}-{report['machine']['kind']}.md"
        link = os.path.relpath(file, folder)
        places.append(f"{report['machine']['processor']}, {_kind(report)} ([report]({link}))")
    return (
        [*lines, "", f"Measured with random weights on: {'; '.join(places)}."] if places else lines
    )


def _real_sizes(root: Path) -> list[dict[str, Any]]:
    """Read the reports on policies of real size, widest vector units first."""
    files = sorted((root / REPORTS).glob(f"{REAL_SIZES}-*.json"))
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(reports, key=lambda report: -_width(report["machine"]["kind"]))


def _kind(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    return f"{machine['cores']} cores, {machine['kind'].rpartition('-')[2]}"


def encoder_memory(root: Path, folder: Path) -> list[str]:
    """Lay out what an image encoder needs on a GPU and on a CPU."""
    records = json.loads((root / ENGINES).read_text(encoding="utf-8"))["rows"]
    engines = {(row["sam"], row["precision"]): row["engine_bytes"] for row in records}
    rows = []
    for sam, name in ENCODERS.items():
        sizes = named_sizes("3b", sam)
        computed = (
            BFLOAT16_BYTES * sizes.image_encoder,
            encoder_bytes(SAM_SIZES[sam], BFLOAT16_BYTES),
            gpu_graph_bytes(sizes, sam),
        )
        measured = (
            format_bytes(engines[sam, "fp16"]),
            _measured_encoder(root, "vit-b", name, "onnxruntime", "fp16"),
            _measured_encoder(root, "full-size", name, "openvino", "fp32"),
            _measured_encoder(root, "full-size", name, "openvino", "int8"),
        )
        rows.append((name, *map(format_bytes, computed), *measured))
    heads = (
        *("fp16 weights (c)", "fp16 activations (c)", "all graphs on a GPU (c)"),
        *("fp16 engine (m)", "GPU, ONNX Runtime fp16 (m)"),
        *("CPU, OpenVINO fp32 (m)", "CPU, OpenVINO int8 (m)"),
    )
    return markdown_table(("image encoder", *heads), rows)


def _measured_encoder(root: Path, tag: str, size: str, runtime: str, precision: str) -> str:
    """Format the memory that the graph of an encoder took in a report; a dash without one."""
    report = latest(root, tag)
    groups = _encoder_groups(report) if report is not None else []
    for case in (case for group in groups if _size(group) == size for case in group.cases):
        found = (case.labels["runtime"], case.labels["precision"], _matmul(case))
        if case.name.startswith("coprs-deploy") and found == (runtime, precision, precision):
            return format_bytes(case.memory.device or case.memory.host or 0)
    return "-"


def encoder_times(root: Path, folder: Path) -> list[str]:
    """Lay out time and memory of every image encoder at full size; nothing without a report."""
    file = root / REPORTS / f"{IMAGE_ENCODERS}.json"
    if not file.is_file():
        return []
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = report["rows"]
    graphs = sorted({(row["runtime"], row["precision"]) for row in rows})
    by_encoder: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in rows:
        by_encoder.setdefault(row["encoder"], {})[row["runtime"], row["precision"]] = row
    cells = [
        (
            SAM_SIZES[encoder].encoder_name,
            *(_time_and_memory(found.get(graph)) for graph in graphs),
        )
        for encoder, found in by_encoder.items()
    ]
    heads = (f"{RUNTIME_NAMES[runtime]} {precision}" for runtime, precision in graphs)
    machine, link = report["machine"], os.path.relpath(file.with_suffix(".md"), folder)
    title = f"Median time of one image and peak memory, random weights, {machine['processor']}"
    return [
        f"{title}, {machine['cores']} cores ([report]({link})):",
        "",
        *markdown_table(("image encoder", *heads), cells),
    ]


def _time_and_memory(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{format_ms(row['median_ms'])}, {format_bytes(row['peak_bytes'])}"


TABLES: Mapping[str, Callable[[Path, Path], list[str]]] = {
    "speed": speed_table,
    "readme-speed": readme_table,
    "half-precision": precision_table,
    "gpu-memory": lambda *_: gpu_memory_table(),
    "gpu-speed": lambda *_: device_table(GPUS),
    "jetson-speed": lambda *_: device_table(JETSONS),
    "cpu-memory": cpu_memory,
    "cpu-speed": cpu_speed,
    "encoder-memory": encoder_memory,
    "encoder-times": encoder_times,
}
"""What writes the table of a name, given the root and the folder of the file."""


def stale_files(root: Path) -> dict[Path, str]:
    """Return the new text of each file with a table that differs from the reports."""
    stale = {}
    for file in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        old = new = file.read_text(encoding="utf-8")
        for name, render in TABLES.items():
            if f"<!-- {name}:begin" in new:
                new = replace_table(new, name, render(root, file.parent))
        if new != old:
            stale[file] = new
    return stale


def replace_table(text: str, name: str, lines: Sequence[str]) -> str:
    """Put lines between the markers of a table.

    Raises:
        ValueError: a marker is missing.
    """
    markers = re.compile(rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if markers.search(text) is None:
        raise ValueError(f"the markers <!-- {name}:begin --> and <!-- {name}:end --> are missing")
    body = "\n".join(lines) + "\n" if lines else ""
    return markers.sub(lambda found: f"{found[1]}\n{body}\n{found[2]}", text)


def main(arguments: Sequence[str]) -> int:
    """Write the tables, or list those that are out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(arguments)
    root = Path(__file__).parents[1]
    stale = stale_files(root)
    for file, text in stale.items():
        print(f"{file.relative_to(root)} {'is out of date' if given.check else 'is written'}")
        if not given.check:
            file.write_text(text, encoding="utf-8")
    return 1 if stale and given.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
