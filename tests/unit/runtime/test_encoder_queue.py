"""The image encoder's queue: who goes together, who is called off, and how it ends."""

import gc
import threading
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest

from coprs_deploy.errors import CoPRSError
from coprs_deploy.runtime.encoder import EncoderQueue
from coprs_deploy.specs import OptimizationProfile
from tests.unit.runtime_fakes import GEOMETRY, WAIT, picture


class FakeStages:
    """Encodes a picture as its first number; the first call waits until it is let go."""

    def __init__(self, images):
        self.images = images
        self.batches = []
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()
        self.fails_from = 99
        self.loses_one = False

    def encode_batch(self, images):
        self.batches.append(len(images))
        self.has_begun.set()
        assert self.may_go_on.wait(WAIT)
        if len(images) >= self.fails_from:
            raise RuntimeError("out of memory")
        if self.loses_one:
            images = images[1:]
        return [float(prepared.image[0, 0, 0, 0]) for prepared in images]


@pytest.fixture
def start():
    """Start a queue that is busy with a first picture."""
    started = []

    def starter(*images):
        stages = FakeStages(OptimizationProfile(*images))
        queue = EncoderQueue(stages, GEOMETRY)
        started.append((stages, queue))
        first = queue.submit(picture(1))
        assert stages.has_begun.wait(WAIT)
        return stages, queue, first

    yield starter
    for stages, queue in started:
        stages.may_go_on.set()
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
def test_what_waits_goes_together_and_nobody_waits_for_company(start, images, batches):
    stages, queue, first = start(*images)
    futures = [queue.submit(picture(10 * n)) for n in range(5)]
    stages.may_go_on.set()
    found = [future.result(WAIT) for future in (first, *futures)]
    assert stages.batches == batches
    assert [encoded.embedding for encoded in found[1:]] == sorted(e.embedding for e in found[1:])
    assert len({encoded.embedding for encoded in found}) == 6
    last = [encoded for encoded in found if encoded.finished == found[-1].finished]
    assert len(last) == batches[-1]
    assert len({encoded.milliseconds for encoded in last}) == 1


def test_who_was_called_off_takes_no_place(start):
    stages, queue, _ = start(1, 2, 2)
    futures = [queue.submit(picture(n)) for n in range(4)]
    assert futures[0].cancel()
    assert futures[2].cancel()
    stages.may_go_on.set()
    for kept in (futures[1], futures[3]):
        kept.result(WAIT)
    assert stages.batches == [1, 2]


def test_pictures_that_cannot_go_together_go_one_by_one(start):
    stages, queue, _ = start(1, 3, 3)
    futures = [queue.submit(picture(n)) for n in range(3)]
    stages.fails_from = 2
    stages.may_go_on.set()
    assert len({future.result(WAIT).embedding for future in futures}) == 3
    assert stages.batches == [1, 3, 1, 1, 1]


def test_a_failure_has_an_error_for_each_and_ends_nothing(start):
    stages, queue, first = start(1, 3, 3)
    futures = [queue.submit(picture(n)) for n in range(3)]
    stages.fails_from = 1
    stages.may_go_on.set()
    errors = [future.exception(WAIT) for future in (first, *futures)]
    assert [str(error) for error in errors] == ["out of memory"] * 4
    assert len({id(error) for error in errors}) == 4  # raised in several threads
    assert stages.batches == [1, 3, 1, 1, 1]  # the one that came alone was not tried again
    stages.fails_from = 99
    assert queue.submit(picture(7)).result(WAIT).embedding != 0


def test_nobody_waits_for_an_embedding_that_is_missing(start):
    stages, queue, first = start(1, 2, 2)
    stages.loses_one = True
    stages.may_go_on.set()
    with pytest.raises(AssertionError, match="an embedding a picture"):
        first.result(WAIT)
    stages.loses_one = False
    assert queue.submit(picture(7)).result(WAIT).embedding != 0


def test_closing_calls_off_what_waits_and_waits_for_what_runs(start):
    stages, queue, first = start(1, 1, 1)
    waiting = queue.submit(picture(2))
    closing = threading.Thread(target=queue.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(WAIT)
    assert closing.is_alive()
    stages.may_go_on.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert first.result(0).milliseconds > 0
    assert stages.batches == [1]
    with pytest.raises(CoPRSError, match="the runtime was closed"):
        queue.submit(picture(3))
    queue.close()  # a second time does nothing


def test_a_queue_that_nobody_closed_ends_with_its_last_user():
    queue = EncoderQueue(FakeStages(OptimizationProfile()), GEOMETRY)
    queue._stages.may_go_on.set()
    queue.submit(picture(1)).result(WAIT)
    (thread,) = queue._thread._threads
    gone = weakref.ref(queue._stages)
    del queue
    gc.collect()
    thread.join(WAIT)
    assert not thread.is_alive()
    assert gone() is None


def test_the_queue_keeps_no_picture_alive(start):
    stages, queue, _ = start(1, 2, 2)
    stages.may_go_on.set()
    rgb = np.array(picture(4))
    gone = weakref.ref(rgb)
    future = queue.submit(rgb)
    future.result(WAIT)
    queue.submit(picture(5)).result(WAIT)  # the thread has left the batch before
    del rgb, future
    gc.collect()
    assert gone() is None
