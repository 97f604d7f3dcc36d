"""Equivalence check of an existing bundle against the checkpoint that it was exported from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from coprs_deploy.bundle import (
    Bundle,
    EngineRecord,
    EquivalenceRecord,
    PolicyEquivalence,
    open_bundle,
    write_manifest,
)
from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.engines import (
    ONNX_RUNTIMES,
    Runner,
    RunnerOptions,
    check_runtime,
    open_bundle_graph,
    require_runtime,
)
from coprs_deploy.errors import EquivalenceError, MissingDependencyError
from coprs_deploy.export.graph_check import GraphCheck, open_unverified
from coprs_deploy.export.tolerances import POLICY_TOLERANCES, TOLERANCES
from coprs_deploy.specs import IMAGE_ENCODER

SEED = 1
"""Seed of the samples, and, times their number, of the policy's scenes; export uses 0."""


def verify_bundle(
    bundle_path: str | Path | Bundle,
    checkpoint_path: str | Path | Checkpoint,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda step: None,
    *,
    runtime: str | None = None,
    allow_engine_host_code: bool = False,
) -> tuple[EquivalenceRecord, ...]:
    """Compare a bundle's graphs with PyTorch again, on other samples than export's.

    Engines that pass on a GPU are marked as verified on it in the manifest; if one fails, the
    marks are removed. A bundle that cannot be written is a warning.

    Args:
        bundle_path: bundle directory, or the opened bundle.
        checkpoint_path: checkpoint that the bundle was exported from, or the opened one.
        device: device of the graphs; PyTorch runs on the CPU in float32.
        progress: called with the name of each step as it starts.
        runtime: runtime of the graphs; None for the one that they were exported for.
        allow_engine_host_code: allow version-compatible engines, which carry host code.

    Returns:
        One record per graph and one for ``end_to_end``, passed or not; for an encoder that drops
        the padding also one for the effect of this, without a tolerance.

    Raises:
        BundleIntegrityError: a file of the bundle was changed.
        EquivalenceError: the bundle was exported from another checkpoint.
        ValueError: the runtime cannot run these graphs.
        RuntimeUnavailableError: it is not installed, or cannot use the device.
        EngineMismatchError: an engine does not fit the library or GPU, or carries host code.
    """
    bundle, checkpoint = _open(bundle_path, checkpoint_path)
    _check_fingerprint(bundle, checkpoint)
    encoder = bundle.manifest.graphs[IMAGE_ENCODER]
    used = runtime or encoder.runtime
    check_runtime(encoder, used)
    if used in ONNX_RUNTIMES:
        require_runtime(used)
    options = RunnerOptions(device=device, allow_engine_host_code=allow_engine_host_code)
    engines: dict[str, EngineRecord] = {}

    def candidate(name: str) -> Runner:
        graph = bundle.manifest.graphs[name]
        if graph.engine is None:
            return open_bundle_graph(bundle, name, options, used)
        runner, engines[name] = open_unverified(
            graph.runtime, bundle.graph_path(name), graph.spec, graph.engine, options
        )
        return runner

    check = verification(bundle, checkpoint, runtime, progress)
    records = check.compare(candidate)
    records += check.dropped_padding()
    if engines:
        _record_verification(bundle, engines, records)
    return records


def verify_policy_graphs(
    bundle_path: str | Path | Bundle,
    checkpoint_path: str | Path | Checkpoint,
    progress: Callable[[str], None] = lambda step: None,
) -> PolicyEquivalence | None:
    """Compare the policy's graphs of a bundle with PyTorch again, on other scenes than export's.

    Returns:
        Tokens, hidden states and masks, passed or not; None if the bundle has no such graphs, or,
        with a warning, if OpenVINO is not installed.

    Raises:
        BundleIntegrityError: a file of the bundle was changed.
        EquivalenceError: the graphs were exported from another checkpoint.
    """
    bundle, checkpoint = _open(bundle_path, checkpoint_path)
    record = bundle.manifest.policy_graphs
    if record is None:
        return None
    _check_fingerprint(bundle, checkpoint)
    from coprs_deploy.export.policy.check import NUM_SAMPLES, compare_policy

    try:
        return compare_policy(
            checkpoint,
            bundle.policy_graphs_path,
            POLICY_TOLERANCES[record.precision],
            progress,
            first_seed=SEED * NUM_SAMPLES,
        )
    except MissingDependencyError as error:
        warnings.warn(f"the policy's graphs were not compared: {error}", stacklevel=2)
        return None


def verification(
    bundle: Bundle, checkpoint: Checkpoint, runtime: str | None, progress: Callable[[str], None]
) -> GraphCheck:
    """Return the equivalence check of a bundle's graphs; None is the runtime of their export."""
    specs = {name: graph.spec for name, graph in bundle.manifest.graphs.items()}
    encoder = bundle.manifest.graphs[IMAGE_ENCODER]
    tolerances = TOLERANCES[runtime or encoder.runtime, encoder.precision]
    return GraphCheck(checkpoint, specs, tolerances, progress, seed=SEED)


def _open(
    bundle: str | Path | Bundle, checkpoint: str | Path | Checkpoint
) -> tuple[Bundle, Checkpoint]:
    """Open what is not open yet; opening a bundle reads all of its files."""
    return (
        bundle if isinstance(bundle, Bundle) else open_bundle(bundle),
        checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint),
    )


def _check_fingerprint(bundle: Bundle, checkpoint: Checkpoint) -> None:
    exported, found = bundle.manifest.checkpoint_fingerprint, checkpoint.fingerprint()
    if exported != found:
        raise EquivalenceError(
            f"{bundle.path} was exported from another checkpoint ({exported[:12]}) than "
            f"{checkpoint.path} ({found[:12]}): export it again, or name the right checkpoint"
        )


def _record_verification(
    bundle: Bundle, engines: Mapping[str, EngineRecord], records: tuple[EquivalenceRecord, ...]
) -> None:
    """Write the engines' records to the manifest; marked as verified only if all passed."""
    manifest = bundle.manifest
    passed = all(record.passed for record in records)
    graphs = dict(manifest.graphs)
    for name, engine in engines.items():
        verified_on = engine.verified_on if passed else None
        graphs[name] = msgspec.structs.replace(
            graphs[name], engine=msgspec.structs.replace(engine, verified_on=verified_on)
        )
    equivalence = records if passed else manifest.equivalence
    changed = msgspec.structs.replace(manifest, graphs=graphs, equivalence=equivalence)
    try:
        write_manifest(bundle.path, changed)
    except OSError as error:
        warnings.warn(
            f"{bundle.path} cannot be written ({error.strerror}): its engines keep their marks",
            stacklevel=3,
        )
