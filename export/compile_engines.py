"""Compile the engines of a checkpoint for a list of devices, one bundle per device profile.

    python export/compile_engines.py --checkpoint CHECKPOINT --devices rtx --out BUNDLES

Profiles are in ``devices.toml``. Those of tensorrt-rtx compile on any machine, without a GPU; those
of tensorrt only on the device itself. Each bundle is checked like one of ``coprs-deploy export``.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from coprs_deploy import CoPRSError
from coprs_deploy.console import StepPrinter, table
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.engines.trt.build import BuildCallbacks
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.errors import RuntimeUnavailableError
from coprs_deploy.export import ExportOptions, ExportReport, export_checkpoint
from coprs_deploy.specs import OptimizationProfile, Record

PROFILES = Path(__file__).with_name("devices.toml")


class DeviceProfile(Record, frozen=True):
    """One device or family of devices.

    Attributes:
        description: name of the devices, for people.
        variant: ``tensorrt`` or ``tensorrt-rtx``.
        compute_capabilities: GPUs that the engines run on, such as ``sm_89``.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        targets: number of targets per call.
        images: number of images per image encoder call.
    """

    description: str
    variant: str
    compute_capabilities: tuple[str, ...]
    precision: str
    targets: OptimizationProfile = OptimizationProfile()
    images: OptimizationProfile = OptimizationProfile()

    def __post_init__(self) -> None:
        if self.variant not in TRT_VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; accepted: {', '.join(TRT_VARIANTS)}")
        if not self.compute_capabilities:
            raise ValueError("compute_capabilities is empty; accepted: such as ['sm_89']")

    @property
    def builds_anywhere(self) -> bool:
        """Whether the engines can be built on another machine than the device."""
        return TRT_VARIANTS[self.variant].builds_without_gpu


def read_profiles(path: Path) -> dict[str, DeviceProfile]:
    """Read device profiles by name.

    Raises:
        ValueError: the file is not TOML, or a profile has an unknown or wrong field.
    """
    with path.open("rb") as file:
        profiles = tomllib.load(file)
    try:
        return {name: DeviceProfile.from_json(profile) for name, profile in profiles.items()}
    except msgspec.ValidationError as error:
        raise ValueError(f"{path} is not valid: {error}") from error


def choose_profiles(
    profiles: Mapping[str, DeviceProfile], names: str | None
) -> dict[str, DeviceProfile]:
    """Select profiles by a comma-separated list; None selects all that build anywhere.

    Raises:
        ValueError: a name is unknown.
    """
    if names is None:
        return {name: profile for name, profile in profiles.items() if profile.builds_anywhere}
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in profiles]
    if unknown or not chosen:
        raise ValueError(f"devices is {names!r}; accepted: {', '.join(profiles)}")
    return {name: profiles[name] for name in chosen}


def check_device(profile: DeviceProfile) -> None:
    """Refuse to build engines of tensorrt on another machine than the device.

    Raises:
        RuntimeUnavailableError: this machine has no GPU, or another one.
    """
    if profile.builds_anywhere:
        return
    gpu = current_gpu()
    if gpu is None or gpu.compute_capability not in profile.compute_capabilities:
        found = "no GPU" if gpu is None else f"{gpu.name} ({gpu.compute_capability})"
        raise RuntimeUnavailableError(
            f"must be compiled on the device itself ({', '.join(profile.compute_capabilities)}), "
            f"and this machine has {found}: run this command there"
        )


def compile_device(
    name: str, profile: DeviceProfile, arguments: argparse.Namespace, progress: StepPrinter
) -> ExportReport:
    """Export the bundle of one device profile to ``OUT/NAME``."""
    check_device(profile)
    options = ExportOptions(
        runtime=profile.variant,
        precision=profile.precision,
        targets=profile.targets,
        images=profile.images,
        external_policy=arguments.external_policy,
        overwrite=arguments.overwrite,
        compute_capabilities=profile.compute_capabilities if profile.builds_anywhere else (),
        cache_dir=arguments.cache_dir,
        calibration_images=arguments.calibration if profile.precision == "int8" else None,
    )
    return export_checkpoint(
        arguments.checkpoint,
        arguments.out / name,
        options,
        lambda step: progress(f"{name}: {step}"),
        BuildCallbacks(on_note=progress.note, on_progress=progress.progress),
    )


def result_row(name: str, profile: DeviceProfile, report: ExportReport | None) -> list[str]:
    """Format one device for the table; None stands for a failed one."""
    row = [name, ", ".join(profile.compute_capabilities), profile.precision]
    if report is None:
        return [*row, "", "", "", "FAILED"]
    engines = [graph.engine for graph in report.bundle.manifest.graphs.values() if graph.engine]
    end_to_end = next(r for r in report.bundle.manifest.equivalence if r.graph == "end_to_end")
    return [
        *row,
        f"{sum(engine.size_bytes for engine in engines) / 1e6:,.1f} MB",
        f"{sum(engine.build_seconds for engine in engines):.1f} s",
        f"{end_to_end.relative_error:.1e}",
        "verified here" if all(engine.verified_on for engine in engines) else "not verified",
    ]


HEADER = ("device", "GPUs", "precision", "engines", "build", "relative error", "status")


def build_parser(profiles: Mapping[str, DeviceProfile]) -> argparse.ArgumentParser:
    """Build the parser; its help lists the device profiles."""
    lines = (f"  {name:<12} {profile.description}" for name, profile in profiles.items())
    parser = argparse.ArgumentParser(
        description="Compile the engines of a checkpoint for a list of devices.",
        epilog="device profiles:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="one bundle each")
    parser.add_argument(
        "--devices",
        metavar="NAME,NAME",
        help="device profiles to compile (default: all that compile without their GPU)",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="images for profiles with int8"
    )
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="engine cache directory")
    parser.add_argument(
        "--external-policy",
        action="store_true",
        help="refer to the policy by a relative path instead of copying it into each bundle",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing bundles")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all chosen devices; exit code 1 if one failed, 2 for wrong use."""
    profiles = read_profiles(PROFILES)
    parser = build_parser(profiles)
    parsed = parser.parse_args(arguments)
    try:
        chosen = choose_profiles(profiles, parsed.devices)
    except ValueError as error:
        parser.error(str(error))
    rows, errors = [], []
    for name, profile in chosen.items():
        report = None
        try:
            with StepPrinter() as progress:
                report = compile_device(name, profile, parsed, progress)
        except (CoPRSError, ValueError) as error:
            errors.append(f"{name}: {error}")
        rows.append(result_row(name, profile, report))
    print(table(HEADER, rows))
    for line in errors:
        print(line, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
