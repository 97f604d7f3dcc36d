"""Show a bundle at a glance: graphs, policy, toolchain, and how equal it was measured to be.

Every file is checked against its hash. Exit code 1 when one was changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.cli.parser import add_json_flag, print_json
from coprs_deploy.cli.tables import equivalence_table
from coprs_deploy.console import table
from coprs_deploy.specs import IMAGE_ENCODER

SUMMARY = "show what a bundle holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="the engine cache to show, as in export (default: COPRS_DEPLOY_CACHE, or the user's)",
    )
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check and show."""
    from coprs_deploy.bundle import open_bundle

    bundle = open_bundle(arguments.bundle)
    manifest = bundle.manifest
    if arguments.json:
        print_json(manifest.to_json())
        return 0
    sizes = {file.path: file.size_bytes for file in manifest.files}
    rows = []
    for name, graph in manifest.graphs.items():
        stored = sum(size for path, size in sizes.items() if path.startswith(graph.file))
        shapes = [
            f"{t.name} ({', '.join(map(str, t.shape))})"
            for t in (*graph.spec.inputs, *graph.spec.outputs)
        ]
        rows.append((name, graph.runtime, graph.precision, f"{stored / 1e6:,.1f} MB"))
        rows.extend((f"  {shape}", "", "", "") for shape in shapes)
    engines = [
        f"{name}: {engine_line(graph.engine)}"
        for name, graph in manifest.graphs.items()
        if graph.engine
    ]
    policy_bytes = sum(file.size_bytes for file in manifest.policy.files)
    geometry = manifest.geometry
    print(f"{bundle.path}: every file is as it was written")
    if manifest.checkpoint_note:
        print(f"note: {manifest.checkpoint_note}")
    print(
        f"checkpoint {manifest.checkpoint_fingerprint[:12]}, "
        f"written by version {manifest.package_version}"
    )
    print(f"image {geometry.image_size} px, prior and mask {geometry.mask_size} cells")
    if (valid_region := manifest.graphs[IMAGE_ENCODER].spec.valid_region) is not None:
        dropped = (
            " alone: padding is dropped, see without_padding" if valid_region.drops_padding else ""
        )
        print(f"for {valid_region}{dropped}")
    print()
    print(table(("graph", "runtime", "precision", "size"), rows))
    if engines:
        print("\n" + "\n".join(engines))
    if engines or arguments.cache:
        print(cache_line(arguments.cache))
    print(
        f"\npolicy: {bundle.policy_path}, {policy_bytes / 1e6:,.1f} MB, "
        f"width {manifest.policy.hidden_size}, "
        f"{manifest.policy.min_pixels:,} to {manifest.policy.max_pixels:,} pixels\n"
    )
    print(equivalence_table(manifest.equivalence))
    print("\n" + ", ".join(f"{name} {version}" for name, version in manifest.toolchain.items()))
    return 0


def engine_line(engine: EngineRecord) -> str:
    """Say what an engine runs on, and whether it ever did."""
    where = "every GPU from sm_80 on" if engine.hardware_compatible else ""
    seen = f"verified on {engine.verified_on}" if engine.verified_on else "never verified on a GPU"
    code = ", carries code (version-compatible)" if engine.version_compatible else ""
    return (
        f"{engine.variant} {engine.version} for "
        f"{where or ', '.join(engine.compute_capabilities)}, "
        f"built in {engine.build_seconds:.1f} s, {seen}{code}"
    )


def cache_line(root: Path | None = None) -> str:
    """Say where engines that were built before are kept, how many, and what else is kept there."""
    from coprs_deploy.engines.cache import BuildCache
    from coprs_deploy.engines.trt.cache import TIMING_CACHE_FOLDER
    from coprs_deploy.engines.trt.engine import RUNTIME_CACHE_FOLDER

    cache = BuildCache(root)
    lines = [
        f"engine cache: {cache.root}, {len(cache.entries())} engines, "
        f"{cache.size_bytes() / 1e6:,.1f} MB"
    ]
    for folder, title in (
        (TIMING_CACHE_FOLDER, "timings of kernels"),
        (RUNTIME_CACHE_FOLDER, "kernels compiled on a GPU"),
    ):
        for blob in cache.blobs(folder):
            lines.append(f"  {title}: {blob.name}, {blob.stat().st_size / 1e6:,.1f} MB")
    return "\n".join(lines)
