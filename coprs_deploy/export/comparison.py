"""Equality as a chain of links, from the PyTorch module to the masks of each runtime.

    module -> traced program -> float32 graph -> typed graph on each runtime -> one with another

The float32 graph is the bundle's own, or is written for the comparison where the bundle's is typed.
Where a bundle was exported for one aspect, the module of that aspect follows the module.

Every place gets the same inputs: each stage alone is fed with the module's own outputs of the stage
before, and the chain of all three ends in the masks. A link compares two neighboring places.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.bundle import Bundle, EquivalenceRecord
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model
from coprs_deploy.engines import (
    ONNX_RUNTIMES,
    RunnerOptions,
    open_bundle_graph,
    open_graph,
    runtime_module,
)
from coprs_deploy.engines.runner import Array, Runner
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import RuntimeUnavailableError
from coprs_deploy.export.equivalence import (
    END_TO_END,
    TOLERANCES,
    RunnerOpener,
    SampleInput,
    Tolerance,
    summarize,
)
from coprs_deploy.export.graph_check import NOT_JUDGED
from coprs_deploy.export.graph_writer import write_graph
from coprs_deploy.export.precision import FP32
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, MASK_DECODER, PRIOR, GraphSpec

if TYPE_CHECKING:
    import torch

MODULE = "PyTorch module"
OF_ONE_ASPECT = "module of one aspect"
FLOAT32_GRAPH = "fp32 graph on onnxruntime"
TRACED = "traced program"

_SAME_OPERATORS = "tracing writes down the operators that the module runs; no sum changes its order"
_OTHER_LAYOUT = (
    "the whole model hands its embedding on transposed, which is summed in another order"
)
TRACING: Mapping[str, Tolerance] = {
    IMAGE_ENCODER: Tolerance(0.0, 0.0, 0.999999, None, _SAME_OPERATORS),
    PRIOR: Tolerance(0.0, 0.0, 0.999999, None, _SAME_OPERATORS),
    MASK_DECODER: Tolerance(0.0, 0.0, 0.999999, 1.0, _SAME_OPERATORS),
    END_TO_END: Tolerance(1e-5, 1e-6, 0.999999, 0.999, _OTHER_LAYOUT),
}
"""Between module and traced program: of the stages, not one bit may differ."""

_NOT_JUDGED: Mapping[str, Tolerance] = dict.fromkeys(
    (*GRAPH_NAMES, END_TO_END), replace(NOT_JUDGED, mask_iou=None, pools_masks=False)
)
"""What dropping the padding does to masks is told by a record of the manifest."""

OUTPUTS = {
    IMAGE_ENCODER: "image_embedding",
    PRIOR: "prior_logits",
    MASK_DECODER: "mask_logits",
    END_TO_END: "mask_logits",
}


@dataclass(frozen=True)
class Difference:
    """How two places differ in one output.

    Attributes:
        record: the worst over all samples; ``record.graph`` names the stage.
        output: name of the tensor.
        allowed: the tolerance that decided.
        heatmap: (G, G) or (4 G, 4 G) absolute difference of the worst sample, the mean over its
            other dimensions.
    """

    record: EquivalenceRecord
    output: str
    allowed: Tolerance
    heatmap: NDArray[np.float32]


@dataclass(frozen=True)
class BackendComparison:
    """Two neighboring places and their differences, a stage each and end to end."""

    first: str
    second: str
    differences: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        """Whether every output is inside its tolerance."""
        return all(difference.record.passed for difference in self.differences)

    @property
    def has_tolerance(self) -> bool:
        """Whether there are tolerances."""
        return all(difference.record.has_tolerance for difference in self.differences)


def require_onnx_graphs(bundle: Bundle) -> None:
    """Refuse a bundle of engines: they run nowhere but on their own GPU.

    Raises:
        ValueError: it is one.
    """
    runtime = bundle.manifest.graphs[PRIOR].runtime
    if runtime not in ONNX_RUNTIMES:
        raise ValueError(
            f"the bundle holds engines of {runtime}; the chain is measured on bundles of "
            f"{', '.join(ONNX_RUNTIMES)}: leave --report out, or export such a bundle as well"
        )


def compare_backends(
    bundle: Bundle,
    checkpoint: Checkpoint,
    samples: Sequence[SampleInput],
    report: Callable[[str], None] = lambda step: None,
) -> tuple[BackendComparison, ...]:
    """Measure every link that can be measured here.

    Args:
        bundle: ONNX graphs of ``checkpoint``.
        checkpoint: what they were exported from.
        samples: inputs.
        report: called with the name of each step as it starts.

    Returns:
        The links in order: module and that of one aspect (not judged where it drops padding), this
        and traced program, traced program and float32 graph, that and a typed graph on each
        runtime that is installed, and the runtimes with each other.

    Raises:
        ValueError: the bundle holds engines, which only their own GPU runs.
    """
    require_onnx_graphs(bundle)
    graphs = bundle.manifest.graphs
    runtime, precision = graphs[PRIOR].runtime, graphs[IMAGE_ENCODER].precision
    specs = {name: graph.spec for name, graph in graphs.items()}
    model = load_segmentation_model(checkpoint)
    stages = model.stages()

    def run_module() -> dict[str, list[Array]]:
        outputs = _outputs(lambda name: TorchRunner(stages[name], specs[name]), samples)
        return {**outputs, END_TO_END: [_whole_model(model, sample) for sample in samples]}

    report(MODULE)
    start, module, links = MODULE, run_module(), list[BackendComparison]()
    valid_region = specs[IMAGE_ENCODER].valid_region
    if valid_region is not None:
        report(OF_ONE_ASPECT)
        model.image_encoder.set_picture_extent(valid_region)
        of_one_aspect = run_module()
        allowed = _NOT_JUDGED if valid_region.drops_padding else TOLERANCES["onnxruntime", FP32]
        links.append(_link(MODULE, OF_ONE_ASPECT, module, of_one_aspect, allowed))
        start, module = OF_ONE_ASPECT, of_one_aspect
    report(TRACED)
    places = {
        TRACED: _outputs(
            lambda name: TorchRunner(trace(stages[name], specs[name]), specs[name]), samples, module
        )
    }
    links.append(_link(start, TRACED, module, places[TRACED], TRACING))
    source, exact = TRACED, places[TRACED]
    if precision != FP32:
        report(FLOAT32_GRAPH)
        written = _float32_outputs(stages, specs, samples, module)
        links.append(_link(TRACED, FLOAT32_GRAPH, exact, written, TOLERANCES["onnxruntime", FP32]))
        source, exact = FLOAT32_GRAPH, written
    installed = [r for r in ONNX_RUNTIMES if runtime_module(r).availability()[0].is_available]
    for name in installed:
        place = f"{precision} graph on {name}"
        if (name, precision) not in TOLERANCES:
            continue
        report(place)
        try:
            places[place] = _outputs(_graph_opener(bundle, name), samples, module)
        except RuntimeUnavailableError as error:
            report(f"{place} is left out: {error}")
    tolerances = TOLERANCES[runtime, precision]
    runtimes = [place for place in places if place != TRACED]
    for place in runtimes:
        links.append(_link(source, place, exact, places[place], tolerances))
    for first, second in pairwise(runtimes):
        links.append(_link(first, second, places[first], places[second], tolerances))
    return tuple(links)


def _float32_outputs(
    stages: Mapping[str, torch.nn.Module],
    specs: Mapping[str, GraphSpec],
    samples: Sequence[SampleInput],
    module: Mapping[str, list[Array]],
) -> dict[str, list[Array]]:
    """Write the stages as float32 graphs, and run them."""
    with tempfile.TemporaryDirectory(prefix="coprs-chain-") as name:
        folder = Path(name)
        for stage, torch_module in stages.items():
            path = folder / f"{stage}.onnx"
            write_graph(torch_module, specs[stage], path, {}, precision=FP32, scratch=folder)

        def opener(stage: str) -> Runner:
            path = folder / f"{stage}.onnx"
            return open_graph("onnxruntime", path, specs[stage], RunnerOptions())

        return _outputs(opener, samples, module)


def _graph_opener(bundle: Bundle, runtime: str) -> RunnerOpener:
    return lambda name: open_bundle_graph(bundle, name, RunnerOptions(), runtime)


def trace(stage: torch.nn.Module, spec: GraphSpec) -> torch.nn.Module:
    """Trace a stage as export does, and give the program back as a module that can be called."""
    import torch

    count = spec.targets.opt  # the encoder runs one image at a time here
    examples = tuple(
        torch.zeros(tensor.shape_for(count), dtype=getattr(torch, tensor.dtype))
        for tensor in spec.inputs
    )
    with torch.no_grad():
        program = torch.export.export(stage, examples).module()

    class Traced(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = program(*inputs)
            return output

    return Traced()


def _outputs(
    opener: RunnerOpener,
    samples: Sequence[SampleInput],
    module: Mapping[str, list[Array]] | None = None,
) -> dict[str, list[Array]]:
    """Run every stage on every sample.

    Args:
        opener: opens the stages of a place.
        samples: inputs.
        module: outputs that the stages are fed with; None feeds each with the place's own.

    Returns:
        The output of each stage by its name and, under ``end_to_end``, the masks of the place's
        own chain.
    """
    fed = [_first(sample) for sample in samples]
    own = [_first(sample) for sample in samples]
    outputs: dict[str, list[Array]] = {}
    for name in GRAPH_NAMES:
        with opener(name) as runner:
            outputs[name] = [_run(runner, values) for values in fed]
            for values in own:
                values[OUTPUTS[name]] = _run(runner, values)
        truth = outputs[name] if module is None else module[name]
        for values, output in zip(fed, truth, strict=True):
            values[OUTPUTS[name]] = output
    outputs[END_TO_END] = [values["mask_logits"] for values in own]
    return outputs


def _run(runner: Runner, values: Mapping[str, Array]) -> Array:
    outputs = runner(**{tensor.name: values[tensor.name] for tensor in runner.spec.inputs})
    return outputs[runner.spec.outputs[0].name].numpy()


def _first(sample: SampleInput) -> dict[str, Array]:
    return {
        "image": sample.prepared.image,
        "concentration": sample.concentration,
        "unpadded_size": sample.prepared.unpadded_size,
    }


def _whole_model(model: torch.nn.Module, sample: SampleInput) -> Array:
    """Run the model's own ``forward``, which is no stage."""
    import torch

    inputs = (sample.prepared.image, sample.concentration, sample.prepared.unpadded_size)
    with torch.inference_mode():
        _, masks = model(*(torch.from_numpy(array) for array in inputs))
    array: Array = masks.numpy()
    return array


def _link(
    first: str,
    second: str,
    expected: Mapping[str, list[Array]],
    found: Mapping[str, list[Array]],
    tolerances: Mapping[str, Tolerance],
) -> BackendComparison:
    differences = []
    for name in (*GRAPH_NAMES, END_TO_END):
        gaps = [np.abs(a - b) for a, b in zip(found[name], expected[name], strict=True)]
        worst = max(gaps, key=lambda gap: float(gap.max()))
        heatmap = worst.mean(axis=tuple(range(worst.ndim - 2)), dtype=np.float64)
        differences.append(
            Difference(
                record=summarize(name, found[name], expected[name], tolerances[name]),
                output=OUTPUTS[name],
                allowed=tolerances[name],
                heatmap=heatmap.astype(np.float32),
            )
        )
    return BackendComparison(first, second, tuple(differences))
