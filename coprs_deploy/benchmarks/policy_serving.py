"""What the vLLM policy costs and gains, on the shipped model: ratios within one run.

    python -m coprs_deploy.benchmarks.policy_serving --out docs/reports --part capture

Each part adds its figures to ``policy-serving.json`` in the folder and writes
``policy-serving.md`` anew. Parts that compare keep both sides alive and let them take turns, so
that what the machine does meanwhile meets both. It runs on a CPU, where the model is so small that
vLLM's own bookkeeping dominates: the shares say little about a large policy on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import write_json
from coprs_deploy.benchmarks.machine import describe_machine
from coprs_deploy.benchmarks.serving.answers import measure_answers
from coprs_deploy.benchmarks.serving.capture import measure_capture, measure_capture_work
from coprs_deploy.benchmarks.serving.load import measure_load
from coprs_deploy.benchmarks.serving.page import to_markdown
from coprs_deploy.benchmarks.serving.second_questions import measure_questions

NAME = "policy-serving"

PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "capture": measure_capture,
    "capture-work": measure_capture_work,
    "answers": measure_answers,
    "questions": measure_questions,
    "load": measure_load,
}


def run(out: Path, parts: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure some parts and add them to the report in a folder.

    Args:
        out: the folder; ``policy-serving.json`` there keeps the parts that are not measured now.
        parts: names in ``PARTS``.
        rounds: how often each comparison is repeated.

    Returns:
        The whole report.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{NAME}.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"suite": NAME}
    for part in parts:
        figures = PARTS[part](rounds)
        report[part] = {"machine": describe_machine(), **figures}
    write_json(file, report)
    (out / f"{NAME}.md").write_text(to_markdown(report, tuple(PARTS)), encoding="utf-8")
    return report


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.out, arguments.part or list(PARTS), arguments.rounds)))


_Raw = argparse.RawDescriptionHelpFormatter


if __name__ == "__main__":
    main()
