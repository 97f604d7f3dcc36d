"""Options of an export, and the combinations that are accepted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coprs_deploy.bundle import TRT_VARIANT_NAMES
from coprs_deploy.engines.trt.build import BuildSettings
from coprs_deploy.export.precision import INT8, PRECISIONS
from coprs_deploy.export.tolerances import POLICY_TOLERANCES, TOLERANCES
from coprs_deploy.specs import OptimizationProfile

POLICY_RUNTIMES = ("transformers", "openvino", "both")

POLICY_PRECISION = "int8"
"""Default precision of the policy's graphs."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        runtime: runtime of the graphs: onnxruntime, openvino, tensorrt or tensorrt-rtx.
        precision: precision of weights and matrix products: fp32, bf16, fp16 or int8.
        targets: number of targets per call, fixed or an optimization profile.
        images: number of images per image encoder call, fixed or an optimization profile from 1.
        aspect_ratio: fixed aspect ratio (W, H) of all images: skip padding that they share, without
            changing the result; images may be more elongated than this.
        drop_padding: with a fixed aspect ratio: skip that padding in every block; about half the
            work for 16:9, but a different function whose masks have to be evaluated.
        policy_runtime: form of the policy in the bundle: transformers (its weights), openvino
            (graphs that run on a CPU without PyTorch), or both.
        policy_precision: precision of the policy's graphs: fp32 (as stored), bf16, int8 or int4.
        policy_calibration: example file, .parquet or .jsonl, to fit int4 weights of the policy to;
            8 or more typical examples, best 40.
        allow_inexact_policy: write the bundle although its policy's graphs are outside their
            tolerance, as random weights of real size are.
        external_policy: refer to the policy by a relative path instead of copying it.
        overwrite: replace an existing bundle.
        compute_capabilities: compute capabilities to build engines for, such as sm_89; empty for
            the GPU of this machine.
        workspace_bytes: scratch memory limit of an engine in bytes; None for TensorRT's default.
        version_compatible: build engines that later TensorRT versions load; they carry host code.
        hardware_compatible: build engines that every GPU from sm_80 on can run, somewhat slower.
        cache_dir: directory of the engine and calibration cache; None for the user's cache.
        max_cache_bytes: remove the least recently used engines from the cache down to this size;
            None for no limit.
        calibration_images: directory of images to calibrate int8 on, 32 to 128 typical ones.
    """

    runtime: str = "onnxruntime"
    precision: str = "fp32"
    targets: OptimizationProfile = field(default_factory=OptimizationProfile)
    images: OptimizationProfile = field(default_factory=OptimizationProfile)
    aspect_ratio: tuple[int, int] | None = None
    drop_padding: bool = False
    policy_runtime: str = "transformers"
    policy_precision: str = POLICY_PRECISION
    policy_calibration: Path | None = None
    allow_inexact_policy: bool = False
    external_policy: bool = False
    overwrite: bool = False
    compute_capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    cache_dir: Path | None = None
    max_cache_bytes: int | None = None
    calibration_images: Path | None = None

    def __post_init__(self) -> None:
        self._check_precision()
        self._check_padding()
        self._check_policy()
        if self.images.min != 1:
            raise ValueError(
                f"images starts at {self.images.min}; accepted: 1, or 1,opt,max, because a single "
                "image must never wait for a batch"
            )
        build_only = (
            self.workspace_bytes,
            self.version_compatible,
            self.hardware_compatible,
            self.compute_capabilities,
            self.max_cache_bytes,
        )
        if self.runtime in TRT_VARIANT_NAMES:
            self.build_settings()  # checks the combination
        elif any(build_only):
            raise ValueError(
                "--compute-capabilities, --workspace, --version-compatible, --hardware-compatible "
                f"and --max-cache-size apply to engines, and the runtime is {self.runtime}; "
                f"accepted: {', '.join(TRT_VARIANT_NAMES)}"
            )

    def _check_precision(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; accepted: {', '.join(PRECISIONS)}")
        if (self.runtime, self.precision) == ("onnxruntime", "bf16"):
            raise ValueError(
                "precision is 'bf16', which ONNX Runtime's CPU provider does not implement; "
                "accepted for onnxruntime: fp32, fp16, int8; bf16 works with openvino, tensorrt "
                "and tensorrt-rtx"
            )
        if (self.runtime, self.precision) not in TOLERANCES:
            known = ", ".join(f"{runtime} {precision}" for runtime, precision in TOLERANCES)
            raise ValueError(
                f"runtime and precision are {self.runtime} {self.precision}; accepted: {known}"
            )
        if (self.precision == INT8) != (self.calibration_images is not None):
            raise ValueError(
                "int8 is calibrated on images of the kind that the model will see: pass "
                "--calibration DIR with --precision int8, and with no other precision"
            )

    def _check_policy(self) -> None:
        if self.policy_runtime not in POLICY_RUNTIMES:
            raise ValueError(
                f"policy_runtime is {self.policy_runtime!r}; accepted: {', '.join(POLICY_RUNTIMES)}"
            )
        if self.policy_precision not in POLICY_TOLERANCES:
            raise ValueError(
                f"policy_precision is {self.policy_precision!r}; accepted: "
                f"{', '.join(POLICY_TOLERANCES)}"
            )
        if self.policy_calibration is not None and (
            self.policy_runtime == "transformers" or self.policy_precision != "int4"
        ):
            raise ValueError(
                "policy_calibration fits int4 weights of the policy's graphs to examples, and "
                f"policy_runtime and policy_precision are {self.policy_runtime!r} and "
                f"{self.policy_precision!r}; accepted: --policy-calibration with --policy-runtime "
                "openvino or both and --policy-precision int4"
            )
        if self.policy_runtime == "transformers" and self.policy_precision != POLICY_PRECISION:
            raise ValueError(
                f"policy_precision is {self.policy_precision!r}, which applies to the policy's "
                "graphs, and policy_runtime is 'transformers', whose bundle has none; accepted: "
                "--policy-precision with --policy-runtime openvino or both"
            )
        if self.external_policy and self.policy_runtime == "openvino":
            raise ValueError(
                "external_policy refers to the weights, and policy_runtime is 'openvino', whose "
                "bundle has none; accepted: --policy-runtime both, or no --external-policy"
            )

    def _check_padding(self) -> None:
        if self.drop_padding and self.aspect_ratio is None:
            raise ValueError(
                "drop_padding skips the padding that all images share, and aspect_ratio is not "
                "set; accepted: --aspect-ratio W:H --drop-padding"
            )
        if self.aspect_ratio is not None and min(self.aspect_ratio) < 1:
            raise ValueError(
                f"aspect_ratio is {self.aspect_ratio}; accepted: two positive integers, such as "
                "(16, 9)"
            )

    def build_settings(self) -> BuildSettings:
        """Return the settings of the engine builder."""
        return BuildSettings(
            variant=self.runtime,
            compute_capabilities=self.compute_capabilities,
            workspace_bytes=self.workspace_bytes,
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
        )
