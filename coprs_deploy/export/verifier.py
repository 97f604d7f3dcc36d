"""The equivalence check of an existing bundle against the checkpoint that it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from coprs_deploy.bundle import (
    EngineRecord,
    EquivalenceRecord,
    open_bundle,
    write_manifest,
)
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.engines import Runner, RunnerOptions, check_runtime, open_bundle_graph
from coprs_deploy.engines.trt.runner import TrtRunner
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export.equivalence import (
    END_TO_END,
    TOLERANCES,
    compare_stages,
    reference_opener,
)
from coprs_deploy.export.graph_check import (
    measure_dropped_padding,
    open_unverified,
    verified_record,
)
from coprs_deploy.export.samples import draw_bundle_samples
from coprs_deploy.specs import IMAGE_ENCODER


def verify_bundle(
    bundle_path: str | Path,
    checkpoint_path: str | Path,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda step: None,
    *,
    runtime: str | None = None,
    allow_engine_host_code: bool = False,
) -> tuple[EquivalenceRecord, ...]:
    """Compare a bundle's graphs with PyTorch again, on inputs of another seed than export's.

    Engines that pass on a GPU are marked as verified on it in the manifest; where one fails, no
    mark stays.

    Args:
        bundle_path: a bundle.
        checkpoint_path: the checkpoint that it was exported from.
        device: where the graphs run; PyTorch runs on the CPU in float32.
        progress: called with the name of each step as it starts.
        runtime: which runtime runs the graphs; None takes the one that they were exported for.
        allow_engine_host_code: whether version-compatible engines, which carry code, may be loaded.

    Returns:
        A record for each graph and one for the chain, passed or not; of an encoder that drops
        the padding also one of what that changes, not judged.

    Raises:
        BundleIntegrityError: a file of the bundle was changed.
        EquivalenceError: the bundle was exported from another checkpoint.
        ValueError: the runtime cannot run these graphs.
        EngineMismatchError: an engine is not for this library and GPU, or carries code.
    """
    bundle = open_bundle(bundle_path)
    checkpoint = read_checkpoint(checkpoint_path)
    manifest = bundle.manifest
    if manifest.checkpoint_fingerprint != checkpoint.fingerprint():
        raise EquivalenceError(
            f"{bundle_path} was exported from another checkpoint "
            f"({manifest.checkpoint_fingerprint[:12]}) than {checkpoint_path} "
            f"({checkpoint.fingerprint()[:12]}): export it again, or name the right checkpoint"
        )
    graphs = manifest.graphs
    if runtime is not None:
        check_runtime(graphs[IMAGE_ENCODER], runtime)
    read_back: dict[str, EngineRecord] = {}

    def candidate(name: str) -> Runner:
        graph = graphs[name]
        if graph.engine is None:
            return open_bundle_graph(bundle, name, RunnerOptions(device=device), runtime)
        options = RunnerOptions(device=device, allow_engine_host_code=allow_engine_host_code)
        runner = open_unverified(
            graph.runtime, bundle.graph_path(name), graph.spec, graph.engine, options
        )
        if isinstance(runner, TrtRunner):
            read_back[name] = verified_record(graph.engine, runner)
        return runner

    specs = {name: graph.spec for name, graph in graphs.items()}
    reference = reference_opener(checkpoint, specs)
    tolerances = TOLERANCES[
        runtime or graphs[IMAGE_ENCODER].runtime, graphs[IMAGE_ENCODER].precision
    ]
    pools_masks = tolerances[END_TO_END].pools_masks
    if pools_masks:
        progress("reference")
    samples, known = draw_bundle_samples(manifest, reference, pools_masks, seed=1)
    known = known or {}
    records = compare_stages(
        reference=reference,
        candidate=candidate,
        samples=samples,
        tolerances=tolerances,
        report=progress,
        known=known,
    )
    if specs[IMAGE_ENCODER].drops_padding:
        progress("dropped padding")
        records += (measure_dropped_padding(checkpoint, specs, samples, known[IMAGE_ENCODER]),)
    if read_back:
        passed = all(record.passed for record in records)
        marked = {
            name: engine if passed else msgspec.structs.replace(engine, verified_on=None)
            for name, engine in read_back.items()
        }
        verified = {
            name: msgspec.structs.replace(graph, engine=marked.get(name, graph.engine))
            for name, graph in graphs.items()
        }
        write_manifest(
            bundle.path,
            msgspec.structs.replace(
                manifest,
                graphs=verified,
                equivalence=records if passed else manifest.equivalence,
            ),
        )
    return records
