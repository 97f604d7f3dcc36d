"""Show a bundle: graphs, engines, policy, versions and measured equivalence.

Every file is checked against its hash. Exit code 1 if a file was changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from coprs_deploy.bundle import POLICY_GRAPHS_DIRECTORY, Bundle, EngineRecord, Manifest, open_bundle
from coprs_deploy.cli.parser import print_json
from coprs_deploy.cli.tables import equivalence_table
from coprs_deploy.console import table
from coprs_deploy.engines.trt.cache import TIMING_FOLDER, EngineCache
from coprs_deploy.engines.trt.engine import KERNEL_CACHE_FOLDER
from coprs_deploy.machine import describe_processor
from coprs_deploy.specs import IMAGE_ENCODER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="bundle directory")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="engine cache to show (default: $COPRS_DEPLOY_CACHE, or the user's cache folder)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check the bundle and print its contents."""
    bundle = open_bundle(arguments.bundle)
    if arguments.json:
        print_json(bundle.manifest.to_json())
    else:
        print(*_blocks(bundle, arguments.cache_dir), sep="\n")
    return 0


def _blocks(bundle: Bundle, cache_dir: Path | None) -> Iterator[str]:
    from coprs_deploy.policy.policy_dtype import cpu_dtype, stored_dtype

    manifest = bundle.manifest
    yield f"{bundle.path}: all files match their hashes"
    if manifest.checkpoint_note:
        yield f"note: {manifest.checkpoint_note}"
    yield (
        f"checkpoint {manifest.checkpoint_fingerprint[:12]}, "
        f"written by version {manifest.package_version}"
    )
    geometry = manifest.geometry
    yield f"image {geometry.image_size} px, prior and mask {geometry.mask_size} cells"
    if manifest.image_encoder:
        yield f"image encoder: {manifest.image_encoder}"
    valid_region = manifest.graphs[IMAGE_ENCODER].spec.valid_region
    if valid_region is not None:
        dropped = ": padding is dropped, see without_padding" if valid_region.drops_padding else ""
        yield f"for {valid_region}{dropped}"
    yield f"\n{_graph_table(manifest)}"
    engines = {name: graph.engine for name, graph in manifest.graphs.items() if graph.engine}
    if engines:
        yield ""
        yield from (f"{name}: {_engine_line(engine)}" for name, engine in engines.items())
    if engines or cache_dir:
        yield from _cache_lines(cache_dir)
    policy = manifest.policy
    yield (
        f"\npolicy: hidden size {policy.hidden_size}, "
        f"{policy.min_pixels:,} to {policy.max_pixels:,} pixels"
    )
    if policy.path is not None:
        stored = sum(file.size_bytes for file in policy.files)
        dtype = cpu_dtype(stored_dtype(bundle.policy_path), describe_processor())
        yield (f"  weights: {bundle.policy_path}, {stored / 1e6:,.1f} MB, on this CPU in {dtype}")
    if policy.quantization is not None:
        yield f"  quantized: {policy.quantization}"
    if manifest.policy_graphs is not None:
        stored = sum(
            file.size_bytes
            for file in manifest.files
            if file.path.startswith(f"{POLICY_GRAPHS_DIRECTORY}/")
        )
        yield (
            f"  graphs: {manifest.policy_graphs.runtime} {manifest.policy_graphs.precision}, "
            f"{stored / 1e6:,.1f} MB; {manifest.policy_graphs.equivalence}"
        )
        if manifest.policy_graphs.compression is not None:
            yield f"  compression: {manifest.policy_graphs.compression}"
    yield f"\n{equivalence_table(manifest.equivalence)}"
    yield "\n" + ", ".join(f"{name} {version}" for name, version in manifest.toolchain.items())


def _graph_table(manifest: Manifest) -> str:
    sizes = {file.path: file.size_bytes for file in manifest.files}
    rows = []
    for name, graph in manifest.graphs.items():
        stored = sum(size for path, size in sizes.items() if path.startswith(graph.file))
        rows.append((name, graph.runtime, graph.precision, f"{stored / 1e6:,.1f} MB"))
        for tensor in (*graph.spec.inputs, *graph.spec.outputs):
            shape = f"  {tensor.name} ({', '.join(map(str, tensor.shape))})"
            rows.append((shape, "", "", ""))
    return table(("graph", "runtime", "precision", "size"), rows)


def _engine_line(engine: EngineRecord) -> str:
    gpus = ", ".join(engine.compute_capabilities)
    if engine.hardware_compatible:
        gpus = "every GPU from sm_80 on"
    verified = (
        f"verified on {engine.verified_on}" if engine.verified_on else "never verified on a GPU"
    )
    code = ", carries host code (version-compatible)" if engine.version_compatible else ""
    return (
        f"{engine.variant} {engine.version} for {gpus}, "
        f"built in {engine.build_seconds:.1f} s, {verified}{code}"
    )


def _cache_lines(cache_dir: Path | None) -> Iterator[str]:
    cache = EngineCache(cache_dir)
    size = f"{cache.size_bytes() / 1e6:,.1f} MB"
    yield f"engine cache: {cache.root}, {len(cache.entries())} engines, {size}"
    titles = {TIMING_FOLDER: "kernel timings", KERNEL_CACHE_FOLDER: "kernels compiled on a GPU"}
    for folder, title in titles.items():
        for blob in cache.blobs(folder):
            yield f"  {title}: {blob.name}, {blob.stat().st_size / 1e6:,.1f} MB"
