"""vLLM engine in a thread: environment, platform check, architectures, start and stop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from coprs_deploy.closing import Closeable
from coprs_deploy.errors import PolicyError, import_failure
from coprs_deploy.policy.availability import VLLM_DOCS, VLLM_INSTALL

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_T = TypeVar("_T")

ARCHITECTURES = {"qwen2_5_vl": "QwenPolicy", "llava": "LlavaPolicy"}
"""Class names in :mod:`.models` by model type."""

_ENVIRONMENT = {
    # A forked process would inherit locks held by running threads of the graphs' runtime.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # The capture is written for and tested with the first model runner.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
_DEFAULT_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
}


class EngineThread(Closeable):
    """vLLM engine with its event loop in a thread; any other thread may submit coroutines.

    Args:
        arguments: vLLM's ``AsyncEngineArgs``.

    Attributes:
        engine: vLLM's ``AsyncLLM``; its worker processes end with :meth:`close`.
    """

    def __init__(self, arguments: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vllm-policy", daemon=True
        )
        self._thread.start()
        self._tasks: set[Future[None]] = set()  # its methods are atomic
        self._lock = threading.Lock()  # of the loop's end
        try:
            self.engine = self.run(_start_engine(arguments))
        except BaseException:
            self._stop_loop()
            raise

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the event loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def submit(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """Run a coroutine in the event loop without waiting for it; closing cancels it.

        Raises:
            PolicyError: the engine was closed.
        """
        with self._lock:
            if self._loop.is_closed():
                work.close()
                raise PolicyError("the policy was closed")
            task = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """Cancel the submitted coroutines and end the engine's processes and the thread."""
        if self._loop.is_closed():
            return
        self._cancel_tasks()
        try:
            self.run(_stop_engine(self.engine))
        finally:
            self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        with self._lock:
            self._cancel_tasks()  # that were submitted meanwhile and will not run
            self._loop.close()

    def _cancel_tasks(self) -> None:
        for task in list(self._tasks):
            task.cancel()


async def _start_engine(arguments: Any) -> AsyncLLM:
    """Start an engine that belongs to the running event loop."""
    from vllm.v1.engine.async_llm import AsyncLLM

    engine: AsyncLLM = AsyncLLM.from_engine_args(arguments, stat_loggers=[_no_logger()])
    return engine


async def _stop_engine(engine: AsyncLLM) -> None:
    """Shut the engine down and cancel all other tasks of the running event loop."""
    engine.shutdown()
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


def _no_logger() -> Any:
    """Return a logger class that writes nothing; vLLM times requests only if there is a logger."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class NoLogger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, *arguments: Any, **options: Any) -> None:
            pass

        def log_engine_initialized(self) -> None:
            pass

    return NoLogger


def import_vllm(device_type: str) -> Any:
    """Import vLLM.

    Raises:
        MissingDependencyError: vLLM is not installed.
        PolicyError: it was built for another type of device.
    """
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        remedy = f"{VLLM_INSTALL} for a GPU, or see {VLLM_DOCS} for a CPU"
        raise import_failure(error, "vllm", remedy, needed_by="the vllm policy") from error
    if current_platform.device_type != device_type:
        raise PolicyError(
            f"policy device is {device_type!r}, but vllm {vllm.__version__} is built for "
            f"{current_platform.device_type or 'no device of this machine'!r}; change the policy "
            "device, or install the other build of vLLM"
        )
    return vllm


def register_architectures() -> None:
    """Register the architectures with vLLM in this process (``vllm.general_plugins``)."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, f"coprs_deploy.policy.vllm_policy.models:{name}")


@contextmanager
def engine_environment(num_threads: int | None) -> Iterator[None]:
    """Set the environment variables of vLLM's start, and restore them after the block.

    ``num_threads`` CPU threads are the worker's; None leaves one core to the engine's loop.
    """
    values = {name: value for name, value in _DEFAULT_ENVIRONMENT.items() if name not in os.environ}
    values |= _ENVIRONMENT
    if num_threads is not None or "OMP_NUM_THREADS" not in os.environ:
        # Without a core of its own the engine's loop would wait for the worker's threads.
        cores = len(os.sched_getaffinity(0))
        values["OMP_NUM_THREADS"] = str(num_threads or max(1, cores - 1))
    with _replaced_environment(values):
        yield


@contextmanager
def visible_device(device_type: str, index: str) -> Iterator[None]:
    """Restrict the engine's processes to one GPU if the device has an index."""
    has_index = device_type == "cuda" and index
    with _replaced_environment({"CUDA_VISIBLE_DEVICES": index} if has_index else {}):
        yield


@contextmanager
def _replaced_environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
