"""The settings of the runtime, one frozen record."""

from __future__ import annotations

from dataclasses import dataclass, field

from coprs_deploy.policy.vllm_settings import VllmSettings


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and how a bundle runs.

    Attributes:
        device: where the graphs run: ``cpu``, ``cuda`` or ``cuda:N``.
        policy: which library decodes the policy: ``transformers`` or ``vllm``.
        policy_device: where the policy runs; None takes ``device``.
        policy_dtype: dtype of its weights (``float32``, ``bfloat16``); None keeps the stored one.
        num_threads: CPU threads of one graph operator; None leaves it to the runtime.
        cached_images: how many image embeddings are kept for further questions; 0 keeps none.
        allow_plan_code: whether version-compatible engine plans, which carry code, may be loaded.
        runtime: which runtime runs the graphs: ``onnxruntime``, ``openvino``, or ``auto``, which
            takes for each graph the one that is measured as the fastest here; None takes the one
            that the bundle was exported for.
        remeasure: whether ``auto`` measures again what it remembers.
        inference_precision: what float32 products are computed in: ``fp32``, or ``bf16``, which
            OpenVINO does on processors that have such units.
        cuda_graphs: whether an engine's work is recorded once and launched whole.
        max_waiting: how many answers may wait beyond those that the policy decodes together.
        timeout_s: seconds within which an answer must be ready; None waits for ever.
        vllm: settings of the engine when ``policy`` is ``vllm``.
    """

    device: str = "cpu"
    policy: str = "transformers"
    policy_device: str | None = None
    policy_dtype: str | None = None
    num_threads: int | None = None
    cached_images: int = 8
    allow_plan_code: bool = False
    runtime: str | None = None
    remeasure: bool = False
    inference_precision: str = "fp32"
    cuda_graphs: bool = True
    max_waiting: int = 256
    timeout_s: float | None = None
    vllm: VllmSettings = field(default_factory=VllmSettings)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; accepted: {', '.join(POLICIES)}")
        if self.remeasure and self.runtime != AUTO:
            raise ValueError(
                f"remeasure is for the runtime {AUTO}, and the runtime is {self.runtime!r}"
            )
        if self.cached_images < 0:
            raise ValueError(f"cached_images is {self.cached_images}; it must be at least 0")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting is {self.max_waiting}; it must be at least 0")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be above 0")


POLICIES = ("transformers", "vllm")

AUTO = "auto"
"""The runtime that stands for the fastest one."""
