"""Options of the runtime as one frozen record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coprs_deploy.policy.vllm_policy.settings import VllmSettings

POLICIES = ("transformers", "vllm")

AUTO = "auto"
"""Runtime name that selects the fastest runtime of each graph by measurement."""


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and how a bundle runs.

    Attributes:
        device: device of the graphs: ``cpu``, ``cuda`` or ``cuda:N``.
        policy: library that runs the policy: ``transformers`` or ``vllm``.
        policy_device: device of the policy; None selects ``device``.
        policy_dtype: dtype of the policy's weights (``float32``, ``bfloat16``); None keeps the
            stored one.
        num_threads: CPU threads per graph operator; None leaves the choice to the runtime.
        max_cached_images: number of image embeddings kept for further requests; 0 disables the
            cache.
        allow_engine_host_code: load version-compatible engines, which contain host code.
        runtime: runtime of the graphs: ``onnxruntime``, ``openvino``, or ``auto``, which measures
            the fastest one for each graph; None selects the one that the bundle was exported for.
        retune: with ``auto``, measure again instead of using the cached choice.
        inference_precision: precision of float32 products: ``fp32``, or ``bf16`` with OpenVINO on
            processors that support it.
        cuda_graphs: capture the kernels of an engine as a CUDA graph.
        cache_dir: directory of compiled graphs and measured choices; None selects the user's.
        max_queue_size: number of requests that may wait behind those that the policy serves at
            once.
        timeout_s: time limit of a request in seconds; None disables it.
        vllm: settings of the vLLM engine, used if ``policy`` is ``vllm``.
    """

    device: str = "cpu"
    policy: str = "transformers"
    policy_device: str | None = None
    policy_dtype: str | None = None
    num_threads: int | None = None
    max_cached_images: int = 8
    allow_engine_host_code: bool = False
    runtime: str | None = None
    retune: bool = False
    inference_precision: str = "fp32"
    cuda_graphs: bool = True
    cache_dir: Path | None = None
    max_queue_size: int = 256
    timeout_s: float | None = None
    vllm: VllmSettings = field(default_factory=VllmSettings)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; accepted: {', '.join(POLICIES)}")
        if self.retune and self.runtime != AUTO:
            raise ValueError(
                f"retune is True and runtime is {self.runtime!r}; accepted: retune with the "
                f"runtime {AUTO!r} only"
            )
        if self.max_cached_images < 0:
            raise ValueError(
                f"max_cached_images is {self.max_cached_images}; it must be at least 0"
            )
        if self.max_queue_size < 0:
            raise ValueError(f"max_queue_size is {self.max_queue_size}; it must be at least 0")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be above 0")
