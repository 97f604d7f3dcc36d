"""What is checked before a plan is deserialized, and the command that mends what does not fit."""

from __future__ import annotations

import hashlib
from pathlib import Path

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cuda_device import Gpu
from coprs_deploy.engines.flavors import FLAVORS, known_capabilities
from coprs_deploy.engines.runner import RunnerOptions
from coprs_deploy.errors import BundleError, BundleIntegrityError, EngineMismatchError


def check_loadable(
    name: str, engine: EngineRecord, version: str, gpu: Gpu, options: RunnerOptions
) -> None:
    """Refuse an engine that was not built for this library and this GPU.

    Raises:
        EngineMismatchError: says what was found, what is needed and what mends it.
    """
    title = FLAVORS[engine.flavor].title
    if engine.version_compatible and not options.allow_plan_code:
        raise EngineMismatchError(
            f"{name} is a version-compatible plan, which carries code that would run here; if you "
            "trust where the bundle comes from, allow it with --allow-plan-code (in Python: "
            "RuntimeOptions(allow_plan_code=True))"
        )
    if not _fits_version(engine, version):
        raise EngineMismatchError(
            f"{name} was built by {title} {engine.version}, and {version} is installed. Install "
            f"that version, or build again: {_command(engine)}"
        )
    here = gpu.compute_capability
    reaches = engine.hardware_compatible and int(here[3:]) >= 80
    if here not in engine.compute_capabilities and not reaches:
        raise EngineMismatchError(
            f"{name} was built for {', '.join(engine.compute_capabilities)}, and this GPU "
            f"({gpu.name}) is {here}. Build it for this GPU: {_command(engine, here)}"
        )


def _fits_version(engine: EngineRecord, version: str) -> bool:
    if version == engine.version:
        return True
    built, here = (_numbers(text) for text in (engine.version, version))
    return engine.version_compatible and built[:1] == here[:1] and here >= built


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _command(engine: EngineRecord, gpu: str | None = None) -> str:
    """Name the command that builds an engine again, for another GPU too if one is given.

    A plan does not know its precision and its range of targets; the manifest does.
    """
    flavor, runtime = FLAVORS[engine.flavor], engine.flavor
    words = []
    if flavor.builds_without_gpu:
        if gpu is not None and gpu not in known_capabilities(flavor.load()):
            runtime = "tensorrt"  # the other flavor, on the GPU itself
        else:
            gpus = [*engine.compute_capabilities, *([gpu] if gpu else [])]
            words.append(f"--gpu {','.join(gpus)}")
    if engine.workspace_bytes is not None:
        words.append(f"--workspace {engine.workspace_bytes / 2**30:g}")
    if engine.version_compatible:
        words.append("--version-compatible")
    if engine.hardware_compatible:
        words.append("--hardware-compatible")
    named = " ".join([f"--runtime {runtime}", "--precision PRECISION", *words, "--overwrite"])
    return (
        f"`coprs-deploy export CHECKPOINT --out BUNDLE {named}`, with the precision and --targets "
        "that `coprs-deploy inspect BUNDLE` shows"
    )


def remedy(engine: EngineRecord) -> str:
    """Say how to build an engine again."""
    return f"Build it again: {_command(engine)}"


def read_plan(path: Path, engine: EngineRecord) -> bytes:
    """Read a plan and check the bytes that will be deserialized against the hash.

    Raises:
        BundleIntegrityError: they are not those that were built.
    """
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}. {remedy(engine)}") from error
    if len(plan) != engine.size_bytes:
        raise BundleIntegrityError(
            f"{path} has {len(plan)} bytes, not {engine.size_bytes}: it was cut short or changed. "
            f"{remedy(engine)}"
        )
    if hashlib.sha256(plan).hexdigest() != engine.sha256:
        raise BundleIntegrityError(f"{path} was changed (SHA-256 differs). {remedy(engine)}")
    return plan
