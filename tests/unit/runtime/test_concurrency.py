"""Counting of active requests, and the memory of their images."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from coprs_deploy.errors import QueueFullError
from coprs_deploy.runtime.concurrency import ConcurrencyLimit, ImageMemory
from tests.unit.runtime_fakes import WAIT


def test_slot_beyond_the_queue_is_refused_until_another_is_released():
    limit = ConcurrencyLimit(concurrency=1, max_queue_size=1)
    with limit.slot():
        with limit.slot():
            message = "2 requests are active: the policy serves 1 at once and max_queue_size is 1"
            with pytest.raises(QueueFullError, match=message), limit.slot():
                raise AssertionError("the slot was granted")
            assert limit.num_active == 2
        with limit.slot():
            assert limit.num_active == 2
    assert limit.num_active == 0


def test_slot_is_released_after_an_error():
    limit = ConcurrencyLimit(1, 0)
    for _ in range(3):
        with pytest.raises(KeyError), limit.slot():
            raise KeyError
    assert limit.num_active == 0


def test_memory_is_never_exceeded_and_given_in_the_order_of_arrival():
    memory, order, most = ImageMemory(100), [], []
    arrived = [threading.Event() for _ in range(6)]
    releases = [threading.Event() for _ in range(6)]

    def use(number, num_bytes):
        def check():
            arrived[number].set()

        with memory.hold(num_bytes, check):
            order.append(number)
            most.append(memory.used_bytes)
            arrived[number].set()
            assert releases[number].wait(WAIT)

    with ThreadPoolExecutor(6) as pool:
        running = []
        for number, num_bytes in enumerate((60, 30, 30, 5, 250, 60)):
            running.append(pool.submit(use, number, num_bytes))
            assert arrived[number].wait(WAIT)
        assert order == [0, 1]  # what would fit does not overtake
        for number in (1, 0, 2, 3, 4, 5):
            releases[number].set()
            running[number].result(WAIT)
    assert order == [0, 1, 2, 3, 4, 5]
    assert max(size for size in most if size != 250) <= 100
    assert memory.used_bytes == 0


def test_memory_wait_that_ends_with_an_error_lets_the_next_one_in():
    memory = ImageMemory(10)

    def fail():
        raise KeyError

    with memory.hold(10, fail):
        with pytest.raises(KeyError), memory.hold(1, fail):
            raise AssertionError("the memory was granted")
        assert memory.used_bytes == 10
    with memory.hold(1, fail):
        assert memory.used_bytes == 1
