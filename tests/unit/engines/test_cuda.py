"""What of a CUDA device can be shown without one: recording work, one graph at a time."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from coprs_deploy.engines.cuda import CudaDevice
from coprs_deploy.errors import RuntimeUnavailableError


def play(recording):
    """A device whose PyTorch is played; ``recording`` stands for ``torch.cuda.graph``."""
    device = CudaDevice.__new__(CudaDevice)
    device.stream = SimpleNamespace(synchronize=lambda: None)
    cuda = SimpleNamespace(
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        graph=recording,
        stream=lambda stream: contextmanager(lambda: iter([None]))(),
    )
    device._torch = SimpleNamespace(cuda=cuda)
    return device


def test_only_one_graph_is_recorded_at_a_time():
    running, most = [], []

    @contextmanager
    def recording(graph, **options):
        assert options["capture_error_mode"] == "thread_local"
        running.append(graph)
        most.append(len(running))
        yield
        running.remove(graph)

    barrier = threading.Barrier(4, timeout=20)

    def record():
        barrier.wait()
        for _ in range(50):
            play(recording).capture(lambda: None)()

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 200


def test_work_that_cannot_be_recorded_says_how_to_run_it():
    @contextmanager
    def recording(graph, **options):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    for _ in range(2):  # the lock was let go of
        with pytest.raises(RuntimeUnavailableError, match=r"not permitted.*--no-cuda-graphs"):
            play(recording).capture(lambda: None)
