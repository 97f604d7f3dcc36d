"""Responses whose reasoning is limited, on engine requests that follow a script; without vLLM."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from coprs_deploy.policy import PolicyRequest, StopReason
from coprs_deploy.policy.reasoning_limit import RunningEstimate
from coprs_deploy.policy.vllm_policy.limited import stream_limited
from coprs_deploy.policy.vllm_policy.policy import EngineRequest
from tests.unit.policy.test_greedy import END, IMAGE, MATCH, ScriptedPolicy


@pytest.fixture
def policy():
    """A policy whose first engine request writes the script, and whose second answers at once."""
    scripted = ScriptedPolicy(MATCH + END)

    @contextmanager
    def running(request, response=()):
        engine = EngineRequest(None, None, None, 3, 0, 0.0)
        if not response:
            for token in scripted.ids:
                engine.events.put([token])
        engine.events.put(np.ones((1, 2), np.float32))
        yield engine

    return SimpleNamespace(
        known_text=scripted.known_text,
        tokens=scripted.tokens,
        tail_time=RunningEstimate(),
        max_response_tokens=2000,
        hidden_size=2,
        running=running,
        ids=scripted.ids,
    )


@pytest.mark.parametrize(
    ("options", "text", "stop_reason"),
    [
        ({"max_reasoning_tokens": 0}, "<think></think> <REF_POS>", StopReason.REASONING_BUDGET),
        (
            {"max_reasoning_tokens": 2},
            "<think>The cup</think> <REF_POS>",
            StopReason.REASONING_BUDGET,
        ),
        ({"max_reasoning_tokens": 50}, MATCH, StopReason.TARGETS_REACHED),
        (
            {"max_reasoning_tokens": 50, "max_new_tokens": 6},
            "<think>The cup</think> <REF_POS>",
            StopReason.REASONING_BUDGET,
        ),
    ],
)
def test_limited_response_ends_with_the_tail(policy, options, text, stop_reason):
    *deltas, result = stream_limited(policy, PolicyRequest(IMAGE, "the cup", **options))
    assert "".join(delta.text for delta in deltas) == result.response.text == text
    assert result.stop_reason is stop_reason
    assert result.concentrations.shape == (1, 2)


def test_reader_of_the_text_does_not_count_as_time_of_the_tail(policy):
    for _ in stream_limited(policy, PolicyRequest(IMAGE, "the cup", max_reasoning_tokens=0)):
        time.sleep(0.05)
    assert policy.tail_time.quantile() < 0.05
