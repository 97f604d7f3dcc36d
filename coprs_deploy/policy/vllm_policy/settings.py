"""The settings of a vLLM engine, under vLLM's own names, and the memory that it may take."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coprs_deploy.errors import RuntimeUnavailableError
from coprs_deploy.machine import available_memory_bytes

GIB = 1 << 30

SPARE_SHARE = 0.05
"""Of a GPU's memory: left free for what the graphs allocate while they run."""

LARGEST_CPU_SHARE = 0.5
"""Of the host's free memory: the most that keys and values take on a CPU."""


@dataclass(frozen=True)
class VllmSettings:
    """How the engine is set up; None leaves a choice to :func:`memory_arguments` or to vLLM.

    Attributes:
        max_num_seqs: requests that are decoded together.
        max_num_batched_tokens: tokens of one engine step; a longer prompt is read in pieces.
        enable_prefix_caching: keep keys and values, so that a second question on a picture does not
            read it again.
        mm_processor_cache_gb: memory for prepared pictures; 0 keeps none.
        gpu_memory_utilization: share of the GPU's whole memory; None takes what is free.
        kv_cache_memory_bytes: memory of keys and values; None takes what is left of the share on a
            GPU, and what ``max_num_seqs`` longest answers need on a CPU.
        block_size: tokens of one cache block; None takes 32 on a CPU and vLLM's choice on a GPU.
        tensor_parallel_size: devices that share the weights.
        enforce_eager: no ``torch.compile`` and no CUDA graphs; None does without on a CPU only.
        num_threads: CPU threads of the engine's worker; None leaves one core to the engine's loop.
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
        least = {
            "max_num_seqs": 1,
            "max_num_batched_tokens": 1,
            "mm_processor_cache_gb": 0,
            "kv_cache_memory_bytes": 1,
            "block_size": 1,
            "tensor_parallel_size": 1,
            "num_threads": 1,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} is {value}; it must be at least {minimum}")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization is {share}; accepted: above 0, at most 1")

    def engine_arguments(self, device_type: str) -> dict[str, Any]:
        """The settings that do not depend on memory, as vLLM's engine arguments."""
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
    """Read settings as a command line gives them, each as ``name=value``.

    Raises:
        ValueError: names the setting, what was found and what is accepted.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        kind = _KINDS.get(name)
        if not equals or kind is None:
            raise ValueError(
                f"the vLLM setting {assignment!r} is unknown; accepted: name=value with "
                f"{', '.join(_KINDS)}"
            )
        try:
            values[name] = kind(text)
        except ValueError as error:
            raise ValueError(f"{name} is {text!r}; accepted: {_NOUNS[kind]}") from error
    return VllmSettings(**values)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


_NOUNS: Mapping[Callable[[str], Any], str] = {
    int: "a whole number",
    float: "a number",
    _flag: "true or false",
}
_KINDS: Mapping[str, Callable[[str], Any]] = {
    "max_num_seqs": int,
    "max_num_batched_tokens": int,
    "enable_prefix_caching": _flag,
    "mm_processor_cache_gb": float,
    "gpu_memory_utilization": float,
    "kv_cache_memory_bytes": int,
    "block_size": int,
    "tensor_parallel_size": int,
    "enforce_eager": _flag,
    "num_threads": int,
}
"""How the text of each setting is read."""


@dataclass(frozen=True)
class FreeMemory:
    """Memory of a device in bytes, as it is now."""

    free: int
    total: int


def free_memory(device: str) -> FreeMemory:
    """Ask a device for its memory.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        RuntimeUnavailableError: torch sees no such GPU.
    """
    if device == "cpu":
        return FreeMemory(available_memory_bytes(), _physical_memory_bytes())
    import torch

    if not torch.cuda.is_available():
        raise RuntimeUnavailableError(
            f"the policy was asked to run on {device}, and torch {torch.__version__} sees no GPU; "
            "check it with `coprs-deploy doctor`, or choose the policy device cpu"
        )
    return FreeMemory(*torch.cuda.mem_get_info(torch.device(device)))


def memory_arguments(
    settings: VllmSettings, device_type: str, memory: FreeMemory, needed_kv_bytes: int
) -> dict[str, Any]:
    """Say how much memory the engine may take, from what is free beside the graphs.

    Args:
        settings: what was asked for.
        device_type: ``cpu`` or ``cuda``.
        memory: of the device, with the graphs loaded and warm.
        needed_kv_bytes: keys and values of ``max_num_seqs`` longest answers.

    Returns:
        vLLM's ``gpu_memory_utilization`` or ``kv_cache_memory_bytes``, or both.

    Raises:
        RuntimeUnavailableError: nothing is left.
    """
    arguments: dict[str, Any] = {}
    if settings.kv_cache_memory_bytes is not None:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_memory_bytes
    if device_type == "cpu":
        most = int(LARGEST_CPU_SHARE * memory.free)
        arguments.setdefault("kv_cache_memory_bytes", min(needed_kv_bytes, most))
        return arguments
    share = settings.gpu_memory_utilization
    if share is None:
        # vLLM counts what others hold against its share, so the share reaches up to what is free.
        share = round(memory.free / memory.total - SPARE_SHARE, 3)
    if share <= 0:
        raise RuntimeUnavailableError(
            f"{memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB are free on the policy's "
            "GPU: nothing is left for it; use a smaller policy, another policy device, or fewer "
            "cached images"
        )
    return {**arguments, "gpu_memory_utilization": share}


def kv_bytes_per_token(text_config: Any, bytes_per_value: int) -> int:
    """Keys and values of one token in all layers."""
    heads = text_config.num_attention_heads
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return int(2 * text_config.num_hidden_layers * kv_heads * head_size * bytes_per_value)


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
