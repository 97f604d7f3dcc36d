"""How a checkpoint is exported, and what does not fit together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coprs_deploy.bundle import TRT_VARIANT_NAMES
from coprs_deploy.engines.trt.build import BuildSettings
from coprs_deploy.export.equivalence import TOLERANCES
from coprs_deploy.export.precision import INT8, check_precision
from coprs_deploy.specs import OptimizationProfile


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        runtime: which runtime shall run the graphs.
        precision: of weights and products.
        targets: how many concentrations one call takes.
        images: how many images the encoder takes in one call, from 1.
        aspect_ratio: width and height of the ratio that all pictures are at least as long as, as in
            (16, 9): what is padding in all of them is not computed where that changes nothing.
        drop_padding: whether it is not computed at all, which is faster and another function.
        copy_policy: whether the policy is copied into the bundle; else it is referred to, from
            the bundle, so that both may move together.
        overwrite: whether a bundle that stands there may be replaced.
        gpus: compute capabilities that engines are built for; empty takes the GPU of this machine.
        workspace_bytes: limit of an engine's scratch memory; None leaves it to TensorRT.
        version_compatible: whether later versions of TensorRT shall load the engines.
        hardware_compatible: whether every GPU from sm_80 on shall run the engines.
        cache_limit_bytes: most bytes that this folder shall hold afterwards; None keeps all.
        cache: folder of engines and calibrations that were made before; None takes the user's.
        calibration: folder of pictures that int8 is calibrated on.
    """

    runtime: str = "onnxruntime"
    precision: str = "fp32"
    targets: OptimizationProfile = field(default_factory=OptimizationProfile)
    images: OptimizationProfile = field(default_factory=OptimizationProfile)
    aspect_ratio: tuple[int, int] | None = None
    drop_padding: bool = False
    copy_policy: bool = True
    overwrite: bool = False
    gpus: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    cache_limit_bytes: int | None = None
    cache: Path | None = None
    calibration: Path | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if (self.runtime, self.precision) == ("onnxruntime", "bf16"):
            raise ValueError(
                "precision is 'bf16', whose operators ONNX Runtime's CPU provider does not have; "
                "accepted for onnxruntime: fp32, fp16, int8; bf16 is for openvino, tensorrt and "
                "tensorrt-rtx"
            )
        if (self.runtime, self.precision) not in TOLERANCES:
            known = ", ".join(f"{runtime} {precision}" for runtime, precision in TOLERANCES)
            raise ValueError(
                f"runtime and precision are {self.runtime} {self.precision}; accepted: {known}"
            )
        if self.images.min != 1:
            raise ValueError(
                f"images starts at {self.images.min}; accepted: 1, or 1,opt,max, for a "
                "picture that comes alone must not wait for others"
            )
        if self.drop_padding and self.aspect_ratio is None:
            raise ValueError(
                "drop_padding leaves out what is padding in every picture, and no aspect says what "
                "that is; accepted: --aspect W:H --drop-padding"
            )
        if self.aspect_ratio is not None and min(self.aspect_ratio) < 1:
            raise ValueError(
                f"aspect is {self.aspect_ratio}; accepted: two numbers from 1, as (16, 9)"
            )
        if (self.precision == INT8) != (self.calibration is not None):
            raise ValueError(
                "int8 is calibrated on pictures of the kind that the model will see: pass "
                "--calibration DIR with --precision int8, and with no other"
            )
        build = (
            self.workspace_bytes,
            self.version_compatible,
            self.hardware_compatible,
            self.gpus,
            self.cache_limit_bytes,
        )
        if self.runtime in TRT_VARIANT_NAMES:
            self.build_settings()  # refuses what does not fit together
        elif any(build):
            raise ValueError(
                "--gpu, --workspace, --version-compatible, --hardware-compatible and "
                f"--cache-limit are for engines, and the runtime is {self.runtime}; accepted: "
                f"{', '.join(TRT_VARIANT_NAMES)}"
            )

    def build_settings(self) -> BuildSettings:
        """Say how the engines are built."""
        return BuildSettings(
            variant=self.runtime,
            compute_capabilities=self.gpus,
            workspace_bytes=self.workspace_bytes,
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
        )
