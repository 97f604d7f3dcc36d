"""The bundle: what export writes and the runtime reads, a directory with a manifest.

    manifest.json     graphs, hashes of the files, prompt, policy, versions, measured equality
    *.onnx (*.data)   the three graphs, or *.engine: plans, which stay pure files
    policy/           the policy, unless the manifest refers to it elsewhere

Opening a bundle checks every file against the manifest before anything else opens it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from coprs_deploy.artifacts import FileRecord, hash_file, write_json
from coprs_deploy.errors import BundleError, BundleIntegrityError
from coprs_deploy.prompts import PromptTemplate
from coprs_deploy.specs import GRAPH_NAMES, Geometry, GraphSpec, Record

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1

POLICY_DIRECTORY = "policy"
ENGINE_SUFFIX = ".engine"
"""Ending of an engine's plan file."""


TRT_VARIANT_NAMES = ("tensorrt", "tensorrt-rtx")


class EngineRecord(Record, frozen=True):
    """What is known about an engine; its plan file holds nothing but the plan.

    Attributes:
        variant: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the library that built it; no other version loads it, but for plans that are
            ``version_compatible``.
        compute_capabilities: of the GPUs that it runs on, as in ``sm_89``.
        gpu: the GPU that it was built on; None where it was built without one.
        hardware_compatible: whether it runs on every GPU from sm_80 on.
        version_compatible: whether later versions load it; such a plan carries code.
        workspace_bytes: the limit of scratch memory that was set; None left it to the library.
        graph_sha256: hash of the ONNX graph that it was built from, external weights included.
        sha256: hash of the plan.
        size_bytes: size of the plan.
        build_seconds: wall time of the build.
        network_layers: layers of the parsed network, before fusion.
        layers: what the engine runs, one line a layer; None where no GPU could read it back.
        device_memory_bytes: scratch memory of one context; None likewise.
        verified_on: the GPU on which it was compared with PyTorch; None means that it never ran.
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
                f"flavor is {self.variant!r}; accepted: {', '.join(TRT_VARIANT_NAMES)}"
            )


class CalibrationRecord(Record, frozen=True):
    """What the ranges of an int8 graph were measured on.

    Attributes:
        pictures: how many.
        held_out: how many more the graph was checked on.
        sha256: names the pictures by their contents.
    """

    pictures: int
    held_out: int
    sha256: str


class GraphRecord(Record, frozen=True):
    """One exported graph.

    Attributes:
        spec: its inputs and outputs.
        runtime: the runtime that runs it, as in ``--runtime``.
        precision: of its weights and products: ``fp32``, ``bf16``, ``fp16``, or ``int8`` for its
            large products.
        file: path of the graph below the bundle; its external data stand beside it.
        engine: what is known about the engine; None for a graph that is no plan.
        calibration: what an int8 graph was calibrated on; None for any other.
    """

    spec: GraphSpec
    runtime: str
    precision: str
    file: str
    engine: EngineRecord | None = None
    calibration: CalibrationRecord | None = None


class PolicyRecord(Record, frozen=True):
    """The policy of a bundle.

    Attributes:
        path: ``policy`` inside the bundle, or where it stands outside: a path that starts with
            ``..``, from the bundle, or an absolute one.
        prompt: the prompt template.
        hidden_size: policy hidden size D.
        min_pixels: smallest image area that the policy sees.
        max_pixels: largest image area.
        files: the policy's files with paths below ``path``.
    """

    path: str
    prompt: PromptTemplate
    hidden_size: int
    min_pixels: int
    max_pixels: int
    files: tuple[FileRecord, ...]

    @property
    def is_external(self) -> bool:
        """Whether the policy stands outside the bundle."""
        path = PurePosixPath(self.path)
        return path.is_absolute() or path.parts[:1] == ("..",)


class EquivalenceRecord(Record, frozen=True):
    """How far one graph is from PyTorch in float32, the worst over all inputs.

    Attributes:
        graph: its name, ``end_to_end`` for the chain of all three, or ``without_padding`` for what
            an encoder that drops the padding changes.
        max_abs_error: largest absolute difference.
        relative_error: ``max_abs_error`` over the largest absolute value of the reference.
        mean_error: mean difference over that scale; a one-sided shift shows here.
        cosine: cosine between the two outputs.
        mask_iou: IoU of the two masks where the output is a mask, else None.
        inputs: how many inputs were compared.
        passed: whether all are inside the tolerance.
        has_tolerance: whether there is a tolerance; where there is none, ``passed`` says no more than that
            all values are finite.
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
    """What a bundle holds and how it came about."""

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


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked."""

    path: Path
    manifest: Manifest

    def graph_path(self, name: str) -> Path:
        """Path of a graph's file."""
        return self.path / self.manifest.graphs[name].file

    @property
    def policy_path(self) -> Path:
        """Path of the policy's transformers directory."""
        return self.path / self.manifest.policy.path  # an absolute path stands for itself


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a bundle."""
    write_json(directory / MANIFEST_FILE, manifest.to_json())


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a bundle without touching its other files.

    Raises:
        BundleError: there is none, it is not valid, or it is of another schema version.
    """
    file = Path(path) / MANIFEST_FILE
    if not file.is_file():
        raise BundleError(
            f"there is no bundle at {path} (no {MANIFEST_FILE}); "
            f"`coprs-deploy export CHECKPOINT --out {path}` makes one"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"schema_version is {version!r} in {file}; accepted: {SCHEMA_VERSION}; export the "
                f"checkpoint again: `coprs-deploy export CHECKPOINT --out {path} --overwrite`"
            )
        manifest = Manifest.from_json(data)
    except (ValueError, OSError) as error:
        raise BundleError(f"{file} is not valid: {error}; export the checkpoint again") from error
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
    if not policy.is_external and policy.path != POLICY_DIRECTORY:
        raise BundleError(
            f"{file} has its policy in {policy.path!r}; accepted: {POLICY_DIRECTORY!r}, a path "
            "that starts with '..', or an absolute path"
        )
    return manifest


def open_bundle(path: str | Path) -> Bundle:
    """Read the manifest and check every file of the bundle against it.

    Raises:
        BundleError: there is no valid manifest.
        BundleIntegrityError: a file is missing, cut short, changed, a link, or not of the bundle.
    """
    root = Path(path)
    manifest = read_manifest(root)
    policy = manifest.policy
    inside = {MANIFEST_FILE} if policy.is_external else {MANIFEST_FILE, policy.path}
    _check_files(root, manifest.files, others=inside)
    _check_files(root / policy.path, policy.files, may_link=policy.is_external)
    return Bundle(root, manifest)


def _check_files(
    root: Path,
    files: tuple[FileRecord, ...],
    others: Collection[str] = (),
    may_link: bool = False,
) -> None:
    """Check a directory against its list.

    Args:
        root: the directory.
        files: what it holds.
        others: entries that the list does not cover.
        may_link: whether links are followed, as a model cache outside the bundle has them.
    """
    listed = {file.path for file in files}
    unsafe = [p for p in listed if PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts]
    if unsafe:
        raise BundleIntegrityError(f"the manifest lists {unsafe[0]!r}, which leaves {root}")
    if not root.is_dir():
        raise BundleIntegrityError(f"{root} is missing; export the checkpoint again")
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() and not may_link:
            raise BundleIntegrityError(f"{path} is a link; a bundle holds plain files only")
        if path.is_file() and name not in listed and name.split("/")[0] not in others:
            raise BundleIntegrityError(f"{path} is not a file of this bundle: remove it")

    def check(file: FileRecord) -> str | None:
        path = root / file.path
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != file.size_bytes:
            return f"{path} has {size} bytes, not {file.size_bytes}: it was cut short or changed"
        return None if hash_file(path) == file.sha256 else f"{path} was changed (SHA-256 differs)"

    with ThreadPoolExecutor() as pool:
        problems = [problem for problem in pool.map(check, files) if problem]
    if problems:
        raise BundleIntegrityError("; ".join(problems) + ". Export the checkpoint again")
