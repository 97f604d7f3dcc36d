"""Options of the runtime as one frozen record."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import NoneType

from coprs_deploy.engines.runner import RunnerOptions, check_device
from coprs_deploy.errors import check_number, check_type
from coprs_deploy.policy.policy_dtype import DTYPES
from coprs_deploy.policy.vllm_policy.settings import VllmSettings

AUTO = "auto"
"""Name that selects the fastest runtime of each graph by measurement, and the policy's library."""

POLICIES = ("auto", "openvino", "transformers", "vllm")


@dataclass(frozen=True)
class RuntimeOptions(RunnerOptions):
    """Where and how a bundle runs; the options of :class:`RunnerOptions` apply to its graphs.

    Attributes:
        runtime: runtime of the graphs: ``onnxruntime``, ``openvino``, or ``auto``, which measures
            the fastest one for each graph; None selects the one that the bundle was exported for,
            or, if it is not installed, the other of the two.
        num_threads: CPU threads per operator of graphs and policy; None selects one for a small
            policy, and each library's own number for the rest.
        retune: with ``auto``, measure again instead of using the cached choice.
        policy: library that runs the policy: ``openvino``, ``transformers``, ``vllm``, or ``auto``:
            OpenVINO or transformers, whichever is measured to be faster where both can run it.
        policy_device: device of the policy; None selects that of the graphs.
        policy_dtype: dtype of the policy's weights: ``float32``, ``bfloat16`` or ``float16``; None
            selects the stored one, or float32 on a CPU that has no instructions for it.
        vllm: settings of the vLLM engine, used if ``policy`` is ``vllm``.
        max_cached_images: number of image embeddings kept for further requests; 0 disables the
            cache.
        max_queue_size: number of requests that may wait behind those that the policy serves at
            once.
        timeout_s: time limit of a request in seconds; None for no limit.
    """

    runtime: str | None = None
    retune: bool = False
    policy: str = AUTO
    policy_device: str | None = None
    policy_dtype: str | None = None
    vllm: VllmSettings = field(default_factory=VllmSettings)
    max_cached_images: int = 8
    max_queue_size: int = 256
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("runtime", self.runtime, str, NoneType)
        check_type("retune", self.retune, bool)
        check_type("vllm", self.vllm, VllmSettings)
        if self.policy_device is not None:
            check_device("policy_device", self.policy_device)
        if self.policy_dtype not in (None, *DTYPES):
            raise ValueError(
                f"policy_dtype is {self.policy_dtype!r}; accepted: {', '.join(DTYPES)}"
            )
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; accepted: {', '.join(POLICIES)}")
        if self.retune and AUTO not in (self.runtime, self.policy):
            raise ValueError(
                f"retune is True, runtime is {self.runtime!r} and policy is {self.policy!r}; "
                f"accepted: retune with the runtime or the policy {AUTO!r} only"
            )
        for name in ("max_cached_images", "max_queue_size"):
            check_number(name, getattr(self, name), least=0)
        if self.timeout_s is not None:
            most = int(threading.TIMEOUT_MAX)
            check_number("timeout_s", self.timeout_s, above=0, most=most, is_whole=False)
