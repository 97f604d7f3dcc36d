"""CUDA graph capture without a GPU: one at a time, and its failure."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from coprs_deploy.engines.cuda import CudaDevice
from coprs_deploy.errors import RuntimeUnavailableError


def device_with(capture):
    """A device on a fake PyTorch; ``capture`` stands for ``torch.cuda.graph``."""
    device = CudaDevice.__new__(CudaDevice)
    device.stream = SimpleNamespace(synchronize=lambda: None)
    cuda = SimpleNamespace(
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        graph=capture,
        stream=lambda stream: contextmanager(lambda: iter([None]))(),
    )
    device._torch = SimpleNamespace(cuda=cuda)
    return device


def test_captures_of_several_threads_run_one_at_a_time():
    running, counts = [], []

    @contextmanager
    def capture(graph, **options):
        assert options["capture_error_mode"] == "thread_local"
        running.append(graph)
        counts.append(len(running))
        yield
        running.remove(graph)

    barrier = threading.Barrier(4, timeout=20)

    def work():
        barrier.wait()
        for _ in range(50):
            device_with(capture).capture(lambda: None)()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(counts) == 1 and len(counts) == 200


def test_a_failed_capture_names_the_option_and_releases_the_lock():
    @contextmanager
    def capture(graph, **options):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    for _ in range(2):  # the second would wait for a lock that is still held
        with pytest.raises(RuntimeUnavailableError, match=r"not permitted.*--no-cuda-graphs"):
            device_with(capture).capture(lambda: None)
