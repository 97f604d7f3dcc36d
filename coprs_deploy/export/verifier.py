"""The equivalence check of an existing bundle against the checkpoint that it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from coprs_deploy.bundle import EngineRecord, EquivalenceRecord, open_bundle, write_manifest
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.engines import Runner, RunnerOptions, check_runtime, open_bundle_graph
from coprs_deploy.engines.plan_execution import PlanRunner
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export.equivalence import (
    END_TO_END,
    TOLERANCES,
    compare_stages,
    reference_opener,
    sample_inputs,
)
from coprs_deploy.export.graph_check import open_unverified, verified_record
from coprs_deploy.export.mask_samples import draw_masked_samples
from coprs_deploy.specs import IMAGE_ENCODER, PRIOR


def verify_bundle(
    bundle_path: str | Path,
    checkpoint_path: str | Path,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda step: None,
    runtime: str | None = None,
) -> tuple[EquivalenceRecord, ...]:
    """Compare a bundle's graphs with PyTorch again, on inputs of another seed than export's.

    Engines that pass on a GPU are marked as verified on it in the manifest.

    Args:
        bundle_path: a bundle.
        checkpoint_path: the checkpoint that it was exported from.
        device: where the graphs run; PyTorch runs on the CPU in float32.
        progress: called with the name of each step as it starts.
        runtime: which runtime runs the graphs; None takes the one that they were exported for.

    Returns:
        A record for each graph and one for the chain, passed or not.

    Raises:
        BundleIntegrityError: a file of the bundle was changed.
        EquivalenceError: the bundle was exported from another checkpoint.
        ValueError: the runtime cannot run these graphs.
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
        runner = open_unverified(
            graph.runtime, bundle.graph_path(name), graph.spec, graph.engine, device
        )
        if isinstance(runner, PlanRunner):
            read_back[name] = verified_record(graph.engine, runner)
        return runner

    reference = reference_opener(checkpoint, {name: g.spec for name, g in graphs.items()})
    width, count = manifest.policy.width, graphs[PRIOR].spec.targets.preferred
    tolerances = TOLERANCES[
        runtime or graphs[IMAGE_ENCODER].runtime, graphs[IMAGE_ENCODER].precision
    ]
    samples, known = sample_inputs(manifest.geometry, width, count, seed=1), None
    if tolerances[END_TO_END].pools_masks:
        progress("reference")
        pictures = [sample.prepared for sample in samples]
        samples, known = draw_masked_samples(pictures, reference, width, count, seed=1)
    records = compare_stages(
        reference=reference,
        candidate=candidate,
        samples=samples,
        tolerances=tolerances,
        report=progress,
        known=known,
    )
    if read_back and all(record.passed for record in records):
        verified = {
            name: msgspec.structs.replace(graph, engine=read_back.get(name, graph.engine))
            for name, graph in graphs.items()
        }
        write_manifest(
            bundle.path,
            msgspec.structs.replace(manifest, graphs=verified, equivalence=records),
        )
    return records
