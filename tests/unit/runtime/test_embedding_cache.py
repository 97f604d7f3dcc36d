"""The LRU cache of image embeddings."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from coprs_deploy.policy import PolicyRequest
from coprs_deploy.runtime.encoder import (
    DecodedImage,
    EmbeddingCache,
    ImageEmbedding,
    PendingEmbedding,
    content_key,
)
from tests.unit.runtime_fakes import WAIT


class PendingExecutor:
    """A fake encoder; the "pixels" of an image are the function that computes its embedding."""

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


def embedding(number=0):
    return ImageEmbedding(np.full(1, number), finished=float(number), duration_ms=1.0)


def not_computed():
    raise AssertionError("computed although it was cached")


def image(key, compute=embedding):
    return DecodedImage(rgb=compute, resize=None, cache_key=key, decode_ms=0.0)


@pytest.fixture
def executor():
    return PendingExecutor()


def test_cache_second_request_reuses_the_embedding(executor):
    cache = EmbeddingCache(2, executor)
    computed = embedding()
    first = cache.get_or_submit(image("a", lambda: computed))
    assert not first.is_cached
    executor.run_all()
    second = cache.get_or_submit(image("a", not_computed))
    assert second.is_cached
    assert second.future is first.future
    assert second.future.result() is computed
    assert executor.futures == []
    assert len(cache) == 1


def test_cache_pending_embedding_counts_as_cached(executor):
    cache = EmbeddingCache(2, executor)
    first = cache.get_or_submit(image("a"))
    second = cache.get_or_submit(image("a", not_computed))
    assert second.is_cached
    assert second.future is first.future
    assert not first.future.done()
    assert len(executor.futures) == 1


def test_cache_different_images_have_different_embeddings(executor):
    cache = EmbeddingCache(2, executor)
    pending = [cache.get_or_submit(image(str(n), lambda n=n: embedding(n))) for n in range(2)]
    executor.run_all()
    assert [entry.future.result().finished for entry in pending] == [0.0, 1.0]


def test_cache_evicts_the_least_recently_used_embedding(executor):
    cache = EmbeddingCache(2, executor)
    for key in ("a", "b"):
        cache.get_or_submit(image(key))
    cache.get_or_submit(image("a", not_computed))
    cache.get_or_submit(image("c"))
    executor.run_all()
    assert len(cache) == 2
    assert cache.get_or_submit(image("a", not_computed)).is_cached
    assert cache.get_or_submit(image("c", not_computed)).is_cached
    assert not cache.get_or_submit(image("b")).is_cached


def test_cache_evicted_embedding_still_reaches_its_request(executor):
    cache = EmbeddingCache(1, executor)
    evicted = cache.get_or_submit(image("a"))
    cache.get_or_submit(image("b"))
    executor.run_all()
    assert evicted.future.result().duration_ms == 1.0
    assert not cache.get_or_submit(image("a")).is_cached


def test_cache_without_capacity_keeps_nothing(executor):
    cache = EmbeddingCache(0, executor)
    for _ in range(2):
        pending = cache.get_or_submit(image(""))
        assert not pending.is_cached
        executor.run_all()
        assert pending.future.result().duration_ms == 1.0
    assert len(cache) == 0


def test_cache_failed_computation_is_dropped(executor):
    cache = EmbeddingCache(2, executor)

    def fail():
        raise RuntimeError("out of memory")

    failed = cache.get_or_submit(image("a", fail))
    executor.run_all()
    with pytest.raises(RuntimeError, match="out of memory"):
        failed.future.result()
    retried = cache.get_or_submit(image("a"))
    assert not retried.is_cached
    assert retried.future is not failed.future
    executor.run_all()
    assert retried.future.result().duration_ms == 1.0
    assert cache.get_or_submit(image("a", not_computed)).future is retried.future
    assert len(cache) == 1


def test_cache_cancelled_computation_is_dropped(executor):
    cache = EmbeddingCache(2, executor)
    cancelled = cache.get_or_submit(image("a", not_computed))
    assert cancelled.future.cancel()
    retried = cache.get_or_submit(image("a"))
    assert not retried.is_cached
    executor.run_all()
    assert retried.future.result().duration_ms == 1.0


def test_cache_concurrent_requests_encode_an_image_once():
    num_threads = 8
    start = threading.Barrier(num_threads)
    release = threading.Event()
    calls = []

    def compute():
        calls.append(threading.get_ident())
        assert release.wait(WAIT)
        return embedding()

    with ThreadPoolExecutor(1) as encoder, ThreadPoolExecutor(num_threads) as clients:
        cache = EmbeddingCache(2, encoder)

        def request(_):
            start.wait(WAIT)
            return cache.get_or_submit(image("a", compute))

        pending = list(clients.map(request, range(num_threads)))
        release.set()
        assert len({id(entry.future) for entry in pending}) == 1
        assert sorted(e.is_cached for e in pending) == [False] + [True] * (num_threads - 1)
        pending[0].future.result(WAIT)
    assert len(calls) == 1


def test_cache_computation_released_by_every_request_is_cancelled(executor):
    cache = EmbeddingCache(2, executor)
    first = cache.get_or_submit(image("a", not_computed))
    second = cache.get_or_submit(image("a", not_computed))
    first.release()
    assert not first.future.cancelled()  # the second request still waits
    second.release()
    assert first.future.cancelled()
    executor.run_all()
    third = cache.get_or_submit(image("a"))
    assert not third.is_cached
    executor.run_all()
    assert third.future.result().duration_ms == 1.0


def test_cache_failed_and_cancelled_computations_take_no_place_after_their_release(executor):
    def fail():
        raise RuntimeError("out of memory")

    cache = EmbeddingCache(2, executor)
    cache.get_or_submit(image("a"))
    executor.run_all()
    failed = cache.get_or_submit(image("b", fail))
    executor.run_all()
    failed.release()
    assert len(cache) == 1
    cache.get_or_submit(image("c", not_computed)).release()
    assert len(cache) == 1
    assert cache.get_or_submit(image("a", not_computed)).is_cached


def test_cache_release_while_another_image_is_submitted_does_not_wait():
    class Collecting(PendingExecutor):
        """Encoder during whose call the garbage collector ends an abandoned stream."""

        def submit(self, compute):
            if abandoned:
                abandoned.pop().release()
            return super().submit(compute)

    abandoned = []
    cache = EmbeddingCache(2, Collecting())
    abandoned.append(cache.get_or_submit(image("a")))
    future = abandoned[0].future
    thread = threading.Thread(target=cache.get_or_submit, args=[image("b")], daemon=True)
    thread.start()
    thread.join(WAIT / 10)
    assert not thread.is_alive()
    assert future.cancelled()
    assert len(cache) == 1


def test_cache_computed_embedding_outlives_its_release(executor):
    cache = EmbeddingCache(2, executor)
    pending = cache.get_or_submit(image("a"))
    executor.run_all()
    pending.release()
    assert cache.get_or_submit(image("a", not_computed)).is_cached


def test_embedding_that_is_ready_as_the_wait_for_it_ends_is_returned(executor):
    class ReadyAtTheEnd(Future):
        def result(self, timeout=None):
            if timeout is not None:
                self.set_result("embedding")
                raise TimeoutError
            return super().result()

    future = ReadyAtTheEnd()
    pending = PendingEmbedding(future, is_cached=False, cache=EmbeddingCache(2, executor))
    threading.Timer(0.02, future.set_result, ["embedding"]).start()
    request = PolicyRequest(None, "x", deadline=time.perf_counter() + WAIT)
    assert pending.wait(request) == "embedding"


def test_content_key_depends_on_every_pixel_and_the_shape_only():
    rgb = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    changed = rgb.copy()
    changed[1, 2, 2] ^= 1
    wide = np.repeat(rgb, 2, axis=1)
    assert len({content_key(rgb), content_key(changed), content_key(rgb.reshape(3, 2, 3))}) == 3
    assert content_key(rgb) == content_key(rgb.copy()) == content_key(wide[:, ::2])
