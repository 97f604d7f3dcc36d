"""CoPRS at its limits: queue, timeout, abandoned requests and closing."""

import asyncio
import dataclasses
import multiprocessing
import os
import threading

import numpy as np
import pytest

from coprs_deploy.errors import (
    CoPRSError,
    InstructionError,
    QueueFullError,
    RequestTimeoutError,
)
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.runtime import CoPRS, RuntimeOptions
from tests.unit.runtime_fakes import WAIT, FakePolicy, FakeRunner, image_of


class TestLimits:
    def test_segment_beyond_the_queue_is_refused_without_encoding(self, build):
        coprs, runners = build(max_queue_size=1)
        streams = [coprs.stream(image_of(), "x") for _ in range(2)]
        for stream in streams:
            next(stream)
        assert coprs._limit.num_active == 2
        with pytest.raises(QueueFullError, match="2 requests are active"):
            coprs.segment(image_of(1), "x")
        streams[0].close()
        assert coprs.segment(image_of(), "x").found
        streams[1].close()
        assert runners["image_encoder"].calls == 1  # the image of the refused request was not

    def test_segment_releases_its_slot_after_success_and_failure(self, build):
        coprs, _ = build(max_queue_size=0)
        for _ in range(3):
            assert coprs.segment(image_of(), "x").found
            with pytest.raises(InstructionError):
                coprs.segment(image_of(), " ")
        assert coprs._limit.num_active == 0

    def test_segment_past_its_deadline_is_abandoned(self, build):
        policy = FakePolicy(checks_deadline=True)
        coprs, _ = build(policy, timeout_s=1e-9)
        with pytest.raises(RequestTimeoutError, match=r"'the cup' .* its deadline"):
            coprs.segment(image_of(), "the cup")
        assert policy.num_abandoned == 1

    def test_segment_does_not_wait_for_the_image_encoder_past_its_deadline(self, build):
        release = threading.Event()
        coprs, runners = build(encode=lambda: release.wait(WAIT), timeout_s=0.05)
        try:
            with pytest.raises(RequestTimeoutError):
                coprs.segment(image_of(), "x")
        finally:
            release.set()
        assert runners["prior"].calls == 0

    def test_segment_with_a_real_policy_stops_at_the_deadline(self, tiny_bundle, scene):
        with CoPRS.load(tiny_bundle, RuntimeOptions(timeout_s=1e-4)) as coprs:
            with pytest.raises(RequestTimeoutError):
                coprs.segment(scene, "the red disc")
            assert coprs._limit.num_active == 0

    def test_stream_closed_early_cancels_its_queued_encoding(self, build):
        begun, release = threading.Event(), threading.Event()

        def encode():
            begun.set()
            release.wait(WAIT)

        coprs, runners = build(encode=encode)
        streams = [coprs.stream(image_of(value), "x") for value in (1, 2)]
        for stream in streams:
            next(stream)
        assert begun.wait(WAIT)
        streams[1].close()
        release.set()
        assert list(streams[0])[-1].found
        assert coprs.segment(image_of(3), "x").found
        assert runners["image_encoder"].calls == 2  # images 1 and 3


class TestClosing:
    def test_close_ends_a_waiting_request_with_an_error(self, build):
        begun, release = threading.Event(), threading.Event()

        def encode():
            begun.set()
            release.wait(WAIT)

        coprs, _ = build(FakePolicy(deltas=("w",)), encode=encode)
        first, second = (coprs.stream(image_of(value), "x") for value in (1, 2))
        next(first), next(second)
        assert begun.wait(WAIT)
        closing = threading.Thread(target=coprs.close)
        closing.start()
        with pytest.raises(CoPRSError, match="CoPRS was closed during the request"):
            for _ in second:
                pass
        release.set()
        closing.join(WAIT)
        first.close()

    def test_close_ends_a_response_that_is_being_written(self, build):
        policy = FakePolicy(deltas=("w",) * 50)
        coprs, _ = build(policy)
        stream = coprs.stream(image_of(), "x")
        next(stream)
        coprs.close()
        with pytest.raises(CoPRSError, match="CoPRS was closed during the request"):
            next(stream)
        assert policy.num_abandoned == 1

    def test_close_frees_the_graphs_after_an_error_of_the_policy(self, build):
        class FailsOnce(FakePolicy):
            def close(self):
                if not self.is_closed:
                    super().close()
                    raise RuntimeError("the engine does not end")

        coprs, runners = build(FailsOnce())
        with pytest.raises(RuntimeError, match="the engine does not end"):
            coprs.close()
        assert all(runner.is_closed for runner in runners.values())

    def test_with_block_closes_graphs_policy_and_threads(self, build):
        policy = FakePolicy()
        coprs, runners = build(policy)
        with coprs as same:
            assert same is coprs
            coprs.segment(image_of(), "x")
        assert policy.is_closed
        assert all(runner.is_closed for runner in runners.values())
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith(("image-encoder", "segment"))]

    def test_with_block_closes_after_an_error(self, build):
        policy = FakePolicy()
        coprs, _ = build(policy)
        with pytest.raises(KeyError), coprs:
            raise KeyError
        assert policy.is_closed

    def test_close_twice_leaves_everything_closed(self, build):
        policy = FakePolicy()
        coprs, runners = build(policy)
        coprs.close()
        coprs.close()
        assert policy.is_closed
        assert all(runner.is_closed for runner in runners.values())


def use_all(coprs):
    """Return the error of each public call."""
    calls = (
        lambda: coprs.segment(image_of(), "x"),
        lambda: next(coprs.stream(image_of(), "x")),
        lambda: asyncio.run(coprs.asegment(image_of(), "x")),
        lambda: next(coprs.segment_many([(image_of(), "x")])),
        coprs.warm_up,
    )
    errors = []
    for call in calls:
        try:
            call()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        else:
            errors.append("no error")
    return errors


def test_use_after_close_is_refused_by_every_method(build):
    coprs, _ = build()
    coprs.close()
    assert use_all(coprs) == ["CoPRSError: CoPRS was closed; load it again with CoPRS.load"] * 5


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_use_in_a_fork_is_refused_by_every_method_and_by_load(build):
    policy = FakePolicy()
    coprs, _ = build(policy)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def in_fork():
        errors = use_all(coprs)
        try:
            CoPRS.load()
        except CoPRSError as error:
            errors.append(f"{type(error).__name__}: {error}")
        coprs.close()
        sender.send((os.getpid(), errors, policy.is_closed))

    process = multiprocessing.get_context("fork").Process(target=in_fork)
    process.start()
    assert receiver.poll(WAIT)
    child, errors, is_closed = receiver.recv()
    process.join(WAIT)
    message = (
        f"CoPRSError: CoPRS was loaded in process {os.getpid()} and is used in its fork {child}, "
        "where the threads of the runtimes do not exist; load it after the fork only, or start "
        'processes with multiprocessing.get_context("spawn")'
    )
    assert errors == [message] * 6
    assert not is_closed
    assert coprs.segment(image_of(), "x").found


def test_request_whose_runner_is_closed_meanwhile_ends_with_our_error(build):
    class ClosedRunner(FakeRunner):
        def _run(self, inputs):
            assert not self.is_closed, "the runner was closed"
            return super()._run(inputs)

    coprs, _ = build(FakePolicy(deltas=("w",)), runner_class=ClosedRunner)
    stream = coprs.stream(image_of(), "x")
    next(stream)
    (embedding,) = coprs._pipeline.cache._entries.values()
    embedding.result(WAIT)
    coprs.close()
    with pytest.raises(CoPRSError, match="CoPRS was closed during the request"):
        list(stream)


@pytest.mark.parametrize("request_", [None, "ab", (1,), (1, 2, 3), {"image": 1}])
def test_segment_many_other_than_pairs_is_refused(build, request_):
    coprs, _ = build()
    results = coprs.segment_many([(image_of(), "x"), request_])
    assert next(results).found
    with pytest.raises(ValueError, match=r"requests contains .*; accepted: pairs of image and"):
        next(results)


def test_segment_many_without_an_iterable_is_refused(build):
    coprs, _ = build()
    with pytest.raises(ValueError, match="requests is 3; accepted: Iterable"):
        next(coprs.segment_many(3))


def test_segment_passes_the_request_to_the_policy_unchanged(build):
    policy = FakePolicy()
    coprs, _ = build(policy)
    coprs.segment(image_of(3), " the cup ", max_targets=2, max_new_tokens=40)
    (request,) = policy.requests
    assert dataclasses.replace(request, image=None) == PolicyRequest(None, " the cup ", 2, 40)
    assert np.array_equal(request.image, image_of(3))
