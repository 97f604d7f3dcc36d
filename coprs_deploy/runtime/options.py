"""The settings of the runtime, one frozen record."""

from __future__ import annotations

from dataclasses import dataclass, field

from coprs_deploy.policy.vllm_policy.settings import VllmSettings


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and how a bundle runs.

    Attributes:
        device: where the graphs run: ``cpu``, ``cuda`` or ``cuda:N``.
        policy: which library decodes the policy: ``transformers`` or ``vllm``.
        policy_device: where the policy runs; None takes ``device``.
        policy_dtype: dtype of its weights (``float32``, ``bfloat16``); None keeps the stored one.
        num_threads: CPU threads of one graph operator; None leaves it to the runtime.
        max_cached_images: how many image embeddings are kept for further questions; 0 keeps none.
        allow_engine_host_code: whether version-compatible engine plans, which carry code, may be loaded.
        runtime: which runtime runs the graphs: ``onnxruntime``, ``openvino``, or ``auto``, which
            takes for each graph the one that is measured as the fastest here; None takes the one
            that the bundle was exported for.
        retune: whether ``auto`` measures again what it remembers.
        inference_precision: what float32 products are computed in: ``fp32``, or ``bf16``, which
            OpenVINO does on processors that have such units.
        cuda_graphs: whether an engine's work is recorded once and launched whole.
        max_queue_size: how many answers may wait beyond those that the policy decodes together.
        timeout_s: seconds within which an answer must be ready; None waits for ever.
        vllm: settings of the engine when ``policy`` is ``vllm``.
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
    max_queue_size: int = 256
    timeout_s: float | None = None
    vllm: VllmSettings = field(default_factory=VllmSettings)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; accepted: {', '.join(POLICIES)}")
        if self.retune and self.runtime != AUTO:
            raise ValueError(
                f"retune is for the runtime {AUTO}, and the runtime is {self.runtime!r}"
            )
        if self.max_cached_images < 0:
            raise ValueError(
                f"max_cached_images is {self.max_cached_images}; it must be at least 0"
            )
        if self.max_queue_size < 0:
            raise ValueError(f"max_queue_size is {self.max_queue_size}; it must be at least 0")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be above 0")


POLICIES = ("transformers", "vllm")

AUTO = "auto"
"""The runtime that stands for the fastest one."""
