"""Upload of a bundle to the Hugging Face hub, with a model card made from its manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from coprs_deploy.bundle import (
    MANIFEST_FILE,
    POLICY_DIRECTORY,
    Bundle,
    Manifest,
    manifest_json,
    open_bundle,
)
from coprs_deploy.errors import check_type
from coprs_deploy.hub import HubLocation, check_known_files, upload

CARD_FILE = "README.md"


def push_bundle(
    bundle: str | Path,
    location: str,
    *,
    card: str | None = None,
    license_id: str = "",
    private: bool | None = None,
    message: str = "Upload of a bundle",
) -> str:
    """Upload a bundle in one commit, after checking its files against the manifest.

    A policy outside the bundle is uploaded as part of it, so that the upload is complete.

    Args:
        bundle: bundle directory.
        location: ``hf://org/name``, or ``hf://org/name@branch``; both are created if missing.
        card: text of the model card. None takes README.md of the bundle; without one, a card is
            made from the manifest, unless the repository has a card.
        license_id: license in the metadata of a card that is made, as the hub names it.
        private: visibility of a new repository; None takes the default of the account.
        message: message of the commit.

    Returns:
        URL of the commit.

    Raises:
        ValueError: the location has another form, or names a commit.
        BundleError: the bundle is missing or invalid; BundleIntegrityError: a file was changed.
        HubError: access is refused, a file is of an unknown kind, or the hub cannot be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    check_type("location", location, str)
    target = HubLocation.parse(location)
    opened = open_bundle(bundle)
    manifest = _self_contained(opened.manifest)
    content = json.dumps(manifest_json(manifest), indent=2, ensure_ascii=False) + "\n"
    files: dict[str, Path | bytes] = {MANIFEST_FILE: content.encode()}
    files |= {file.path: opened.path / file.path for file in manifest.files}
    if manifest.policy.path is not None:
        for file in manifest.policy.files:
            files[f"{POLICY_DIRECTORY}/{file.path}"] = opened.policy_path / file.path
    check_known_files(list(files), str(opened.path))
    own = opened.path / CARD_FILE
    default_files = {}
    if card is not None:
        files[CARD_FILE] = card.encode()
    elif own.is_file():
        files[CARD_FILE] = own
    else:
        made = model_card(Bundle(opened.path, manifest), target, license_id)
        default_files[CARD_FILE] = made.encode()
    return upload(target, files, message=message, private=private, default_files=default_files)


def _self_contained(manifest: Manifest) -> Manifest:
    """Return the manifest with an external policy as one inside the bundle."""
    if not manifest.policy.is_external:
        return manifest
    policy = msgspec.structs.replace(manifest.policy, path=POLICY_DIRECTORY)
    return msgspec.structs.replace(manifest, policy=policy)


def model_card(bundle: Bundle, location: HubLocation, license_id: str = "") -> str:
    """Return a model card in Markdown, with the metadata that the hub reads.

    Args:
        bundle: the bundle; everything in the card comes from its manifest.
        location: where it is uploaded.
        license_id: license as the hub names it, such as ``apache-2.0``; empty for none.
    """
    manifest = bundle.manifest
    runtimes = sorted({graph.runtime for graph in manifest.graphs.values()})
    metadata = ["library_name: coprs-deploy", "pipeline_tag: image-segmentation"]
    metadata += [f"license: {license_id}"] if license_id else []
    metadata += ["tags:", "- reasoning-segmentation", "- coprs"]
    metadata += [f"- {runtime}" for runtime in runtimes]
    lines = ["---", *metadata, "---", "", f"# {location.repository.partition('/')[2]}", ""]
    lines += [
        "CoPRS reasoning segmentation: an image and an instruction in, reasoning and masks out."
    ]
    if manifest.checkpoint_note:
        lines += ["", f"**Note: {manifest.checkpoint_note}.**"]
    lines += ["", "## Use", "", *_usage(location)]
    lines += ["", "## Graphs", "", *_graph_lines(manifest)]
    lines += ["", "## Policy", "", *_policy_lines(manifest)]
    lines += ["", "## Difference from PyTorch in float32", "", *_equivalence_lines(manifest)]
    lines += ["", "## Origin", "", *_origin_lines(manifest)]
    return "\n".join(lines) + "\n"


def _usage(location: HubLocation) -> list[str]:
    return [
        "```bash",
        f'coprs-deploy segment photo.jpg "the red cup" --bundle {location} --out result',
        "```",
        "",
        "```python",
        "from coprs_deploy import CoPRS",
        "",
        f'with CoPRS.load("{location}") as coprs:',
        '    result = coprs.segment("photo.jpg", "the red cup")',
        "```",
    ]


def _graph_lines(manifest: Manifest) -> list[str]:
    sizes = {file.path: file.size_bytes for file in manifest.files}
    rows = []
    for name, graph in manifest.graphs.items():
        stored = sum(size for path, size in sizes.items() if path.startswith(graph.file))
        engine = graph.engine
        gpus = "any" if engine is None else ", ".join(engine.compute_capabilities)
        rows.append((name, graph.runtime, graph.precision, f"{stored / 1e6:,.1f} MB", gpus))
    encoder = f"Image encoder: {manifest.image_encoder}, " if manifest.image_encoder else ""
    size = f"{encoder}images of {manifest.geometry.image_size} pixels."
    return [
        *_table(("graph", "runtime", "precision", "size", "machine"), rows),
        "",
        size[0].upper() + size[1:],
    ]


def _policy_lines(manifest: Manifest) -> list[str]:
    policy, graphs = manifest.policy, manifest.policy_graphs
    lines = [f"- Hidden size {policy.hidden_size}"]
    if policy.path is not None:
        stored = sum(file.size_bytes for file in policy.files)
        lines.append(f"- Weights for transformers and vLLM: {stored / 1e6:,.1f} MB")
    if policy.quantization is not None:
        lines.append(f"- Quantized: {policy.quantization}")
    if graphs is not None:
        lines.append(f"- Graphs for {graphs.runtime}, {graphs.precision}: {graphs.equivalence}")
        if graphs.compression is not None:
            lines.append(f"- Compression of the graphs: {graphs.compression}")
    return lines


def _equivalence_lines(manifest: Manifest) -> list[str]:
    rows = [
        (
            record.graph,
            f"{record.max_abs_error:.1e}",
            f"{record.relative_error:.1e}",
            f"{record.cosine:.8f}",
            "-" if record.mask_iou is None else f"{record.mask_iou:.5f}",
            str(record.inputs),
        )
        for record in manifest.equivalence
    ]
    if not rows:
        return ["It was not measured."]
    names = ("graph", "max abs error", "relative error", "cosine", "mask IoU", "inputs")
    return _table(names, rows)


def _origin_lines(manifest: Manifest) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.toolchain.items())
    return [
        f"- Checkpoint: `{manifest.checkpoint_fingerprint}`",
        f"- Exported by coprs-deploy {manifest.package_version}"
        + (f" with {versions}" if versions else "")
        + (f" on {manifest.gpu}" if manifest.gpu else ""),
    ]


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
