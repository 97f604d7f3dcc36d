"""Graphs as workloads: one graph or all three, through any runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.bench.case import DEVICE, OUTPUT_FILE, Values, Workload, read_inputs, write_arrays
from coprs_deploy.bundle import Bundle, read_manifest
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.engines import DeviceTensor, Runner, RunnerOptions, open_graph
from coprs_deploy.engines.trt.runner import TrtRunner
from coprs_deploy.specs import GRAPH_NAMES, MASK_DECODER, PRIOR, graph_specs

ALL_GRAPHS = "all three graphs"
"""Stands for the name of a graph where all of them run, one after the other."""


def open_bundle_graphs(
    bundle: str,
    runtime: str,
    graph: str,
    inputs: str,
    *,
    device: str = "cpu",
    inference_precision: str = "fp32",
    repeat: int = 1,
) -> Workload:
    """Open graphs of a bundle: one, several (``prior+mask_decoder``) or all three.

    Image and concentration of an input are repeated ``repeat`` times in one call.
    """
    # Its files were checked when it was made or first opened; here the time to open is measured.
    opened = Bundle(Path(bundle), read_manifest(bundle))
    options = RunnerOptions(device=device, inference_precision=inference_precision)
    runners = {}
    for name in GRAPH_NAMES if graph == ALL_GRAPHS else graph.split("+"):
        record, path = opened.manifest.graphs[name], opened.graph_path(name)
        runners[name] = open_graph(runtime, path, record.spec, options, record.engine)
    return RunnerWorkload(runners, inputs, device, repeat)


def open_rounded_graphs(checkpoint: str, folder: str, inputs: str) -> Workload:
    """Open the three graphs of a precision with their roundings explicit, on the CPU."""
    config = read_checkpoint(checkpoint).config.model
    specs = graph_specs(config.geometry, config.policy_hidden_size)
    paths = {name: Path(folder) / f"{name}.onnx" for name in GRAPH_NAMES}
    runners = {n: open_graph("onnxruntime", p, specs[n], RunnerOptions()) for n, p in paths.items()}
    return RunnerWorkload(runners, inputs, "cpu")


class RunnerWorkload(Workload):
    """Runners in a row: each is fed with the inputs and with the outputs of those before it."""

    def __init__(
        self, runners: Mapping[str, Runner], inputs: str, device: str, repeat: int = 1
    ) -> None:
        self._runners = list(runners.values())
        self._owned = list(self._runners)
        if PRIOR in runners and MASK_DECODER in runners:
            fused = runners[PRIOR].fused_with(runners[MASK_DECODER])
            if fused is not None:  # as a request runs them
                self._runners[-2:] = [fused]
                self._owned.insert(0, fused)
        self._inputs, self._repeat = inputs, repeat
        self._first = self._repeated(next(read_inputs(inputs)))
        self._clock = device_clock(device, self._runners)

    def _repeated(self, sample: Values) -> Values:
        if self._repeat > 1:
            for name in ("image", "concentration"):
                sample[name] = np.repeat(sample[name][:1], self._repeat, axis=0)
        return sample

    def run(self) -> Mapping[str, float]:
        """Run the graphs once, with the first input."""
        return self._clock(lambda: self._once(self._first))

    def _once(self, sample: Values) -> dict[str, DeviceTensor]:
        known: dict[str, Any] = dict(sample)
        outputs: dict[str, DeviceTensor] = {}
        for runner in self._runners:
            result = runner(**{tensor.name: known[tensor.name] for tensor in runner.spec.inputs})
            outputs.update(result)
            known.update(result)
        return outputs

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Write the outputs of every input; of a repeated one, the last."""
        found = {}
        for index, sample in enumerate(read_inputs(self._inputs)):
            for name, value in self._once(self._repeated(sample)).items():
                array = value.numpy()
                found[f"{index}.{name}"] = array[-1:] if self._repeat > 1 else array
        write_arrays(folder / OUTPUT_FILE, found)
        return {}

    def close(self) -> None:
        """Free the graphs."""
        for runner in self._owned:
            runner.close()


Clock = Callable[[Callable[[], object]], Mapping[str, float]]


def device_clock(device: str, runners: list[Runner]) -> Clock:
    """Return what times a run on a device.

    On the CPU that is the worker's clock. On CUDA the run ends when the device has finished, and
    where the stream is known (PyTorch's, or an engine's own) two events on it measure.
    """
    stream: Any = None
    if device.startswith("cuda"):
        import torch

        events: Any = torch.cuda.Event  # it has no types
        streams = [runner.stream for runner in runners if isinstance(runner, TrtRunner)]
        stream = streams[0] if len(streams) == len(runners) == 1 else None
        if all(runner.description.startswith("torch") for runner in runners):
            stream = torch.cuda.current_stream()

    def clock(work: Callable[[], object]) -> Mapping[str, float]:
        if stream is None:
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            return {}
        begin, end = events(enable_timing=True), events(enable_timing=True)
        begin.record(stream)
        work()
        end.record(stream)
        torch.cuda.synchronize()
        return {DEVICE: begin.elapsed_time(end)}

    return clock
