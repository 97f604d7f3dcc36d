"""The settings of the runtime, one frozen record."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and how a bundle runs.

    Attributes:
        device: where the graphs run: ``cpu``, ``cuda`` or ``cuda:N``.
        policy: which library decodes the policy: ``transformers``.
        policy_device: where the policy runs; None takes ``device``.
        policy_dtype: dtype of its weights (``float32``, ``bfloat16``); None keeps the stored one.
        num_threads: CPU threads of one graph operator; None leaves it to the runtime.
        cached_images: how many image embeddings are kept for further questions; 0 keeps none.
        allow_plan_code: whether version-compatible engine plans, which carry code, may be loaded.
    """

    device: str = "cpu"
    policy: str = "transformers"
    policy_device: str | None = None
    policy_dtype: str | None = None
    num_threads: int | None = None
    cached_images: int = 8
    allow_plan_code: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; accepted: {', '.join(POLICIES)}")
        if self.cached_images < 0:
            raise ValueError(f"cached_images is {self.cached_images}; it must be at least 0")


POLICIES = ("transformers",)
