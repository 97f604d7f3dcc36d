"""Check bundles of engines on the GPU of this machine, and record the result.

Each bundle is compared with the checkpoint that it was exported from, graph by graph and end to end
(as ``coprs-deploy verify`` does, which also marks its engines as verified on this GPU). The latency
of each graph is measured if all comparisons pass. One JSON record per bundle, GPU and day is
written. A bundle that fails is recorded with its error, and the others are still checked.

    python engines/check_engines.py BUNDLE... --against CHECKPOINT

Exit code 0 if all bundles pass, 1 if one fails, 2 for wrong use and without a GPU.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import write_json
from coprs_deploy.bundle import Bundle, open_bundle
from coprs_deploy.console import equivalence_table, table
from coprs_deploy.engines import Runner, RunnerOptions, open_bundle_graph
from coprs_deploy.engines.autotune import random_inputs
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.errors import CoPRSError
from coprs_deploy.export import verify_bundle
from coprs_deploy.machine import describe_processor, installed_versions
from coprs_deploy.version import __version__

RECORDS = Path(__file__).parent / "records"
WARM_UP_RUNS = 3


def main(arguments: Sequence[str]) -> int:
    """Check each bundle; see the module."""
    options = _parse(arguments)
    runner_options = RunnerOptions(
        device=options.device, allow_engine_host_code=options.allow_engine_host_code
    )
    if runner_options.device_type == "cuda" and current_gpu(runner_options.device_index) is None:
        print(
            f"PyTorch finds no NVIDIA GPU for device {options.device!r}: run this script on the "
            "machine that will run the engines, or pass --device cpu for bundles of ONNX graphs.",
            file=sys.stderr,
        )
        return 2
    machine = describe_machine(runner_options)
    all_passed = True
    for path in options.bundles:
        record = check_bundle(path, options.against, runner_options, options.runs)
        all_passed &= record["passed"]
        out = options.records / f"{_record_name(path, machine)}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"date": date.today().isoformat(), "machine": machine, **record})
        print(f"{path}: {'passed' if record['passed'] else 'FAILED'}, recorded in {out}")
    return 0 if all_passed else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check_engines.py",
        description="Compare engines with PyTorch on this machine's GPU, time and record them.",
    )
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--against",
        type=Path,
        required=True,
        metavar="CHECKPOINT",
        help="checkpoint that the bundles were exported from",
    )
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N or cpu")
    parser.add_argument("--runs", type=int, default=50, help="timed runs of a graph (default: 50)")
    parser.add_argument(
        "--records", type=Path, default=RECORDS, metavar="DIR", help="default: engines/records"
    )
    parser.add_argument(
        "--allow-engine-host-code",
        action="store_true",
        help="load version-compatible engines, which carry host code: only from trusted bundles",
    )
    options = parser.parse_args(arguments)
    if options.runs < 2:
        parser.error(f"--runs is {options.runs}; it must be at least 2")
    names = [path.resolve().name for path in options.bundles]
    if len(set(names)) < len(names):
        parser.error("two bundles have the same name, which names their records; rename one")
    return options


def describe_machine(options: RunnerOptions) -> dict[str, Any]:
    """Describe GPU, driver, processor and installed versions."""
    gpu = current_gpu(options.device_index) if options.device_type == "cuda" else None
    processor = describe_processor()
    return {
        "gpu": None if gpu is None else gpu.name,
        "compute_capability": None if gpu is None else gpu.compute_capability,
        "driver": None if gpu is None else _driver_version(options.device_index),
        "processor": processor.name,
        "cores": processor.cores,
        "platform": platform.platform(),
        "versions": {"coprs-deploy": __version__, **installed_versions()},
    }


def _driver_version(index: int) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={index}"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def check_bundle(
    path: Path, checkpoint: Path, options: RunnerOptions, num_runs: int
) -> dict[str, Any]:
    """Compare a bundle with its checkpoint, and measure its graphs if it passes.

    Returns:
        The bundle's part of the record; ``error`` is set if the bundle could not be checked.
    """
    record: dict[str, Any] = {
        "bundle": path.resolve().name,
        "passed": False,
        "error": "",
        "equivalence": [],
        "graphs": {},
    }
    try:
        records = verify_bundle(
            path,
            checkpoint,
            options.device,
            lambda step: print(f"  {path}: {step}", file=sys.stderr),
            allow_engine_host_code=options.allow_engine_host_code,
        )
        print(equivalence_table(records))
        record["equivalence"] = [one.to_json() for one in records]
        bundle = open_bundle(path)
        record["checkpoint_fingerprint"] = bundle.manifest.checkpoint_fingerprint
        if all(one.passed for one in records):
            record["graphs"] = measure_graphs(bundle, options, num_runs)
            record["passed"] = True
    except (CoPRSError, ValueError, OSError) as error:
        record["error"] = str(error)
        print(f"{path}: {error}", file=sys.stderr)
    return record


def measure_graphs(bundle: Bundle, options: RunnerOptions, num_runs: int) -> dict[str, Any]:
    """Measure the latency of each graph, and describe its engine."""
    graphs: dict[str, dict[str, Any]] = {}
    for name, graph in bundle.manifest.graphs.items():
        with open_bundle_graph(bundle, name, options) as runner:
            graphs[name] = {
                "runner": runner.description,
                "runtime": graph.runtime,
                "precision": graph.precision,
                "engine": None
                if graph.engine is None
                else _describe_engine(graph.engine.to_json()),
                "latency_ms": measure_latency(runner, num_runs),
            }
    rows = [
        (name, f"{found['latency_ms']['median']:.2f}", f"{found['latency_ms']['p90']:.2f}")
        for name, found in graphs.items()
    ]
    print(table(("graph", "median ms", "p90 ms"), rows))
    return graphs


def _describe_engine(engine: dict[str, Any]) -> dict[str, Any]:
    """Leave out the lines of the layers, which the bundle's manifest has."""
    return {key: value for key, value in engine.items() if key != "layers"}


def measure_latency(runner: Runner, num_runs: int) -> dict[str, float]:
    """Time calls with inputs on the host, until all outputs are on the host.

    One image, and the number of targets that the graph is optimized for.
    """
    inputs = random_inputs(runner.spec)
    times_ms = []
    for _ in range(WARM_UP_RUNS + num_runs):
        start = time.perf_counter()
        for output in runner(**inputs).values():
            output.numpy()
        times_ms.append(1e3 * (time.perf_counter() - start))
    timed = times_ms[WARM_UP_RUNS:]
    p90 = statistics.quantiles(timed, n=10, method="inclusive")[-1]
    return {"median": statistics.median(timed), "p90": p90, "num_runs": num_runs}


def _record_name(bundle: Path, machine: dict[str, Any]) -> str:
    device = machine["gpu"] or "cpu"
    slug = "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
    return f"{bundle.resolve().name}-{slug}-{date.today().isoformat()}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
