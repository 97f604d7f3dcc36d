"""Policy interface: accepted requests, deadline, identifiers and closing."""

import re
import time

import numpy as np
import pytest

from coprs_deploy.errors import InstructionError, RequestTimeoutError
from coprs_deploy.policy import Policy, PolicyRequest, StopReason

IMAGE = np.zeros((4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("instruction", ["", "   ", "\n\t"])
def test_policy_request_empty_instruction_is_refused(instruction):
    with pytest.raises(InstructionError, match="the instruction is empty"):
        PolicyRequest(IMAGE, instruction)


def test_policy_request_instruction_of_another_type_is_refused():
    with pytest.raises(InstructionError, match="instruction is a int; accepted: a str"):
        PolicyRequest(IMAGE, 3)


@pytest.mark.parametrize("name", ["max_targets", "max_new_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_policy_request_limit_below_one_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
        PolicyRequest(IMAGE, "the cup", **{name: value})


@pytest.mark.parametrize("name", ["max_targets", "max_new_tokens"])
@pytest.mark.parametrize("value", ["2", 1.0, float("nan"), True, [1], 1j])
def test_policy_request_limit_of_another_type_is_refused(name, value):
    message = re.escape(f"{name} is {value!r}; accepted: a whole number")
    with pytest.raises(ValueError, match=message):
        PolicyRequest(IMAGE, "the cup", **{name: value})


def test_policy_request_past_its_deadline_error_is_short():
    request = PolicyRequest(IMAGE, "x" * 20_000, deadline=time.perf_counter())
    with pytest.raises(RequestTimeoutError) as refusal:
        request.remaining_s()
    assert len(str(refusal.value)) < 200


def test_policy_request_deadline_gives_the_remaining_time_and_then_an_error():
    now = time.perf_counter()
    assert PolicyRequest(IMAGE, "the cup").remaining_s() is None
    assert 0 < PolicyRequest(IMAGE, "the cup", deadline=now + 600).remaining_s() <= 600
    with pytest.raises(RequestTimeoutError, match="'the cup' passed its deadline"):
        PolicyRequest(IMAGE, "the cup", deadline=now).remaining_s()


def test_stop_reason_values_are_identifiers_with_a_description():
    for reason in StopReason:
        assert reason.value == reason.name.lower()
        assert " " in reason.description


def test_policy_with_block_closes_it_after_an_error():
    class RecordedPolicy(Policy):
        num_closed = 0

        def stream(self, request):
            raise NotImplementedError

        def close(self):
            self.num_closed += 1

    policy = RecordedPolicy()
    with pytest.raises(KeyError), policy:
        raise KeyError
    assert policy.num_closed == 1
