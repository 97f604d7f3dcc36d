"""Deadlines of requests, with a fake clock."""

import threading

import pytest

from coprs_deploy.policy.reasoning_limit import RunningEstimate
from coprs_deploy.runtime.deadline import DeadlineEstimates
from tests.unit.runtime_fakes import WAIT, FakePolicy, image_of


@pytest.fixture
def estimates():
    found = DeadlineEstimates(clock=lambda: 100.02)
    for seconds in (0.030, 0.031, 0.050):
        found.masks.add(seconds)
        found.prompt.add(0.1)
        found.encoder.add(0.3)
    return found


def test_reasoning_deadline_reserves_a_slow_mask(estimates):
    due = estimates.reasoning_deadline(100.0, 500, is_encoded=False)
    assert due == pytest.approx(100.45)
    assert estimates.reasoning_deadline(100.0, None, is_encoded=False) is None


def test_deadline_that_cannot_be_met_is_refused_with_the_times(estimates):
    message = r"deadline_ms is 350; a mask without reasoning takes 351 ms here: 20 until .* 31 for"
    with pytest.raises(ValueError, match=message):
        estimates.reasoning_deadline(100.0, 350, is_encoded=False)
    assert estimates.reasoning_deadline(100.0, 350, is_encoded=True) == pytest.approx(100.3)
    with pytest.raises(ValueError, match="without reasoning takes 151 ms"):
        estimates.reasoning_deadline(100.0, 150, is_encoded=True)


def test_deadline_without_measurements_is_refused():
    with pytest.raises(ValueError, match=r"call warm_up\(\) before the first request with a dead"):
        DeadlineEstimates().reasoning_deadline(0.0, 500, is_encoded=False)


def test_estimate_covers_nine_of_ten_recent_durations():
    estimate = RunningEstimate()
    assert estimate.quantile() is None
    for value in range(1, 11):
        estimate.add(value)
    assert estimate.quantile() == 9
    assert estimate.quantile(0.5) == 5
    for _ in range(40):
        estimate.add(2)
    assert estimate.quantile() == 2


def test_estimate_is_read_while_another_thread_adds_a_duration():
    class Recorded(float):
        def __ge__(self, oldest):
            estimate.add(9)  # where another thread may run
            return super().__ge__(oldest)

    estimate = RunningEstimate(lambda: Recorded(100.0))
    for value in (1, 2, 3):
        estimate.add(value)
    assert estimate.quantile(0.5) == 2


def test_deadline_refused_after_a_busy_moment_is_tried_again():
    now = 100.0
    clock = lambda: now  # noqa: E731
    found = DeadlineEstimates(*(RunningEstimate(clock) for _ in range(3)), clock=clock)
    for _ in range(40):  # more than the window
        found.prompt.add(0.9)
        found.masks.add(0.1)
    with pytest.raises(ValueError, match="without reasoning takes 1000 ms"):
        found.reasoning_deadline(now, 500, is_encoded=True)
    now += 11
    assert found.reasoning_deadline(now, 500, is_encoded=True) == pytest.approx(now + 0.4)
    with pytest.raises(ValueError, match="600 until the request was read"):
        found.reasoning_deadline(now - 0.6, 500, is_encoded=True)  # too late in any case
    found.prompt.add(0.2)
    found.masks.add(0.1)
    assert found.reasoning_deadline(now, 310, is_encoded=True) == pytest.approx(now + 0.21)
    with pytest.raises(ValueError, match="without reasoning takes 300 ms"):
        found.reasoning_deadline(now, 290, is_encoded=True)


def test_request_with_a_deadline_reaches_the_policy_with_time_for_the_mask(build):
    policy = FakePolicy()
    coprs, _ = build(policy)
    with pytest.raises(ValueError, match="call warm_up"):
        coprs.segment(image_of(), "x", deadline_ms=60_000)
    assert len(coprs._pipeline.cache._num_waiting) == 0
    coprs.warm_up()
    coprs.segment(image_of(), "x", deadline_ms=60_000)
    coprs.segment(image_of(), "x", reasoning="none")
    coprs.segment(image_of(), "x", max_reasoning_tokens=7)
    deadline, none, budget = policy.requests[-3:]
    assert deadline.reasoning_deadline is not None
    assert deadline.max_reasoning_tokens is None
    assert (none.reasoning_deadline, none.max_reasoning_tokens) == (None, 0)
    assert budget.max_reasoning_tokens == 7


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"reasoning": "some"}, "reasoning is 'some'; accepted: full, none"),
        ({"reasoning": "none", "max_reasoning_tokens": 3}, "accepted: one of the two"),
        ({"max_reasoning_tokens": 0}, "max_reasoning_tokens is 0"),
        ({"deadline_ms": 0}, "deadline_ms is 0"),
        ({"deadline_ms": "soon"}, "deadline_ms is 'soon'"),
    ],
)
def test_segment_unusable_limits_are_refused(build, limits, message):
    policy = FakePolicy()
    coprs, _ = build(policy)
    with pytest.raises(ValueError, match=message):
        coprs.segment(image_of(), "x", **limits)
    assert policy.requests == []


def test_deadline_leaves_time_for_the_image_encoder_until_it_has_run(build, monkeypatch):
    release = threading.Event()
    coprs, _ = build(encode=lambda: release.wait(WAIT))
    found = []

    def record(start, deadline_ms, *, is_encoded):
        found.append(is_encoded)

    monkeypatch.setattr(coprs._pipeline._estimates, "reasoning_deadline", record)
    streams = [coprs.stream(image_of(), "x") for _ in range(3)]
    next(streams[0]), next(streams[1])
    release.set()
    list(streams[0])
    next(streams[2])
    assert found == [False, False, True]
    for stream in streams:
        stream.close()
