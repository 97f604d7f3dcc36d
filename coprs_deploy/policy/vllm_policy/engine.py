"""Starting and ending a vLLM engine: its environment, its platform, our architectures."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from coprs_deploy.errors import MissingDependencyError, PolicyError
from coprs_deploy.policy.availability import VLLM_VERSION

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

ARCHITECTURES = {"qwen2_5_vl": "QwenPolicy", "llava": "LlavaPolicy"}
"""Classes of :mod:`.models` by the type of a policy."""

INSTALL = f'pip install "vllm=={VLLM_VERSION}" for a GPU; for a CPU see docs/policies.md'

_ENVIRONMENT = {
    # A fork would inherit the threads of the graphs' runtime in the middle of their work.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # The capture is written for, and tested with, the interface of this model runner.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
_DEFAULT_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
}


async def start_engine(arguments: Any) -> AsyncLLM:
    """Start an engine for the event loop that runs; its processes end with :func:`stop_engine`."""
    from vllm.v1.engine.async_llm import AsyncLLM

    engine: AsyncLLM = AsyncLLM.from_engine_args(arguments, stat_loggers=[_no_logger()])
    return engine


async def stop_engine(engine: AsyncLLM) -> None:
    """End an engine's processes, and every task of the event loop that waited for it."""
    engine.shutdown()
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


def _no_logger() -> Any:
    """Build a logger of statistics that writes nothing: with one, vLLM times each request."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class NoLogger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, *arguments: Any, **options: Any) -> None:
            pass

        def log_engine_initialized(self) -> None:
            pass

    return NoLogger


def import_vllm() -> Any:
    """Import vLLM.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import vllm
    except ImportError as error:
        raise MissingDependencyError(f"the vllm policy needs {error.name}; {INSTALL}") from error
    return vllm


def check_platform(vllm: Any, device_type: str) -> None:
    """Refuse a device that the installed vLLM was not built for.

    Raises:
        PolicyError: names both.
    """
    from vllm.platforms import current_platform

    if current_platform.device_type != device_type:
        raise PolicyError(
            f"the policy was asked to run on {device_type!r}, and vllm {vllm.__version__} is built "
            f"for {current_platform.device_type or 'no device that is here'!r}: choose that policy "
            "device, or install the other build"
        )


def registered_architecture(model_type: str) -> str:
    """Make our architectures known to vLLM, and name that of a type of policy.

    Raises:
        PolicyError: there is none for it.
    """
    from vllm import ModelRegistry

    name = ARCHITECTURES.get(model_type)
    if name is None:
        raise PolicyError(
            f"the policy is of type {model_type!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    register_architectures()
    assert name in ModelRegistry.get_supported_archs()
    return name


def register_architectures() -> None:
    """Make our architectures known to vLLM in this process (``vllm.general_plugins``)."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, f"coprs_deploy.policy.vllm_policy.models:{name}")


@contextmanager
def engine_environment(num_threads: int | None) -> Iterator[None]:
    """Set what vLLM reads from the environment while it starts, and put it back."""
    wanted = {name: value for name, value in _DEFAULT_ENVIRONMENT.items() if name not in os.environ}
    wanted |= _ENVIRONMENT
    # One core is left to the engine's loop, which would else wait behind the worker's threads.
    threads = str(num_threads or max(1, len(os.sched_getaffinity(0)) - 1))
    if num_threads is not None or "OMP_NUM_THREADS" not in os.environ:
        wanted["OMP_NUM_THREADS"] = threads
    with _replaced_environment(wanted):
        yield


@contextmanager
def visible_device(device_type: str, index: str) -> Iterator[None]:
    """Show the engine's processes one GPU where one was named."""
    with _replaced_environment(
        {"CUDA_VISIBLE_DEVICES": index} if device_type == "cuda" and index else {}
    ):
        yield


@contextmanager
def _replaced_environment(wanted: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
