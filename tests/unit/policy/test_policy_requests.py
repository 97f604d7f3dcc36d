"""What a question to a policy may be, and how a policy is closed."""

import numpy as np
import pytest

from coprs_deploy.errors import InstructionError
from coprs_deploy.policy import Policy, PolicyRequest

PICTURE = np.zeros((4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("instruction", ["", "   ", "\n\t"])
def test_an_empty_instruction_is_refused(instruction):
    with pytest.raises(InstructionError, match="the instruction is empty"):
        PolicyRequest(PICTURE, instruction)


def test_an_instruction_that_is_no_text_is_refused():
    with pytest.raises(InstructionError, match="instruction is a int; accepted: a str"):
        PolicyRequest(PICTURE, 3)


@pytest.mark.parametrize("name", ["targets", "max_new_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
        PolicyRequest(PICTURE, "the cup", **{name: value})


def test_leaving_the_block_closes_a_policy_even_after_an_error():
    class Recorded(Policy):
        closed = 0

        def stream(self, request):
            raise NotImplementedError

        def close(self):
            self.closed += 1

    policy = Recorded()
    with pytest.raises(KeyError), policy:
        raise KeyError
    assert policy.closed == 1
