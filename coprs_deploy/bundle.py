"""Bundle directory: what export writes and the runtime reads.

    manifest.json     graphs, file hashes, prompt, policy, versions, measured equivalence
    *.onnx (*.data)   the three graphs; or *.engine: TensorRT engines without any header
    policy/           the policy, unless the manifest refers to an external one

Opening a bundle checks every file against the manifest before anything else reads it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from coprs_deploy.artifacts import FileRecord, hash_file, write_json
from coprs_deploy.errors import BundleError, BundleIntegrityError
from coprs_deploy.hub import local_bundle
from coprs_deploy.prompts import PromptTemplate
from coprs_deploy.specs import GRAPH_NAMES, Geometry, GraphSpec, Record

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1

POLICY_DIRECTORY = "policy"
POLICY_GRAPHS_DIRECTORY = "policy_openvino"
ENGINE_SUFFIX = ".engine"

TRT_VARIANT_NAMES = ("tensorrt", "tensorrt-rtx")


class EngineRecord(Record, frozen=True):
    """Metadata of a TensorRT engine; the engine file itself has no header.

    Attributes:
        variant: ``tensorrt`` or ``tensorrt-rtx``.
        version: version of the library that built it; only this version loads it, unless it is
            ``version_compatible``.
        compute_capabilities: GPUs that can run it, such as ``sm_89``.
        gpu: name of the GPU that built it; None if built without a GPU.
        hardware_compatible: whether every GPU from sm_80 on can run it.
        version_compatible: whether later versions load it; such an engine carries host code.
        workspace_bytes: scratch memory limit in bytes; None for the library's default.
        graph_sha256: SHA-256 of the ONNX graph, external weights included.
        sha256: SHA-256 of the engine file.
        size_bytes: size of the engine file.
        build_seconds: wall time of the build.
        network_layers: layers of the parsed network, before fusion.
        layers: fused layers, one line each; None if no GPU has read them back.
        device_memory_bytes: scratch memory of one execution context; None likewise.
        verified_on: name of the GPU on which it was compared with PyTorch; None if it never ran.
    """

    variant: str
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    hardware_compatible: bool
    version_compatible: bool
    workspace_bytes: int | None
    graph_sha256: str
    sha256: str
    size_bytes: int
    build_seconds: float
    network_layers: int
    layers: tuple[str, ...] | None = None
    device_memory_bytes: int | None = None
    verified_on: str | None = None

    def __post_init__(self) -> None:
        if self.variant not in TRT_VARIANT_NAMES:
            raise ValueError(
                f"variant is {self.variant!r}; accepted: {', '.join(TRT_VARIANT_NAMES)}"
            )


class CalibrationRecord(Record, frozen=True):
    """Images that an int8 graph was calibrated and checked on.

    Attributes:
        num_images: number of calibration images.
        num_held_out: number of other images that the graph was checked on.
        sha256: hash over the contents of the calibration images.
    """

    num_images: int
    num_held_out: int
    sha256: str


class GraphRecord(Record, frozen=True):
    """One exported graph.

    Attributes:
        spec: inputs and outputs.
        runtime: runtime that it was exported for, as in ``--runtime``.
        precision: precision of weights and matrix products: ``fp32``, ``bf16``, ``fp16`` or
            ``int8`` (the large matrix products only).
        file: path below the bundle; external weights have the same name with ``.data``.
        engine: metadata of an engine; None for an ONNX graph.
        calibration: calibration images of an int8 graph; None for any other.
    """

    spec: GraphSpec
    runtime: str
    precision: str
    file: str
    engine: EngineRecord | None = None
    calibration: CalibrationRecord | None = None


class PolicyEquivalence(Record, frozen=True):
    """Difference between a policy's graphs, or its quantized weights, and PyTorch in float32.

    Attributes:
        relative_error: largest absolute difference of a hidden state at ``<REF_POS>``, over the
            largest absolute value of the reference.
        mean_error: mean signed difference on the same scale.
        cosine: smallest cosine similarity of two such states.
        token_agreement: share of the tokens that were written and PyTorch would have written.
        mask_iou: cIoU of the masks that PyTorch decodes from both.
        inputs: number of instructions.
        tokens: number of tokens compared.
        passed: whether every value is within the tolerance.
    """

    relative_error: float
    mean_error: float
    cosine: float
    token_agreement: float
    mask_iou: float
    inputs: int
    tokens: int
    passed: bool

    def __str__(self) -> str:
        """Return the values in one line."""
        return (
            f"{self.token_agreement:.1%} of {self.tokens} tokens equal, hidden state cosine "
            f"{self.cosine:.6f}, relative error {self.relative_error:.1e}, mask IoU "
            f"{self.mask_iou:.4f}{'' if self.passed else ' (outside the tolerance)'}"
        )


class PolicyCalibration(Record, frozen=True):
    """Examples that the weights of a policy's decoder were fitted to.

    Attributes:
        source: name of the example file, or ``synthetic:PRESET``.
        num_samples: number of examples used.
        num_held_out: number of other examples of the source that the result was checked on.
        sha256: hash over images and instructions of the examples used.
    """

    source: str
    num_samples: int
    num_held_out: int
    sha256: str


class PolicyQuantization(Record, frozen=True):
    """Quantization of the weights of a policy's decoder in the compressed-tensors format.

    Attributes:
        scheme: ``w4a16``, ``w8a8`` or ``fp8``.
        group_size: weights that share one scale; None for a whole row.
        tool: library and version that quantized them.
        calibration: examples of the calibration and of the check; ``fp8`` is only checked.
        equivalence: measured difference from the float policy.
    """

    scheme: str
    group_size: int | None
    tool: str
    calibration: PolicyCalibration
    equivalence: PolicyEquivalence

    def __str__(self) -> str:
        """Return scheme, tool and measured difference in one line."""
        return f"{self.scheme} by {self.tool}; {self.equivalence}"


class PolicyRecord(Record, frozen=True):
    """Policy of a bundle.

    Attributes:
        path: ``policy`` inside the bundle; for an external policy an absolute path, or one that
            is relative to the bundle and starts with ``..``; None if there are only graphs.
        prompt: prompt template.
        hidden_size: D, the policy's hidden size.
        min_pixels: smallest image area in pixels that the policy processes.
        max_pixels: largest image area in pixels.
        files: files of the policy with paths below ``path``.
        quantization: how its weights were quantized; None if they were not.
    """

    path: str | None
    prompt: PromptTemplate
    hidden_size: int
    min_pixels: int
    max_pixels: int
    files: tuple[FileRecord, ...]
    quantization: PolicyQuantization | None = None

    @property
    def is_external(self) -> bool:
        """Whether the policy lies outside the bundle."""
        path = PurePosixPath(self.path or "")
        return path.is_absolute() or path.parts[:1] == ("..",)


class PolicyCompression(Record, frozen=True):
    """Compression of the weights of a policy's decoder.

    Vision tower, first layer of the decoder and output head are int8 in any mode.

    Attributes:
        mode: ``int8_sym`` or ``int4_sym``.
        group_size: weights that share one scale; None for a whole row.
        method: rounding: ``nearest``, without data, or ``gptq``.
        calibration: examples of ``gptq``; None without data.
    """

    mode: str
    group_size: int | None
    method: str
    calibration: PolicyCalibration | None = None

    def __str__(self) -> str:
        """Return the compression in one line."""
        groups = f"groups of {self.group_size}" if self.group_size else "one scale per row"
        data = self.calibration
        source = f" on {data.num_samples} examples of {data.source}" if data else ""
        return f"{self.mode}, {groups}, {self.method}{source}"


class PolicyGraphsRecord(Record, frozen=True):
    """Policy of a bundle as graphs that run without PyTorch.

    Attributes:
        runtime: runtime of the graphs: ``openvino``.
        precision: precision of the weights: ``fp32``, ``bf16``, ``int8`` or ``int4``.
        equivalence: measured difference from PyTorch.
        compression: compression of the weights; None for ``fp32`` and ``bf16``.
    """

    runtime: str
    precision: str
    equivalence: PolicyEquivalence
    compression: PolicyCompression | None = None


class EquivalenceRecord(Record, frozen=True):
    """Difference between one graph and PyTorch in float32, worst case over all inputs.

    Attributes:
        graph: graph name; ``end_to_end`` for all three in a row; ``without_padding`` for the
            effect of an encoder that drops the padding.
        max_abs_error: largest absolute difference.
        relative_error: ``max_abs_error`` over the largest absolute value of the reference.
        mean_error: mean signed difference over the same scale; shows a one-sided shift.
        cosine: cosine similarity of the two outputs.
        mask_iou: IoU of the two masks; None if the output is not a mask.
        inputs: number of inputs compared.
        passed: whether every value is within the tolerance.
        has_tolerance: whether there is a tolerance; without one, ``passed`` only means that all
            values are finite.
    """

    graph: str
    max_abs_error: float
    relative_error: float
    mean_error: float
    cosine: float
    mask_iou: float | None
    inputs: int
    passed: bool
    has_tolerance: bool = True


class Manifest(Record, frozen=True):
    """Contents and provenance of a bundle.

    Attributes:
        schema_version: version of this format.
        package_version: version of this package that wrote it.
        checkpoint_fingerprint: hash over the contents of the exported checkpoint.
        checkpoint_note: remark from the checkpoint's provenance, or an empty string.
        geometry: sizes and pixel normalization.
        graphs: the three graphs by name.
        policy: the policy.
        files: graph files with size and hash.
        toolchain: package versions at export.
        gpu: name of the GPU that built the engines; None without engines or GPU.
        equivalence: measured difference from PyTorch.
        policy_graphs: the policy as graphs; None if there are none.
        image_encoder: name of the image encoder, such as ``SAM ViT-H``.
    """

    schema_version: int
    package_version: str
    checkpoint_fingerprint: str
    checkpoint_note: str
    geometry: Geometry
    graphs: dict[str, GraphRecord]
    policy: PolicyRecord
    files: tuple[FileRecord, ...]
    toolchain: dict[str, str]
    gpu: str | None
    equivalence: tuple[EquivalenceRecord, ...]
    policy_graphs: PolicyGraphsRecord | None = None
    image_encoder: str = ""


@dataclass(frozen=True)
class Bundle:
    """Opened bundle whose files have been checked."""

    path: Path
    manifest: Manifest

    def graph_path(self, name: str) -> Path:
        """Return the path of a graph's file."""
        return self.path / self.manifest.graphs[name].file

    @property
    def policy_path(self) -> Path:
        """Path of the policy's transformers directory.

        Raises:
            BundleError: the bundle has the policy's graphs only.
        """
        path = self.manifest.policy.path
        if path is None:
            raise BundleError(
                f"{self.path} has its policy as OpenVINO graphs only: pass --policy openvino, or "
                "export it with --policy-runtime both"
            )
        return self.path / path  # an absolute path replaces the rest

    @property
    def policy_graphs_path(self) -> Path:
        """Path of the policy's graphs.

        Raises:
            BundleError: the bundle has none.
        """
        if self.manifest.policy_graphs is None:
            raise BundleError(
                f"{self.path} has no graphs of its policy: pass --policy transformers, or export "
                "it with --policy-runtime openvino"
            )
        return self.path / POLICY_GRAPHS_DIRECTORY


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a bundle, with a hash of itself."""
    write_json(directory / MANIFEST_FILE, manifest_json(manifest))


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """Return the content of a manifest's file: the manifest, and a hash of itself."""
    data = manifest.to_json()
    return {**data, "sha256": hash_manifest(data)}


def hash_manifest(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, whatever its order and layout."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a bundle without touching its other files.

    Raises:
        BundleError: the manifest is missing, not valid, or has another schema version.
        BundleIntegrityError: it was changed.
        HubError: it is on the hub and cannot be downloaded.
    """
    file = local_bundle(path) / MANIFEST_FILE
    export = f"coprs-deploy export CHECKPOINT --out {shlex.quote(str(path))}"
    if not file.is_file():
        raise BundleError(
            f"there is no bundle at {path} (no {MANIFEST_FILE}); `{export}` makes one"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"schema_version is {version!r} in {file}; accepted: {SCHEMA_VERSION}; export the "
                f"checkpoint again: `{export} --overwrite`"
            )
        sha256 = data.pop("sha256", None)
        manifest = Manifest.from_json(data)
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{file} is not valid: {error}; export the checkpoint again") from error
    _check_manifest(file, manifest)
    if sha256 != hash_manifest(data):
        raise BundleIntegrityError(
            f"{file} was changed (SHA-256 differs). Export the checkpoint again"
        )
    return manifest


def _check_manifest(file: Path, manifest: Manifest) -> None:
    listed = {record.path for record in manifest.files}
    for name in GRAPH_NAMES:
        graph = manifest.graphs.get(name)
        if graph is None:
            raise BundleError(f"{file} lists no graph {name!r}; export the checkpoint again")
        if graph.spec.name != name or graph.file not in listed:
            raise BundleError(
                f"{file} describes graph {name!r} as {graph.spec.name!r} in {graph.file!r}, which "
                "is not one of its files; export the checkpoint again"
            )
    policy = manifest.policy
    if policy.path is None:
        if manifest.policy_graphs is None:
            raise BundleError(f"{file} lists no policy; export the checkpoint again")
    elif not policy.is_external and policy.path != POLICY_DIRECTORY:
        raise BundleError(
            f"{file} has its policy in {policy.path!r}; accepted: {POLICY_DIRECTORY!r}, a path "
            "that starts with '..', or an absolute path"
        )


def open_bundle(path: str | Path) -> Bundle:
    """Read the manifest and check every file of the bundle against it.

    Args:
        path: directory, or location on the hub; see :func:`coprs_deploy.hub.local_bundle`.

    Raises:
        BundleError: there is no valid manifest.
        BundleIntegrityError: a file is missing, truncated, changed, or not listed.
        HubError: it is on the hub and cannot be downloaded.
    """
    root = local_bundle(path)
    manifest = read_manifest(root)
    policy = manifest.policy
    inside = {MANIFEST_FILE}
    if policy.path is not None and not policy.is_external:
        inside.add(policy.path)
    _check_files(root, manifest.files, others=inside)
    if policy.path is not None:
        _check_files(root / policy.path, policy.files)
    return Bundle(root, manifest)


def _check_files(root: Path, files: tuple[FileRecord, ...], others: Collection[str] = ()) -> None:
    """Check a directory against its list of files.

    A link to a file is followed, as in a model cache: the content is what is hashed. Hidden entries
    and a README, which a model hub adds, are never opened and may be there. ``others`` are
    top-level entries that the list does not cover.
    """
    listed = {file.path for file in files}
    unsafe = [p for p in listed if PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts]
    if unsafe:
        raise BundleIntegrityError(f"the manifest lists {unsafe[0]!r}, which leaves {root}")
    if not root.is_dir():
        raise BundleIntegrityError(f"{root} is missing; export the checkpoint again")
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if parts[0].startswith(".") or parts[0] in {"README.md", *others}:
            continue
        if path.is_symlink() and not path.is_file():
            raise BundleIntegrityError(
                f"{path} is a link, but not to a file; a bundle contains files and links to files"
            )
        if path.is_file() and "/".join(parts) not in listed:
            raise BundleIntegrityError(f"{path} is not a file of this bundle: remove it")

    def check(file: FileRecord) -> str | None:
        path = root / file.path
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != file.size_bytes:
            return f"{path} has {size} bytes, not {file.size_bytes}: it was truncated or changed"
        return None if hash_file(path) == file.sha256 else f"{path} was changed (SHA-256 differs)"

    with ThreadPoolExecutor() as pool:
        problems = [problem for problem in pool.map(check, files) if problem]
    if problems:
        raise BundleIntegrityError("; ".join(problems) + ". Export the checkpoint again")
