"""Closing the vLLM policy while requests begin, on an engine that does nothing; without vLLM."""

import threading
import time

import numpy as np
import pytest

from coprs_deploy.errors import PolicyError
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.policy.vllm_policy import engine as engine_module
from coprs_deploy.policy.vllm_policy.engine import EngineThread
from coprs_deploy.policy.vllm_policy.policy import EngineRequest, VllmPolicy
from coprs_deploy.policy.vllm_policy.transport import HiddenStateTransport
from tests.unit.runtime_fakes import WAIT


@pytest.fixture
def engine(monkeypatch):
    async def start(arguments):
        return None

    async def stop(engine):
        pass

    monkeypatch.setattr(engine_module, "_start_engine", start)
    monkeypatch.setattr(engine_module, "_stop_engine", stop)
    thread = EngineThread(None)
    yield thread
    thread.close()


@pytest.fixture
def policy(engine, tmp_path, monkeypatch):
    class Idle(VllmPolicy):
        def __init__(self):
            self._engine = engine
            self._transport = HiddenStateTransport(4, tmp_path)

        def _encode(self, request, path, response=()):
            return EngineRequest(None, None, path, 0, 0, 0.0)

        async def _decode(self, engine, running):
            await engine.wait()

    opened = Idle()
    yield opened
    opened._transport.close()


@pytest.fixture
def busy(engine):
    """Keep the event loop busy until the event is set."""
    is_free = threading.Event()
    engine._loop.call_soon_threadsafe(is_free.wait, WAIT)
    yield is_free
    is_free.set()


def test_request_that_is_cancelled_before_it_begins_ends_with_an_error(policy, engine, busy):
    image = np.zeros((4, 4, 3), np.uint8)
    request = PolicyRequest(image, "x", deadline=time.perf_counter() + 5)
    closing = threading.Thread(target=engine.close)
    with policy.running(request) as running:
        closing.start()
        with pytest.raises(PolicyError, match="the policy was closed during the request"):
            running.next_event(request)
    busy.set()
    closing.join(WAIT)
    assert not closing.is_alive()


def test_work_submitted_while_the_engine_closes_is_cancelled(engine, monkeypatch):
    async def work():
        raise AssertionError("it ran")

    late, tasks = work(), []
    join = engine._thread.join

    def join_then_submit():
        join()
        tasks.append(engine.submit(late))

    monkeypatch.setattr(engine._thread, "join", join_then_submit)
    engine.close()
    late.close()
    assert tasks[0].cancelled()
    with pytest.raises(PolicyError, match="the policy was closed"):
        engine.submit(work())
