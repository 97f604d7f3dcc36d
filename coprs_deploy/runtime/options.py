"""Options of the runtime as one frozen record."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import NoneType
from typing import TypedDict

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
        prompt_lookup_num_tokens: length of the drafts that a policy in OpenVINO or transformers
            copies from prompt and response and checks in one pass; 0 for none.
        static_decoding: compile the decoding step of a policy in transformers, on a KV cache of
            fixed size; takes some 30 seconds at the first request.
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
    prompt_lookup_num_tokens: int = 0
    static_decoding: bool = False

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
        for name in ("max_cached_images", "max_queue_size", "prompt_lookup_num_tokens"):
            check_number(name, getattr(self, name), least=0)
        if self.prompt_lookup_num_tokens and self.policy == "vllm":
            raise ValueError(
                "prompt_lookup_num_tokens is set and policy is 'vllm'; vLLM's model runner refuses "
                "custom logits processors under speculative decoding, and one captures the hidden "
                "states: leave it out, or use another policy"
            )
        check_type("static_decoding", self.static_decoding, bool)
        if self.static_decoding and self.policy != "transformers":
            raise ValueError(
                f"static_decoding is True and policy is {self.policy!r}; accepted: static_decoding "
                "with policy 'transformers' only, the other libraries compile by themselves"
            )
        if self.timeout_s is not None:
            most = int(threading.TIMEOUT_MAX)
            check_number("timeout_s", self.timeout_s, above=0, most=most, is_whole=False)

    @property
    def is_on_cpu(self) -> bool:
        """Whether graphs and policy run on the CPU."""
        devices = (self.device_type, self.policy_device or "cpu")
        return all(device == "cpu" for device in devices) and self.policy != "vllm"


REASONING = ("full", "none")


class RequestLimits(TypedDict, total=False):
    """Limits of the reasoning as keyword arguments; :class:`RequestOptions` describes them."""

    max_reasoning_tokens: int | None
    deadline_ms: float | None
    reasoning: str


@dataclass(frozen=True)
class RequestOptions:
    """Options of one request.

    With a limit of the reasoning there always is a mask: where the reasoning ends, the policy reads
    the text up to ``<REF_POS>`` instead of choosing it.

    Attributes:
        max_targets: maximum number of targets.
        max_new_tokens: token budget of the response; None selects the checkpoint's.
        max_reasoning_tokens: tokens of the reasoning after which the answer is forced; None for no
            limit.
        deadline_ms: time in milliseconds from the arrival of the request, in which the reasoning
            ends so early that the mask is ready; None for none.
        reasoning: ``full``, or ``none`` for a mask after reading the prompt only.
    """

    max_targets: int = 1
    max_new_tokens: int | None = None
    max_reasoning_tokens: int | None = None
    deadline_ms: float | None = None
    reasoning: str = "full"

    def __post_init__(self) -> None:
        check_number("max_targets", self.max_targets, least=1)
        for name in ("max_new_tokens", "max_reasoning_tokens"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), least=1)
        if self.deadline_ms is not None:
            most = int(1e3 * threading.TIMEOUT_MAX)
            check_number("deadline_ms", self.deadline_ms, above=0, most=most, is_whole=False)
        if self.reasoning not in REASONING:
            raise ValueError(f"reasoning is {self.reasoning!r}; accepted: {', '.join(REASONING)}")
        if self.reasoning == "none" and self.max_reasoning_tokens is not None:
            raise ValueError(
                f"reasoning is 'none' and max_reasoning_tokens is {self.max_reasoning_tokens}; "
                "accepted: one of the two"
            )

    @property
    def reasoning_budget(self) -> int | None:
        """Number of tokens that the reasoning may have; None for no limit."""
        return 0 if self.reasoning == "none" else self.max_reasoning_tokens

    @property
    def is_limited(self) -> bool:
        """Whether the reasoning has a limit."""
        return self.reasoning_budget is not None or self.deadline_ms is not None
