import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from coprs_deploy.runtime.encoder import EmbeddingCache, EncodedImage, picture_key

WAIT_SECONDS = 10


class PendingExecutor:
    """An encoder for tests: a "picture" is what computes its embedding."""

    def __init__(self):
        self.futures = []

    def submit(self, compute):
        future = Future()
        self.futures.append((future, compute))
        return future

    def run_all(self):
        for future, compute in self.futures:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(compute())
            except Exception as error:
                future.set_exception(error)
        self.futures.clear()


def encoded(number=0):
    return EncodedImage(np.full(1, number), finished=float(number), milliseconds=1.0)


def never():
    raise AssertionError("computed though it was known")


@pytest.fixture
def executor():
    return PendingExecutor()


def test_an_embedding_is_computed_once(executor):
    cache = EmbeddingCache(2, executor)
    answer = encoded()
    first, was_known = cache.get_or_submit("picture", lambda: answer)
    assert not was_known
    executor.run_all()
    second, is_known = cache.get_or_submit("picture", never)
    assert is_known
    assert second is first
    assert second.result() is answer
    assert executor.futures == []
    assert len(cache) == 1


def test_an_embedding_on_its_way_counts_as_present(executor):
    cache = EmbeddingCache(2, executor)
    first, _ = cache.get_or_submit("picture", encoded)
    second, is_known = cache.get_or_submit("picture", never)
    assert is_known
    assert second is first
    assert not first.done()
    assert len(executor.futures) == 1


def test_other_pictures_have_other_embeddings(executor):
    cache = EmbeddingCache(2, executor)
    futures = [cache.get_or_submit(str(n), lambda n=n: encoded(n))[0] for n in range(2)]
    executor.run_all()
    assert [future.result().finished for future in futures] == [0.0, 1.0]


def test_the_least_recently_used_embedding_is_dropped(executor):
    cache = EmbeddingCache(2, executor)
    for key in ("a", "b"):
        cache.get_or_submit(key, encoded)
    cache.get_or_submit("a", never)
    cache.get_or_submit("c", encoded)
    executor.run_all()
    assert len(cache) == 2
    assert cache.get_or_submit("a", never)[1]
    assert cache.get_or_submit("c", never)[1]
    assert not cache.get_or_submit("b", encoded)[1]


def test_a_dropped_embedding_still_reaches_who_asked_for_it(executor):
    cache = EmbeddingCache(1, executor)
    dropped, _ = cache.get_or_submit("a", encoded)
    cache.get_or_submit("b", encoded)
    executor.run_all()
    assert dropped.result().milliseconds == 1.0
    assert not cache.get_or_submit("a", encoded)[1]


def test_no_capacity_keeps_nothing(executor):
    cache = EmbeddingCache(0, executor)
    for _ in range(2):
        future, was_known = cache.get_or_submit("picture", encoded)
        assert not was_known
        executor.run_all()
        assert future.result().milliseconds == 1.0
    assert len(cache) == 0


def test_a_failed_computation_is_forgotten(executor):
    cache = EmbeddingCache(2, executor)

    def fail():
        raise RuntimeError("out of memory")

    failed, _ = cache.get_or_submit("picture", fail)
    executor.run_all()
    with pytest.raises(RuntimeError, match="out of memory"):
        failed.result()
    again, was_known = cache.get_or_submit("picture", encoded)
    assert not was_known
    assert again is not failed
    executor.run_all()
    assert again.result().milliseconds == 1.0
    assert cache.get_or_submit("picture", never) == (again, True)
    assert len(cache) == 1


def test_a_cancelled_computation_is_forgotten(executor):
    cache = EmbeddingCache(2, executor)
    cancelled, _ = cache.get_or_submit("picture", never)
    assert cancelled.cancel()
    again, was_known = cache.get_or_submit("picture", encoded)
    assert not was_known
    executor.run_all()
    assert again.result().milliseconds == 1.0


def test_many_threads_encode_a_picture_once():
    num_threads = 8
    start = threading.Barrier(num_threads)
    release = threading.Event()
    calls = []

    def compute():
        calls.append(threading.get_ident())
        assert release.wait(WAIT_SECONDS)
        return encoded()

    with ThreadPoolExecutor(1) as encoder, ThreadPoolExecutor(num_threads) as askers:
        cache = EmbeddingCache(2, encoder)

        def ask(_):
            start.wait(WAIT_SECONDS)
            return cache.get_or_submit("picture", compute)

        answers = list(askers.map(ask, range(num_threads)))
        release.set()
        assert len({id(future) for future, _ in answers}) == 1
        assert sorted(known for _, known in answers) == [False] + [True] * (num_threads - 1)
        answers[0][0].result(WAIT_SECONDS)
    assert len(calls) == 1


def test_a_computation_that_nobody_waits_for_is_called_off(executor):
    cache = EmbeddingCache(2, executor)
    first, _ = cache.get_or_submit("picture", never)
    second, _ = cache.get_or_submit("picture", never)
    cache.release(first)
    assert not first.cancelled()  # the second question still waits
    cache.release(second)
    assert first.cancelled()
    executor.run_all()
    third, was_known = cache.get_or_submit("picture", encoded)
    assert not was_known
    executor.run_all()
    assert third.result().milliseconds == 1.0


def test_an_embedding_that_is_there_outlives_its_release(executor):
    cache = EmbeddingCache(2, executor)
    future, _ = cache.get_or_submit("picture", encoded)
    executor.run_all()
    cache.release(future)
    assert cache.get_or_submit("picture", never)[1]


def test_a_key_tells_pictures_apart_by_every_pixel_and_the_shape():
    rgb = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    changed = rgb.copy()
    changed[1, 2, 2] ^= 1
    wide = np.repeat(rgb, 2, axis=1)
    assert len({picture_key(rgb), picture_key(changed), picture_key(rgb.reshape(3, 2, 3))}) == 3
    assert picture_key(rgb) == picture_key(rgb.copy()) == picture_key(wide[:, ::2])
