"""Graphs as subjects: one stage, or all three, through any runtime; and PyTorch's own modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coprs_deploy.benchmarks.arrays import OUTPUT_FILE, Values, read_inputs, write_arrays
from coprs_deploy.benchmarks.case import DEVICE, Subject
from coprs_deploy.bundle import Bundle, read_manifest
from coprs_deploy.engines import DeviceTensor, Runner, RunnerOptions, open_graph
from coprs_deploy.engines.trt.runner import TrtRunner
from coprs_deploy.specs import GRAPH_NAMES, MASK_DECODER, PRIOR

CHAIN = "all three graphs"
"""Stands for the name of a graph where all of them run, one after the other."""


def open_bundle_subject(
    bundle: str,
    runtime: str,
    graph: str,
    inputs: str,
    *,
    device: str = "cpu",
    inference_precision: str = "fp32",
) -> Subject:
    """Open one graph of a bundle, or all three, with a runtime that can read it."""
    # Its files were checked when it was made or first opened; here the time to open is measured.
    opened = Bundle(Path(bundle), read_manifest(bundle))
    options = RunnerOptions(device=device, inference_precision=inference_precision)
    names = GRAPH_NAMES if graph == CHAIN else (graph,)
    runners = {}
    for name in names:
        record = opened.manifest.graphs[name]
        path = opened.graph_path(name)
        runners[name] = open_graph(runtime, path, record.spec, options, record.engine)
    return RunnerSubject(runners, inputs, device)


class RunnerSubject(Subject):
    """Runners in a row: each is fed with the inputs and with what the ones before it gave.

    Args:
        runners: by graph, in order.
        inputs: folder of the inputs.
        device: where they run; on CUDA device events measure, and the device is waited for.
    """

    def __init__(self, runners: Mapping[str, Runner], inputs: str, device: str) -> None:
        self._runners = list(runners.values())
        self._owned = list(self._runners)
        if PRIOR in runners and MASK_DECODER in runners:
            joined = runners[PRIOR].fused_with(runners[MASK_DECODER])
            if joined is not None:  # as an answer runs them
                self._runners[-2:] = [joined]
                self._owned.insert(0, joined)
        self._inputs = inputs
        self._first = next(read_inputs(inputs))
        self._clock = device_clock(device, self._runners)

    def run(self) -> Mapping[str, float]:
        """Run them once, with the first input."""
        return self._clock(lambda: self._once(self._first))

    def _once(self, sample: Values) -> dict[str, DeviceTensor]:
        known: dict[str, Any] = dict(sample)
        given: dict[str, DeviceTensor] = {}
        for runner in self._runners:
            result = runner(**{tensor.name: known[tensor.name] for tensor in runner.spec.inputs})
            given.update(result)
            known.update(result)
        return given

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Leave the outputs of every input."""
        found = {}
        for index, sample in enumerate(read_inputs(self._inputs)):
            for name, value in self._once(sample).items():
                found[f"{index}.{name}"] = value.numpy()
        write_arrays(folder / OUTPUT_FILE, found)
        return {}

    def close(self) -> None:
        """Free the graphs."""
        for runner in self._owned:
            runner.close()


Clock = Callable[[Callable[[], object]], Mapping[str, float]]


def device_clock(device: str, runners: list[Runner]) -> Clock:
    """Make what times a run on a device.

    On the CPU that is the caller's clock. On CUDA the run ends when the device has finished, and a
    runner with a stream that is known (PyTorch's, or an engine's own) is timed by two events on it.
    """
    if not device.startswith("cuda"):

        def on_the_host(work: Callable[[], object]) -> Mapping[str, float]:
            work()
            return {}

        return on_the_host
    import torch

    streams = [runner.stream for runner in runners if isinstance(runner, TrtRunner)]
    is_torch = all(runner.description.startswith("torch") for runner in runners)
    stream: Any = streams[0] if len(streams) == len(runners) == 1 else None
    if is_torch:
        stream = torch.cuda.current_stream()

    def on_the_device(work: Callable[[], object]) -> Mapping[str, float]:
        if stream is None:
            work()
            torch.cuda.synchronize()
            return {}
        events: Any = torch.cuda.Event  # it has no types
        begin, end = events(enable_timing=True), events(enable_timing=True)
        begin.record(stream)
        work()
        end.record(stream)
        torch.cuda.synchronize()
        return {DEVICE: begin.elapsed_time(end)}

    return on_the_device
