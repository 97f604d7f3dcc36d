"""The queue of the image encoder: batching, cancellation, errors and shutdown."""

import gc
import threading
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest

from coprs_deploy.errors import CoPRSError
from coprs_deploy.runtime.encoder import EncoderQueue, ImageEmbedding
from coprs_deploy.specs import OptimizationProfile
from tests.unit.runtime_fakes import GEOMETRY, WAIT, image_of


class FakeGraphs:
    """Encodes an image as its first value; every call waits for ``may_continue``."""

    def __init__(self, images):
        self.images = images
        self.batches = []
        self.has_begun = threading.Event()
        self.may_continue = threading.Event()
        self.fails_from = 99
        self.drops_one = False

    def encode_batch(self, images):
        self.batches.append(len(images))
        self.has_begun.set()
        assert self.may_continue.wait(WAIT)
        if len(images) >= self.fails_from:
            raise RuntimeError("out of memory")
        if self.drops_one:
            images = images[1:]
        return [float(prepared.image[0, 0, 0, 0]) for prepared in images]


@pytest.fixture
def start():
    """Start a queue that is busy with a first image."""
    started = []

    def starter(*images):
        graphs = FakeGraphs(OptimizationProfile(*images))
        queue = EncoderQueue(graphs, GEOMETRY)
        started.append((graphs, queue))
        first = queue.submit(image_of(1))
        assert graphs.has_begun.wait(WAIT)
        return graphs, queue, first

    yield starter
    for graphs, queue in started:
        graphs.may_continue.set()
        queue.close()


@pytest.mark.parametrize(
    ("images", "batches"),
    [
        ((1, 1, 1), [1, 1, 1, 1, 1, 1]),
        ((1, 2, 2), [1, 2, 2, 1]),
        ((1, 2, 8), [1, 2, 2, 1]),
        ((1, 4, 8), [1, 4, 1]),
        ((1, 2, 5), [1, 5]),
    ],
)
def test_queue_waiting_images_form_batches_of_the_profile(start, images, batches):
    graphs, queue, first = start(*images)
    futures = [queue.submit(image_of(10 * n)) for n in range(5)]
    graphs.may_continue.set()
    results = [future.result(WAIT) for future in (first, *futures)]
    assert graphs.batches == batches
    assert [r.embedding for r in results[1:]] == sorted(r.embedding for r in results[1:])
    assert len({result.embedding for result in results}) == 6
    last = [result for result in results if result.finished == results[-1].finished]
    assert len(last) == batches[-1]
    assert len({result.duration_ms for result in last}) == 1


def test_queue_cancelled_image_is_left_out_of_the_batch(start):
    graphs, queue, _ = start(1, 2, 2)
    futures = [queue.submit(image_of(n)) for n in range(4)]
    assert futures[0].cancel()
    assert futures[2].cancel()
    graphs.may_continue.set()
    for remaining in (futures[1], futures[3]):
        remaining.result(WAIT)
    assert graphs.batches == [1, 2]


def test_queue_failed_batch_is_retried_one_by_one(start):
    graphs, queue, _ = start(1, 3, 3)
    futures = [queue.submit(image_of(n)) for n in range(3)]
    graphs.fails_from = 2
    graphs.may_continue.set()
    assert len({future.result(WAIT).embedding for future in futures}) == 3
    assert graphs.batches == [1, 3, 1, 1, 1]


def test_queue_failing_encoder_raises_an_error_per_image_and_continues(start):
    graphs, queue, first = start(1, 3, 3)
    futures = [queue.submit(image_of(n)) for n in range(3)]
    graphs.fails_from = 1
    graphs.may_continue.set()
    errors = [future.exception(WAIT) for future in (first, *futures)]
    assert [str(error) for error in errors] == ["out of memory"] * 4
    assert len({id(error) for error in errors}) == 4  # raised in several threads
    assert graphs.batches == [1, 3, 1, 1, 1]  # a single image is not retried
    graphs.fails_from = 99
    assert queue.submit(image_of(7)).result(WAIT).embedding != 0


def test_queue_missing_embedding_is_an_error_for_its_request(start):
    graphs, queue, first = start(1, 2, 2)
    graphs.drops_one = True
    graphs.may_continue.set()
    with pytest.raises(AssertionError, match="one embedding per image"):
        first.result(WAIT)
    graphs.drops_one = False
    assert queue.submit(image_of(7)).result(WAIT).embedding != 0


def test_queue_close_cancels_waiting_images_and_finishes_the_running_one(start):
    graphs, queue, first = start(1, 1, 1)
    waiting = queue.submit(image_of(2))
    closing = threading.Thread(target=queue.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(WAIT)
    assert closing.is_alive()
    graphs.may_continue.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert first.result(0).duration_ms > 0
    assert graphs.batches == [1]
    with pytest.raises(CoPRSError, match="CoPRS was closed during the request"):
        queue.submit(image_of(3))
    queue.close()  # closing twice has no effect


def test_queue_image_refused_while_it_closes_leaves_the_waiting_ones_to_be_cancelled(start):
    graphs, queue, _ = start(1, 1, 1)
    waiting = queue.submit(image_of(2))
    queue._thread.shutdown(wait=False, cancel_futures=True)  # as close() begins
    with pytest.raises(CoPRSError, match="CoPRS was closed during the request"):
        queue.submit(image_of(3))
    graphs.may_continue.set()
    queue.close()
    assert waiting.cancelled()


def test_queue_without_close_ends_its_thread_with_the_last_reference():
    graphs = FakeGraphs(OptimizationProfile())
    graphs.may_continue.set()
    before = set(threading.enumerate())
    queue = EncoderQueue(graphs, GEOMETRY)
    queue.submit(image_of(1)).result(WAIT)
    (thread,) = set(threading.enumerate()) - before
    reference = weakref.ref(graphs)
    del queue, graphs
    gc.collect()
    thread.join(WAIT)
    assert not thread.is_alive()
    assert reference() is None


def test_queue_keeps_no_image_alive(start):
    graphs, queue, _ = start(1, 2, 2)
    graphs.may_continue.set()
    rgb = np.array(image_of(4))
    reference = weakref.ref(rgb)
    future = queue.submit(rgb)
    future.result(WAIT)
    queue.submit(image_of(5)).result(WAIT)  # the thread has left the previous batch
    del rgb, future
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    ("start_s", "end_s", "overlap_ms"),
    [
        (0.0, 20.0, 2000.0),
        (9.0, 9.5, 500.0),
        (8.5, 9.25, 750.0),
        (9.5, 20.0, 500.0),
        (10.0, 20.0, 0.0),
        (0.0, 8.0, 0.0),
    ],
)
def test_image_embedding_overlap_is_the_intersection_of_both_intervals(start_s, end_s, overlap_ms):
    encoded = ImageEmbedding(None, finished=10.0, duration_ms=2000.0)
    assert encoded.overlap_ms(start_s, end_s) == pytest.approx(overlap_ms)
