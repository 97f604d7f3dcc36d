"""Device and threads of PyTorch."""

import threading

import pytest
import torch

from coprs_deploy.errors import RuntimeUnavailableError
from coprs_deploy.policy.torch_settings import require_device, torch_threads


def test_torch_threads_are_set_inside_the_block_for_this_thread_only():
    def count(counts, started, done):
        torch.ones(1).sum()
        counts.append(torch.get_num_threads())
        started.set()
        done.wait(30)
        counts.append(torch.get_num_threads())

    before, counts, started, done = (
        torch.get_num_threads(),
        [],
        threading.Event(),
        threading.Event(),
    )
    other = threading.Thread(target=count, args=(counts, started, done))
    other.start()
    assert started.wait(30)
    with torch_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        done.set()
        other.join(30)
    assert torch.get_num_threads() == before
    assert counts == [before, before]


def test_torch_threads_none_changes_nothing_and_an_error_restores_the_number():
    before = torch.get_num_threads()
    with torch_threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(KeyError), torch_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("num_gpus", "found"), [(0, "no GPU"), (1, "1 GPU"), (2, "2 GPUs")])
def test_require_device_beyond_the_gpus_is_refused(monkeypatch, num_gpus, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    require_device("cpu")
    for index in range(num_gpus):
        require_device(f"cuda:{index}")
    with pytest.raises(RuntimeUnavailableError, match=f"finds {found}; check the installation"):
        require_device(f"cuda:{num_gpus}")
