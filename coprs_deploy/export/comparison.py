"""Backend comparison: neighbors in the following order are compared.

    module -> traced program -> float32 graph -> typed graph on each runtime -> runtime to runtime

The float32 graph is written for the comparison if the bundle's is of lower precision. For a fixed
aspect ratio, the module restricted to it follows the module; if it drops padding, that comparison
has no tolerance. Each graph alone is fed with the module's outputs of the graph before it, and end
to end each backend runs on its own outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.artifacts import temporary_directory
from coprs_deploy.bundle import Bundle, EquivalenceRecord
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model
from coprs_deploy.engines import (
    ONNX_RUNTIMES,
    RunnerOptions,
    open_bundle_graph,
    open_graph,
    runtime_module,
)
from coprs_deploy.engines.runner import Array
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import RuntimeUnavailableError
from coprs_deploy.export.equivalence import OUTPUTS, Outputs, run_graphs, summarize
from coprs_deploy.export.graph_check import NO_TOLERANCE
from coprs_deploy.export.graph_writer import write_graph
from coprs_deploy.export.onnx_graph import example_inputs
from coprs_deploy.export.precision import FP32
from coprs_deploy.export.samples import SampleInput
from coprs_deploy.export.tolerances import END_TO_END, TOLERANCES, Tolerance
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, MASK_DECODER, PRIOR, GraphSpec

if TYPE_CHECKING:
    import torch

    from coprs_deploy.models import SegmentationModel

MODULE = "PyTorch module"
FIXED_ASPECT_MODULE = "module with fixed aspect ratio"
TRACED = "traced program"
FLOAT32_GRAPH = "fp32 graph on onnxruntime"

_SAME_OPERATORS = "tracing records the operators that the module runs; no sum changes its order"
_OTHER_LAYOUT = "the whole model passes its embedding transposed, which is summed in another order"
TRACING: Mapping[str, Tolerance] = {
    IMAGE_ENCODER: Tolerance(0.0, 0.0, 0.999999, None, _SAME_OPERATORS),
    PRIOR: Tolerance(0.0, 0.0, 0.999999, None, _SAME_OPERATORS),
    MASK_DECODER: Tolerance(0.0, 0.0, 0.999999, 1.0, _SAME_OPERATORS),
    END_TO_END: Tolerance(1e-5, 1e-6, 0.999999, 0.999, _OTHER_LAYOUT),
}
"""Tolerances of the traced program: each graph must equal the module bit for bit."""

_NO_TOLERANCES: Mapping[str, Tolerance] = dict.fromkeys(
    (*GRAPH_NAMES, END_TO_END), replace(NO_TOLERANCE, mask_iou=None, pools_masks=False)
)
"""For dropped padding; its effect on masks is a record of the manifest."""


@dataclass(frozen=True)
class Difference:
    """Difference between two backends in one output, worst case over all samples.

    Attributes:
        heatmap: (G, G) or (4 G, 4 G) absolute difference of the worst sample, averaged over the
            other dimensions.
    """

    record: EquivalenceRecord
    output: str
    allowed: Tolerance
    heatmap: NDArray[np.float32]


@dataclass(frozen=True)
class BackendComparison:
    """Comparison of two backends by name, with one difference per graph, then end to end."""

    reference: str
    candidate: str
    differences: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(difference.record.passed for difference in self.differences)

    @property
    def has_tolerance(self) -> bool:
        """Whether every output has a tolerance."""
        return all(difference.record.has_tolerance for difference in self.differences)


def require_onnx_graphs(bundle: Bundle) -> None:
    """Refuse a bundle of engines, which only their own GPU can run.

    Raises:
        ValueError: the bundle contains engines.
    """
    runtime = bundle.manifest.graphs[PRIOR].runtime
    if runtime not in ONNX_RUNTIMES:
        raise ValueError(
            f"the bundle contains engines of {runtime}; backends are compared on bundles of "
            f"{', '.join(ONNX_RUNTIMES)}: omit --report, or export such a bundle as well"
        )


def compare_backends(
    bundle: Bundle,
    checkpoint: Checkpoint,
    samples: Sequence[SampleInput],
    report: Callable[[str], None] = lambda step: None,
) -> tuple[BackendComparison, ...]:
    """Compare all backends that are available here, in the order of this module's docstring.

    ``report`` is called with the name of each backend as it starts.

    Raises:
        ValueError: the bundle contains engines, which only their own GPU can run.
    """
    require_onnx_graphs(bundle)
    graphs = bundle.manifest.graphs
    specs = {name: graph.spec for name, graph in graphs.items()}
    model = load_segmentation_model(checkpoint)
    modules = model.graph_modules()
    comparisons: list[BackendComparison] = []
    float32 = TOLERANCES["onnxruntime", FP32]

    report(MODULE)
    reference, module = MODULE, _run_model(model, specs, samples)
    expected: Outputs = module

    def follow(name: str, outputs: Outputs, tolerances: Mapping[str, Tolerance]) -> None:
        """Compare a backend with the one before it, whose place it takes."""
        nonlocal reference, expected
        comparisons.append(_compare(reference, name, expected, outputs, tolerances))
        reference, expected = name, outputs

    valid_region = specs[IMAGE_ENCODER].valid_region
    if valid_region is not None:
        report(FIXED_ASPECT_MODULE)
        model.image_encoder.set_valid_region(valid_region)
        module = _run_model(model, specs, samples)
        allowed = _NO_TOLERANCES if valid_region.drops_padding else float32
        follow(FIXED_ASPECT_MODULE, module, allowed)
    report(TRACED)
    traced = run_graphs(
        lambda n: TorchRunner(trace(modules[n], specs[n]), specs[n]), samples, module
    )
    follow(TRACED, traced, TRACING)
    if graphs[IMAGE_ENCODER].precision != FP32:
        report(FLOAT32_GRAPH)
        with temporary_directory("coprs-comparison-") as directory:
            paths = {name: directory / f"{name}.onnx" for name in modules}
            for name, path in paths.items():
                write_graph(modules[name], specs[name], path, {}, precision=FP32, scratch=directory)
            written = run_graphs(
                lambda n: open_graph("onnxruntime", paths[n], specs[n], RunnerOptions()),
                samples,
                module,
            )
        follow(FLOAT32_GRAPH, written, float32)
    backends = _run_runtimes(bundle, samples, module, report)
    allowed = TOLERANCES[graphs[PRIOR].runtime, graphs[IMAGE_ENCODER].precision]
    for runtime, outputs in backends.items():
        comparisons.append(_compare(reference, runtime, expected, outputs, allowed))
    for first, second in pairwise(backends):
        comparisons.append(_compare(first, second, backends[first], backends[second], allowed))
    return tuple(comparisons)


def trace(module: torch.nn.Module, spec: GraphSpec) -> torch.nn.Module:
    """Trace a module as export does, and return the program as a callable module."""
    import torch

    examples = example_inputs(spec, spec.targets.opt)  # the encoder runs one image at a time here
    with torch.no_grad():
        program = torch.export.export(module, examples).module()

    class Traced(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = program(*inputs)
            return output

    return Traced()


def _run_model(
    model: SegmentationModel, specs: Mapping[str, GraphSpec], samples: Sequence[SampleInput]
) -> dict[str, list[Array]]:
    """Run the modules one by one, and the model's own ``forward`` end to end."""
    import torch

    modules = model.graph_modules()
    outputs = run_graphs(lambda name: TorchRunner(modules[name], specs[name]), samples)
    masks = []
    for sample in samples:
        inputs = (sample.prepared.image, sample.concentration, sample.prepared.unpadded_size)
        with torch.inference_mode():
            _, mask_logits = model(*(torch.from_numpy(array) for array in inputs))
        masks.append(mask_logits.numpy())
    return {**outputs, END_TO_END: masks}


def _run_runtimes(
    bundle: Bundle, samples: Sequence[SampleInput], module: Outputs, report: Callable[[str], None]
) -> dict[str, dict[str, list[Array]]]:
    """Run the bundle's graphs on each installed runtime, by name of the backend."""
    precision = bundle.manifest.graphs[IMAGE_ENCODER].precision
    backends = {}
    for runtime in ONNX_RUNTIMES:
        is_available = runtime_module(runtime).availability()[0].is_available
        if not is_available or (runtime, precision) not in TOLERANCES:
            continue
        backend = f"{precision} graph on {runtime}"
        report(backend)
        try:
            opener = partial(open_bundle_graph, bundle, options=RunnerOptions(), runtime=runtime)
            backends[backend] = run_graphs(opener, samples, module)
        except RuntimeUnavailableError as error:
            report(f"{backend} is skipped: {error}")
    return backends


def _compare(
    reference: str,
    candidate: str,
    expected: Outputs,
    found: Outputs,
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
    return BackendComparison(reference, candidate, tuple(differences))
