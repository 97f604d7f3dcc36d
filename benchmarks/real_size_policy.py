"""Policies of real size on a CPU, random weights: conversion to OpenVINO, speed and memory.

Each conversion and each measured case runs in a process of its own, and the report, one for each
kind of machine, is written after each. Cases that are in the report are not repeated, so an
interrupted run continues. Checkpoints and graphs stay in the work folder: some 15 GB for 3B, 30 GB
for 7B.

    python benchmarks/real_size_policy.py --out benchmarks/reports --work-dir DIR --case '3b'
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.artifacts import write_json
from coprs_deploy.bench.worker import WorkerError, call_once
from coprs_deploy.checkpoint import CONFIG_FILE, read_checkpoint
from coprs_deploy.console import format_bytes, format_ms, markdown_table
from coprs_deploy.machine import (
    PACKAGES,
    available_memory_bytes,
    machine_record,
    peak_memory_bytes,
)

NAME = "real-size-policy"
CASE_TIMEOUT_S = 3600.0
PROMPT_TOKENS = 585
"""Prompt of the largest image, 644 x 644 pixels: 529 vision tokens for Qwen2.5-VL."""
NUM_TOKENS = 32
"""Tokens decoded after each prompt."""
SLOW_PREFILL_S = 60.0
"""First prefill from which no further one is measured."""
IMAGE_SIDE = 644


@dataclass(frozen=True)
class Case:
    """One policy in one runtime.

    Attributes:
        size: a name in ``POLICY_SIZES``.
        runtime: ``openvino`` or ``transformers``.
        precision: precision of the graphs, or torch dtype.
        max_pixels: largest image area in pixels; None for the default.
    """

    size: str
    runtime: str
    precision: str
    max_pixels: int | None = None

    def __str__(self) -> str:
        """Return the name of the case."""
        limit = f" max_pixels={self.max_pixels}" if self.max_pixels else ""
        return f"{self.size} {self.runtime} {self.precision}{limit}"


CASES = (
    Case("3b", "openvino", "int4"),
    Case("3b", "openvino", "int8"),
    Case("3b", "openvino", "bf16"),
    Case("3b", "transformers", "bfloat16"),
    Case("3b", "transformers", "float32"),
    *(Case("3b", "openvino", "int8", limit) for limit in (200_704, 100_352)),
    Case("7b", "openvino", "int4"),
    Case("7b", "openvino", "int8"),
    Case("llava-7b", "openvino", "int4"),
)


def run(
    out: Path,
    work_dir: Path,
    cases: Sequence[Case] = CASES,
    progress: Callable[[str], None] = lambda step: None,
    *,
    prepare_only: bool = False,
    case_timeout_s: float = CASE_TIMEOUT_S,
) -> dict[str, Any]:
    """Measure the cases that are missing in the report of this kind of machine, and return it.

    Args:
        out: folder of ``real-size-policy-KIND.json`` and ``.md``.
        work_dir: folder of checkpoints and graphs.
        cases: what is measured.
        progress: called with the name of each step as it starts.
        prepare_only: convert, and measure nothing.
        case_timeout_s: time limit of a conversion or a measured case.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{NAME}-{machine_record().kind}.json"

    def read() -> dict[str, Any]:
        report: dict[str, Any] = {"suite": NAME, "conversions": {}, "cases": {}}
        return report | json.loads(file.read_text(encoding="utf-8")) if file.exists() else report

    def add(section: str, name: str, result: dict[str, Any]) -> None:
        report = read()  # another run may have added a case
        report["machine"] = machine_record(packages=(*PACKAGES, "nncf")).to_json()
        report[section][name] = result | {"commit": report["machine"]["commit"]}
        write_json(file, report)
        file.with_suffix(".md").write_text(render(report), encoding="utf-8")

    for case in cases:
        if str(case) in read()["cases"]:
            continue
        path = work_dir / case.size
        if not (path / "checkpoint" / CONFIG_FILE).exists():
            progress(f"make {case.size}")
            call("make_checkpoint", case_timeout_s, path=str(path), size=case.size)
        graphs = path / case.precision
        if case.runtime == "openvino" and not graphs.exists():
            progress(f"convert {case.size} {case.precision}")
            converted = call("convert", case_timeout_s, path=str(path), precision=case.precision)
            add("conversions", f"{case.size} {case.precision}", converted)
        if prepare_only:
            continue
        progress(f"measure {case}")
        try:
            result = call(
                "measure",
                case_timeout_s,
                path=str(path),
                runtime=case.runtime,
                precision=case.precision,
                max_pixels=case.max_pixels,
            )
        except WorkerError as error:
            result = {"error": str(error)}
        add("cases", str(case), result)
    return read()


def call(function: str, timeout_s: float, /, **settings: Any) -> dict[str, Any]:
    """Run a function of this script in a process of its own.

    Raises:
        WorkerError: it failed.
    """
    result: dict[str, Any] = call_once(f"{__file__}:{function}", timeout_s, **settings)
    return result


def make_checkpoint(path: str, size: str) -> dict[str, Any]:
    """Write a policy with random weights beside a tiny segmentation model."""
    from coprs_deploy.conversion import random_checkpoint

    random_checkpoint(Path(path) / "checkpoint", size, "tiny")
    return {}


def convert(path: str, precision: str) -> dict[str, Any]:
    """Convert the policy to graphs; return seconds, peak memory and size."""
    from coprs_deploy.artifacts import new_directory
    from coprs_deploy.export.policy.graphs import export_policy_graphs
    from coprs_deploy.policy.openvino_policy.graphs import DESCRIPTION_FILE

    started = time.perf_counter()
    policy, graphs = read_checkpoint(Path(path) / "checkpoint").policy_path, Path(path) / precision
    with new_directory(graphs, DESCRIPTION_FILE, False) as written:
        export_policy_graphs(policy, written / "graphs", precision, lambda step: None)
        for file in (written / "graphs").iterdir():
            file.rename(written / file.name)
        (written / "graphs").rmdir()
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_bytes": peak_memory_bytes(),
        "weights_bytes": weights_bytes(policy),
        "bytes": sum(file.stat().st_size for file in graphs.iterdir()),
    }


def weights_bytes(policy: Path) -> int:
    """Return the size of a policy's weight files."""
    return sum(file.stat().st_size for file in policy.glob("*.safetensors"))


def measure(path: str, runtime: str, precision: str, max_pixels: int | None) -> dict[str, Any]:
    """Measure load, prefill, decoding and peak memory of one policy.

    Every prompt has another image, so that nothing is reused.
    """
    from coprs_deploy.policy import PolicyRequest

    checkpoint = read_checkpoint(Path(path) / "checkpoint")
    limits = checkpoint.config.policy_image
    place = (checkpoint.config.prompt, limits.min_pixels, max_pixels or limits.max_pixels)
    policy: Any
    started = time.perf_counter()
    if runtime == "openvino":
        from coprs_deploy.policy.openvino_policy.policy import OpenVinoPolicy

        policy = OpenVinoPolicy(Path(path) / precision, *place)
    else:
        from coprs_deploy.policy.transformers_policy import TransformersPolicy

        needed = weights_bytes(checkpoint.policy_path) * (2 if precision == "float32" else 1)
        if needed > available_memory_bytes():
            raise MemoryError(
                f"the weights take {format_bytes(needed)} and "
                f"{format_bytes(available_memory_bytes())} are available"
            )
        policy = TransformersPolicy(checkpoint.policy_path, *place, dtype=precision)
    load_s = time.perf_counter() - started
    instruction = padded_instruction(policy, place[1:]) if max_pixels is None else "the cup"
    prefill_s: list[float] = []
    while len(prefill_s) < 3 and (not prefill_s or prefill_s[0] < SLOW_PREFILL_S):
        image = noise(len(prefill_s))
        with policy.start(PolicyRequest(image, instruction)) as decoding:
            started = time.perf_counter()
            token, _ = decoding.prefill()
            prefill_s.append(time.perf_counter() - started)
            started = time.perf_counter()
            for _ in range(NUM_TOKENS):
                (token,), _ = decoding.feed([token])
            decode_s = time.perf_counter() - started
    return {
        "load_s": round(load_s, 2),
        "prompt_tokens": len(decoding.prompt_ids),
        "first_prefill_s": round(prefill_s[0], 2),
        "warm_prefill_s": [round(seconds, 2) for seconds in prefill_s[1:]],
        "tokens_per_second": round(NUM_TOKENS / decode_s, 2),
        "peak_bytes": peak_memory_bytes(),
        "private_bytes": private_bytes(),
        "runtime": policy.description,
    }


def padded_instruction(policy: Any, limits: Sequence[int]) -> str:
    """Return an instruction with which the prompt has ``PROMPT_TOKENS`` tokens, or a few more."""
    from coprs_deploy.policy import PolicyRequest

    @cache
    def length(words: int) -> int:
        request = PolicyRequest(noise(0), "the" + " x" * words)
        with policy.start(request) as decoding:
            return len(decoding.prompt_ids)

    words = 1 + max(0, (PROMPT_TOKENS - length(0)) // max(1, length(1) - length(0)))
    while words and length(words) > PROMPT_TOKENS:
        words -= 1
    return "the" + " x" * words


def noise(seed: int) -> Any:
    """Return a (644, 644, 3) uint8 image."""
    shape = (IMAGE_SIDE, IMAGE_SIDE, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def private_bytes() -> int:
    """Return the resident memory of this process without mapped files (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def render(report: dict[str, Any]) -> str:
    """Render the report as Markdown."""
    machine = report["machine"]
    units = ", ".join(machine["vector_units"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Policies of real size on a CPU",
        "",
        "Random weights, so nothing here is about quality. Made by",
        "`python benchmarks/real_size_policy.py --out benchmarks/reports --work-dir DIR`.",
        "",
        f"{machine['processor']}, {machine['cores']} cores ({units}), "
        f"{format_bytes(machine['memory_bytes'])}. {versions}.",
        "",
        "## Speed and memory",
        "",
        f"An image of {IMAGE_SIDE} x {IMAGE_SIDE} pixels; every prompt has another image. "
        f"{NUM_TOKENS} tokens are decoded after each. The warm prefill is the shortest of those "
        "after the first; a dash where the first took longer than a minute. Peak memory includes "
        "pages of mapped files, private memory (at the end) does not.",
        "",
    ]
    header = ("", "prompt", "load", "first prefill", "warm prefill", "decoding", "peak", "private")
    rows = []
    for name, case in report["cases"].items():
        if "error" in case:
            rows.append((name, case["error"], *[""] * 6, case.get("commit", "-")))
            continue
        warm = min(case["warm_prefill_s"], default=None)
        rows.append(
            (
                name,
                f"{case['prompt_tokens']} tokens",
                format_ms(1e3 * case["load_s"]),
                format_ms(1e3 * case["first_prefill_s"]),
                "-" if warm is None else format_ms(1e3 * warm),
                f"{case['tokens_per_second']:.2f} tokens/s",
                format_bytes(case["peak_bytes"]),
                format_bytes(case["private_bytes"]),
                case.get("commit", "-"),
            )
        )
    lines += [*markdown_table((*header, "commit"), rows), "", "## Conversion", ""]
    converted = [
        (
            name,
            format_bytes(row["weights_bytes"]),
            f"{row['seconds']:.0f} s",
            format_bytes(row["peak_bytes"]),
            format_bytes(row["bytes"]),
            row.get("commit", "-"),
        )
        for name, row in report["conversions"].items()
    ]
    columns = ("", "weights", "time", "peak memory, mapped files included", "graphs", "commit")
    lines += [*markdown_table(columns, converted), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure; exit code 1 when a case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the report"
    )
    parser.add_argument(
        "--work-dir", type=Path, required=True, metavar="DIR", help="folder of policies and graphs"
    )
    parser.add_argument(
        "--case", default="", metavar="REGEX", help="measure only the cases whose name matches"
    )
    parser.add_argument("--prepare-only", action="store_true", help="stop before measuring")
    parser.add_argument(
        "--case-timeout",
        type=float,
        default=CASE_TIMEOUT_S,
        metavar="SECONDS",
        help=f"time limit of a conversion or a case; default {CASE_TIMEOUT_S:.0f}",
    )
    given = parser.parse_args(arguments)
    chosen = [case for case in CASES if re.search(given.case, str(case))]
    log = sys.stderr
    report = run(
        given.out,
        given.work_dir,
        chosen,
        lambda step: print(step, file=log, flush=True),
        prepare_only=given.prepare_only,
        case_timeout_s=given.case_timeout,
    )
    failed = [name for name in map(str, chosen) if "error" in report["cases"].get(name, {})]
    for name in failed:
        print(f"{name}: {report['cases'][name]['error']}", file=log)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
