"""The lock whose waiting threads come first in, first out."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from coprs_deploy.policy.fair_lock import FairLock
from tests.unit.runtime_fakes import WAIT


@contextmanager
def waiting(lock, *functions):
    """Run threads that begin to wait for a lock one after the other; it is held meanwhile.

    Yields what releases it. After the block the threads have ended.
    """
    with ThreadPoolExecutor(len(functions)) as pool, ExitStack() as held:
        held.enter_context(lock.hold())
        running = []
        for number, function in enumerate(functions, start=1):
            running.append(pool.submit(function))
            begin = time.monotonic()
            while lock.num_waiting < number:
                assert time.monotonic() < begin + WAIT
                time.sleep(0.001)
        yield held.close
        held.close()
        for future in running:
            future.result(WAIT)


def giving_up_and_next(lock, remaining_s, order):
    """Return a function whose wait ``remaining_s`` ends, and one that waits behind it."""

    def give_up():
        with pytest.raises(TimeoutError), lock.hold(remaining_s):
            order.append("given up")

    def use():
        with lock.hold():
            order.append("next")

    return give_up, use


def test_waiting_threads_come_in_the_order_in_which_they_began_to_wait():
    lock, order = FairLock(), []

    def use(number):
        for _ in range(3):
            with lock.hold():
                order.append(number)

    with waiting(lock, *[lambda n=n: use(n) for n in range(5)]):
        assert order == []
    assert order[:5] == [0, 1, 2, 3, 4]


def test_a_thread_that_waits_comes_before_the_one_that_has_just_released():
    lock, order = FairLock(), []

    def use():
        with lock.hold():
            order.append("other")

    for _ in range(50):
        with waiting(lock, use) as release:
            release()
            with lock.hold():
                order.append("releasing")
    assert order == ["other", "releasing"] * 50


def test_no_more_threads_than_holders_hold_it_at_once():
    lock, now, most = FairLock(2), [], []

    def use(number):
        for _ in range(100):
            with lock.hold():
                now.append(number)
                most.append(len(now))
                now.remove(number)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(6)))
    assert 1 <= max(most) <= 2
    with lock.hold(), lock.hold():
        assert lock.num_waiting == 0


def test_a_wait_that_ends_with_an_error_lets_the_next_one_in():
    lock, order = FairLock(), []
    has_ended = threading.Event()

    ends = time.monotonic() + 0.05

    def remaining_s():
        if time.monotonic() >= ends:
            has_ended.set()
            raise TimeoutError
        return ends - time.monotonic()

    with waiting(lock, *giving_up_and_next(lock, remaining_s, order)):
        assert has_ended.wait(WAIT)
    assert order == ["next"]
    with lock.hold():
        assert lock.num_waiting == 0


def test_a_wait_that_no_one_needs_any_more_ends_at_its_turn():
    lock, order = FairLock(), []
    abandoned = threading.Event()

    def remaining_s():
        if abandoned.is_set():
            raise TimeoutError

    with waiting(lock, *giving_up_and_next(lock, remaining_s, order)):
        abandoned.set()
    assert order == ["next"]


def test_a_turn_that_comes_while_the_wait_ends_is_passed_on():
    lock = FairLock()
    turn_is_given = threading.Event()

    def remaining_s():
        if threading.current_thread() is not threading.main_thread() and lock.num_waiting:
            assert turn_is_given.wait(WAIT)
            raise TimeoutError
        return 0.001

    def give_up():
        with pytest.raises(TimeoutError), lock.hold(remaining_s):
            raise AssertionError("the lock was given")

    with waiting(lock, give_up) as release:
        time.sleep(0.05)  # until it asks whether to wait on
        release()
        turn_is_given.set()
    with lock.hold(lambda: 0.1):
        assert lock.num_waiting == 0
