"""Queues, timeouts, cancellation and the end."""

import dataclasses
import threading
import time

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
from tests.unit.runtime_fakes import WAIT, FakePolicy, picture


class TestLimits:
    def test_a_question_beyond_the_queue_is_refused_at_once(self, build):
        coprs, runners = build(max_queue_size=1)
        streams = [coprs.stream(picture(), "x") for _ in range(2)]
        for stream in streams:
            next(stream)
        with pytest.raises(QueueFullError, match="2 answers are under way"):
            coprs.segment(picture(1), "x")
        streams[0].close()
        assert coprs.segment(picture(), "x").found
        streams[1].close()
        assert runners["image_encoder"].calls == 1  # the refused picture was not encoded

    def test_places_are_left_by_answers_and_by_failures(self, build):
        coprs, _ = build(max_queue_size=0)
        for _ in range(3):
            assert coprs.segment(picture(), "x").found
            with pytest.raises(InstructionError):
                coprs.segment(picture(), " ")

    def test_an_answer_that_takes_too_long_is_abandoned(self, build):
        policy = FakePolicy()
        policy.during = lambda: [policy.requests[-1].remaining_s(), time.sleep(0.06)]
        coprs, _ = build(policy, timeout_s=0.05)
        with pytest.raises(RequestTimeoutError, match="'the cup' passed its deadline"):
            coprs.segment(picture(), "the cup")
        assert policy.abandoned == 1

    def test_an_image_encoder_that_takes_too_long_is_not_waited_for(self, build):
        release = threading.Event()
        coprs, _ = build(encode=lambda: release.wait(WAIT), timeout_s=0.05)
        with pytest.raises(RequestTimeoutError):
            coprs.segment(picture(), "x")
        release.set()

    def test_a_real_policy_stops_at_the_deadline(self, tiny_bundle, scene):
        with CoPRS.load(tiny_bundle, RuntimeOptions(timeout_s=1e-4)) as coprs:
            with pytest.raises(RequestTimeoutError):
                coprs.segment(scene, "the red disc")
            assert coprs._admission.taken == 0

    @pytest.mark.parametrize("options", [{"max_queue_size": -1}, {"timeout_s": 0}])
    def test_limits_out_of_range_are_refused(self, options):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} is"):
            RuntimeOptions(**options)

    def test_an_encoding_that_nobody_waits_for_is_called_off(self, build):
        begun, release = threading.Event(), threading.Event()

        def encode():
            begun.set()
            release.wait(WAIT)

        coprs, runners = build(encode=encode)
        streams = [coprs.stream(picture(value), "x") for value in (1, 2)]
        for stream in streams:
            next(stream)
        assert begun.wait(WAIT)
        streams[1].close()
        release.set()
        assert list(streams[0])[-1].found
        assert coprs.segment(picture(3), "x").found
        assert runners["image_encoder"].calls == 2  # of the pictures 1 and 3


class TestClosing:
    def test_an_answer_that_waits_for_its_embedding_ends_with_an_error(self, build):
        begun, release = threading.Event(), threading.Event()

        def encode():
            begun.set()
            release.wait(WAIT)

        coprs, _ = build(encode=encode)
        first, second = (coprs.stream(picture(value), "x") for value in (1, 2))
        next(first), next(second)
        assert begun.wait(WAIT)
        closing = threading.Thread(target=coprs.close)
        closing.start()
        with pytest.raises(CoPRSError, match="was closed while it answered"):
            for _ in second:
                pass
        release.set()
        closing.join(WAIT)
        first.close()

    def test_leaving_the_block_closes_graphs_policy_and_threads(self, build):
        policy = FakePolicy()
        coprs, runners = build(policy)
        with coprs as same:
            assert same is coprs
            coprs.segment(picture(), "x")
        assert policy.is_closed
        assert all(runner.is_closed for runner in runners.values())
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith(("image-encoder", "segment"))]

    def test_leaving_the_block_with_an_error_closes_too(self, build):
        policy = FakePolicy()
        coprs, _ = build(policy)
        with pytest.raises(KeyError), coprs:
            raise KeyError
        assert policy.is_closed

    def test_closing_twice_is_harmless(self, build):
        coprs, _ = build()
        coprs.close()
        coprs.close()

    def test_requests_are_passed_on_as_they_were_asked(self, build):
        policy = FakePolicy()
        coprs, _ = build(policy)
        coprs.segment(picture(3), " the cup ", targets=2, max_new_tokens=40)
        (request,) = policy.requests
        assert dataclasses.replace(request, image=None) == PolicyRequest(None, " the cup ", 2, 40)
        assert np.array_equal(request.image, picture(3))
