"""Settings of the vLLM engine, under vLLM's own names, and its share of the device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec
import psutil

from coprs_deploy.errors import RuntimeUnavailableError, check_number, check_type
from coprs_deploy.policy.torch_settings import require_device

GIB = 1 << 30

GPU_RESERVE = 0.05
"""Share of the GPU memory that is left free for what the graphs allocate while they run."""

MAX_CPU_SHARE = 0.5
"""Maximum share of the available host memory for keys and values on a CPU."""

MIN_CPU_KV_BYTES = 64 << 20
"""Minimum memory for keys and values on a CPU, if the host has it available."""


_VALUES = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class VllmSettings:
    """Settings of the vLLM engine; None leaves a value to :func:`memory_arguments` or to vLLM.

    Attributes:
        max_num_seqs: maximum number of requests that are decoded together.
        max_num_batched_tokens: tokens of one engine step; longer prompts are split over steps.
        enable_prefix_caching: whether keys and values are kept, so that a second request for the
            same image skips its prefill.
        mm_processor_cache_gb: cache for preprocessed images, in GiB; 0 disables it.
        gpu_memory_utilization: share of the total GPU memory; None takes what is free.
        kv_cache_memory_bytes: memory for keys and values; None takes the rest of the share on a
            GPU, and the need of ``max_num_seqs`` requests of maximum length on a CPU.
        block_size: tokens per cache block; None takes 32 on a CPU and vLLM's default on a GPU.
        tensor_parallel_size: number of devices that share the weights.
        enforce_eager: whether ``torch.compile`` and CUDA graphs are disabled; None disables them
            on a CPU only.
        num_threads: CPU threads of the engine's worker; None takes that of the runtime, or leaves
            one core to the engine's loop.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    mm_processor_cache_gb: float = 1.0
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    block_size: int | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        minimums = {
            "max_num_seqs": 1,
            "max_num_batched_tokens": 1,
            "mm_processor_cache_gb": 0,
            "kv_cache_memory_bytes": 1,
            "block_size": 1,
            "tensor_parallel_size": 1,
            "num_threads": 1,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, least=minimum, is_whole=name != "mm_processor_cache_gb")
        share = self.gpu_memory_utilization
        if share is not None:
            check_number("gpu_memory_utilization", share, above=0, most=1, is_whole=False)
        check_type("enable_prefix_caching", self.enable_prefix_caching, bool)
        check_type("enforce_eager", self.enforce_eager, bool, type(None))

    def engine_arguments(self, device_type: str) -> dict[str, Any]:
        """Return vLLM's engine arguments, except for those of :func:`memory_arguments`."""
        on_cpu = device_type == "cpu"
        arguments: dict[str, Any] = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "enable_prefix_caching": self.enable_prefix_caching,
            "enable_chunked_prefill": True,
            "mm_processor_cache_gb": self.mm_processor_cache_gb,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": on_cpu if self.enforce_eager is None else self.enforce_eager,
        }
        block_size = self.block_size or (32 if on_cpu else None)
        return arguments if block_size is None else {**arguments, "block_size": block_size}


def read_settings(assignments: Sequence[str]) -> VllmSettings:
    """Read settings from a command line, each given as ``name=value``.

    Raises:
        ValueError: a setting is unknown, or its value is not accepted.
    """
    types = get_type_hints(VllmSettings)
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in types:
            raise ValueError(
                f"the vLLM setting {assignment!r} is unknown; accepted: name=value with "
                f"{', '.join(types)}"
            )
        try:
            values[name] = msgspec.json.decode(text, type=types[name])
        except ValueError as error:
            (kind, *_) = get_args(types[name]) or (types[name],)
            raise ValueError(f"{name} is {text!r}; accepted: {_VALUES[kind]}") from error
    return VllmSettings(**values)


class DeviceMemory(NamedTuple):
    """Available and physical memory of a device, in bytes."""

    free: int
    total: int


def device_memory(device: str) -> DeviceMemory:
    """Return the current memory of ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        RuntimeUnavailableError: torch finds no such GPU.
    """
    if device == "cpu":
        memory = psutil.virtual_memory()
        return DeviceMemory(memory.available, memory.total)
    import torch

    require_device(device)
    return DeviceMemory(*torch.cuda.mem_get_info(torch.device(device)))


def memory_arguments(
    settings: VllmSettings, device_type: str, memory: DeviceMemory, needed_kv_bytes: int
) -> dict[str, Any]:
    """Return vLLM's memory arguments, computed from what the graphs leave free.

    Args:
        settings: settings of the engine.
        device_type: ``cpu`` or ``cuda``.
        memory: memory of the device, measured with the graphs loaded and warmed up.
        needed_kv_bytes: keys and values of ``max_num_seqs`` requests of maximum length.

    Returns:
        ``gpu_memory_utilization`` or ``kv_cache_memory_bytes``, or both.

    Raises:
        RuntimeUnavailableError: too little memory is free.
    """
    arguments: dict[str, Any] = {}
    if settings.kv_cache_memory_bytes is not None:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_memory_bytes
    if device_type == "cpu":
        most = int(MAX_CPU_SHARE * memory.free)
        needed = max(needed_kv_bytes, MIN_CPU_KV_BYTES)
        arguments.setdefault("kv_cache_memory_bytes", min(needed, most))
        return arguments
    share = settings.gpu_memory_utilization
    if share is None:
        # vLLM refuses to start if its share of the GPU exceeds the free share.
        share = round(memory.free / memory.total - GPU_RESERVE, 3)
    if share <= 0:
        raise RuntimeUnavailableError(
            f"{memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB are free on the policy's "
            "GPU, too little for the policy; use a smaller policy, another policy device, or fewer "
            "cached images"
        )
    return {**arguments, "gpu_memory_utilization": share}


def kv_bytes_per_token(text_config: Any, bytes_per_value: int) -> int:
    """Return the size of the keys and values of one token in all layers, in bytes."""
    heads = text_config.num_attention_heads
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return int(2 * text_config.num_hidden_layers * kv_heads * head_size * bytes_per_value)
