"""What an export compares with PyTorch before it writes a bundle: graphs, then engines.

A graph of a lower precision is first checked with its roundings written out, which shows on any CPU
what a GPU would compute; engines are checked where a GPU can run them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from coprs_deploy.bundle import PLAN_SUFFIX, EngineRecord, EquivalenceRecord
from coprs_deploy.checkpoint import Checkpoint
from coprs_deploy.engines import Runner, RunnerOptions, open_graph
from coprs_deploy.engines.cuda_device import current_gpu
from coprs_deploy.engines.engine_builder import BuildTarget
from coprs_deploy.engines.plan_execution import PlanRunner, UnverifiedEngineWarning
from coprs_deploy.export.equivalence import (
    TOLERANCES,
    RunnerOpener,
    compare_stages,
    reference_opener,
    require_equivalence,
    sample_inputs,
)
from coprs_deploy.export.precision import FP32
from coprs_deploy.export.rounding import write_rounded_graph
from coprs_deploy.specs import PRIOR, GraphSpec

if TYPE_CHECKING:
    from coprs_deploy.export.exporter import ExportOptions

CPU_RUNTIME = "onnxruntime"
"""The runtime that checks graphs, whatever shall run them."""


class GraphCheck:
    """Compares what an export wrote with PyTorch, in the tolerances of its runtime and precision.

    Args:
        source: the checkpoint.
        specs: inputs and outputs of the graphs.
        options: of the export.
        report: called with the name of each step as it starts.
        scratch: a folder for graphs that do not stay.
    """

    def __init__(
        self,
        source: Checkpoint,
        specs: Mapping[str, GraphSpec],
        options: ExportOptions,
        report: Callable[[str], None],
        scratch: Path,
    ) -> None:
        self._source = source
        self._specs = specs
        self._options = options
        self._report = report
        self._scratch = scratch
        self._tolerances = TOLERANCES[options.runtime, options.precision]

    def graphs(self, graphs: Mapping[str, Path]) -> tuple[EquivalenceRecord, ...]:
        """Compare the ONNX graphs.

        Raises:
            EquivalenceError: one is outside its tolerance.
        """
        records: tuple[EquivalenceRecord, ...] = ()
        is_rounded = self._options.precision != FP32
        if is_rounded:
            records = self._compare(lambda name: self._open_rounded(name, graphs[name]), "rounded ")
        if not is_rounded or self._options.runtime == CPU_RUNTIME:
            records = self._compare(lambda name: self._open_cpu(name, graphs[name]))
        return records

    def engines(
        self, folder: Path, engines: Mapping[str, EngineRecord]
    ) -> tuple[tuple[EquivalenceRecord, ...], dict[str, EngineRecord]]:
        """Compare the engines on this machine's GPU.

        Returns:
            The measured equality, and the engines' records with what the GPU read back.

        Raises:
            EquivalenceError: one is outside its tolerance.
        """
        verified = dict(engines)

        def open_engine(name: str) -> Runner:
            runner = open_unverified(
                self._options.runtime,
                folder / f"{name}{PLAN_SUFFIX}",
                self._specs[name],
                engines[name],
            )
            if isinstance(runner, PlanRunner):
                verified[name] = verified_record(engines[name], runner)
            return runner

        return self._compare(open_engine, "engine "), verified

    def _compare(self, candidate: RunnerOpener, what: str = "") -> tuple[EquivalenceRecord, ...]:
        width = self._specs[PRIOR].inputs[1].shape[1]
        assert isinstance(width, int)
        records = compare_stages(
            reference=reference_opener(self._source, self._specs),
            candidate=candidate,
            samples=sample_inputs(
                self._source.config.model.geometry, width, self._options.targets.preferred
            ),
            tolerances=self._tolerances,
            report=lambda step: self._report(f"{what}{step}"),
        )
        require_equivalence(records, self._tolerances)
        return records

    def _open_cpu(self, name: str, graph: Path) -> Runner:
        return open_graph(CPU_RUNTIME, graph, self._specs[name], RunnerOptions())

    def _open_rounded(self, name: str, graph: Path) -> Runner:
        path = self._scratch / f"{name}.rounded.onnx"
        write_rounded_graph(graph, path)
        runner = self._open_cpu(name, path)
        for written in self._scratch.glob(f"{path.name}*"):  # the session has read it
            written.unlink()
        return runner


def can_run_here(target: BuildTarget) -> bool:
    """Whether this machine's GPU is one that the engines were built for."""
    gpu = current_gpu()
    return gpu is not None and gpu.compute_capability in target.capabilities


def open_unverified(
    runtime: str, path: Path, spec: GraphSpec, engine: EngineRecord, device: str = "cuda"
) -> Runner:
    """Open an engine in order to verify it: that it never ran is no news here."""
    options = RunnerOptions(device=device, allow_plan_code=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedEngineWarning)
        return open_graph(runtime, path, spec, options, engine)


def verified_record(engine: EngineRecord, runner: PlanRunner) -> EngineRecord:
    """Say what a GPU read back of an engine that it ran."""
    return msgspec.structs.replace(
        engine,
        layers=runner.layers,
        device_memory_bytes=runner.device_memory_bytes,
        verified_on=runner.gpu_name,
    )
