"""CoPRS with many requests, event loops and threads."""

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from coprs_deploy.errors import CoPRSError, InstructionError
from coprs_deploy.policy import TextDelta
from coprs_deploy.runtime import CoPRS, PriorEvent, SegmentationResult
from coprs_deploy.runtime import coprs as coprs_module
from tests.unit.runtime_fakes import WAIT, FakePolicy, image_of, join_stream_threads


class TestSegmentMany:
    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_segment_many_keeps_the_order_of_the_requests(self, build, concurrency):
        coprs, _ = build(FakePolicy(concurrency=concurrency))
        requests = [(image_of(i), f"instruction {i}") for i in range(7)]
        results = list(coprs.segment_many(requests))
        assert [r.instruction for r in results] == [text for _, text in requests]
        assert [int(r.image[0, 0, 0]) for r in results] == list(range(7))

    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_segment_many_reads_one_request_ahead(self, build, concurrency):
        coprs, _ = build(FakePolicy(concurrency=concurrency))
        read = []

        def requests():
            for i in range(9):
                read.append(i)
                yield image_of(i), "x"

        results = coprs.segment_many(requests())
        assert read == []
        next(results)
        assert len(read) == concurrency + 1
        next(results)
        assert len(read) == concurrency + 2
        results.close()
        assert len(read) == concurrency + 2

    def test_segment_many_encodes_the_next_image_while_the_policy_decodes(self, build):
        calls = []
        second = threading.Event()

        def encode():
            calls.append(None)
            if len(calls) == 2:
                second.set()

        coprs, _ = build(FakePolicy(deltas=("w",), during=lambda: second.wait(WAIT)), encode)
        results = coprs.segment_many([(image_of(1), "x"), (image_of(2), "x")])
        assert next(results).found
        assert second.is_set()
        results.close()

    def test_segment_many_uses_the_concurrency_of_the_policy(self, build):
        barrier = threading.Barrier(3, timeout=WAIT)  # broken unless three run at once
        policy = FakePolicy(deltas=("w",), during=barrier.wait, concurrency=3)
        results = build(policy)[0].segment_many([(image_of(i), "x") for i in range(3)])
        assert len(list(results)) == 3

    def test_segment_many_passes_max_targets_on(self, build):
        (result,) = build()[0].segment_many([(image_of(), "x")], max_targets=2)
        assert len(result.masks) == 2

    def test_segment_many_without_requests_yields_nothing(self, build):
        assert list(build()[0].segment_many([])) == []

    def test_segment_many_raises_the_first_error(self, build):
        results = build()[0].segment_many([(image_of(), "x"), (image_of(), ""), (image_of(), "x")])
        with pytest.raises(InstructionError):
            list(results)

    @pytest.mark.parametrize("invalid", [(b"no image", "x"), (image_of(), "")])
    def test_segment_many_yields_the_results_before_an_invalid_request(self, build, invalid):
        results = build()[0].segment_many([(image_of(), "x"), invalid])
        assert next(results).found
        with pytest.raises(ValueError, match=r"not an image|instruction is empty"):
            next(results)

    def test_segment_many_deadline_runs_from_the_turn_of_a_request(self, build):
        policy = FakePolicy(deltas=("w",), during=lambda: time.sleep(0.05))
        coprs, _ = build(policy)
        coprs.warm_up()
        policy.requests.clear()
        list(coprs.segment_many([(image_of(i), "x") for i in range(3)], deadline_ms=60_000))
        due = [request.reasoning_deadline for request in policy.requests]
        assert all(later - earlier >= 0.05 for earlier, later in pairwise(due))

    def test_segment_many_ended_before_the_turn_of_a_request_releases_its_image(
        self, build, monkeypatch
    ):
        class BusyPool(ThreadPoolExecutor):
            def submit(self, *work):
                return Future()

        def requests():
            yield image_of(), "x"
            raise KeyError

        monkeypatch.setattr(coprs_module, "ThreadPoolExecutor", BusyPool)
        coprs, _ = build()
        with pytest.raises(KeyError):
            list(coprs.segment_many(requests()))
        assert not coprs._pipeline.cache._num_waiting


class TestAsync:
    def test_asegment_equals_segment(self, build):
        coprs, _ = build()
        expected = coprs.segment(image_of(), "x", 2)
        result = asyncio.run(coprs.asegment(image_of(), "x", 2))
        assert np.array_equal(result.prior_logits, expected.prior_logits)
        assert result.response == expected.response

    def test_astream_has_the_events_of_stream(self, build):
        coprs, _ = build()

        async def collect():
            return [type(event) async for event in coprs.astream(image_of(), "x")]

        assert asyncio.run(collect()) == [TextDelta, TextDelta, PriorEvent, SegmentationResult]

    def test_asegment_invalid_instruction_raises(self, build):
        coprs, _ = build()
        with pytest.raises(InstructionError):
            asyncio.run(coprs.asegment(image_of(), ""))

    def test_asegment_does_not_block_the_event_loop(self, build):
        begun, ticked = asyncio.Event(), threading.Event()

        async def main():
            loop = asyncio.get_running_loop()

            def during():
                loop.call_soon_threadsafe(begun.set)
                assert ticked.wait(WAIT)

            coprs, _ = build(FakePolicy(deltas=("w",), during=during))
            task = asyncio.create_task(coprs.asegment(image_of(), "x"))
            await asyncio.wait_for(begun.wait(), WAIT)
            ticked.set()  # the loop runs while the policy waits
            return await task

        assert asyncio.run(main()).found

    def test_asegment_concurrent_requests_are_all_served(self, build):
        coprs, _ = build(FakePolicy(concurrency=4))

        async def main():
            return await asyncio.gather(*(coprs.asegment(image_of(i), f"{i}") for i in range(4)))

        assert [r.instruction for r in asyncio.run(main())] == [f"{i}" for i in range(4)]

    def test_asegment_cancelled_abandons_the_request_and_serves_the_next(self, build):
        begun, release = threading.Event(), threading.Event()

        def during():
            begun.set()
            assert release.wait(WAIT)

        policy = FakePolicy(deltas=("w",) * 50, during=during)
        coprs, runners = build(policy)

        async def main():
            task = asyncio.create_task(coprs.asegment(image_of(), "x"))
            await asyncio.to_thread(begun.wait, WAIT)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            release.set()
            return await coprs.asegment(image_of(), "again")

        result = asyncio.run(main())
        join_stream_threads()
        assert result.instruction == "again"
        assert policy.num_abandoned == 1
        assert runners["prior"].calls == 1

    @pytest.mark.parametrize("method", ["asegment", "astream_instructions"])
    def test_cancelled_request_takes_no_further_turn(self, build, method):
        begun, release = threading.Event(), threading.Event()
        requests = []

        def during():
            begun.set()
            assert release.wait(WAIT)

        policy = FakePolicy(deltas=("w",), during=during)
        stream = policy.stream
        policy.stream = lambda request: requests.append(request) or stream(request)
        coprs, _ = build(policy)

        async def ask():
            if method == "asegment":
                await coprs.asegment(image_of(), "x")
            else:
                async for _ in coprs.astream_instructions(image_of(), ["x"]):
                    pass

        async def main():
            task = asyncio.create_task(ask())
            await asyncio.to_thread(begun.wait, WAIT)
            assert requests[0].remaining_s() is None
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(CoPRSError, match="the request was abandoned"):
                requests[0].remaining_s()

        try:
            asyncio.run(main())
        finally:
            release.set()
        join_stream_threads()

    def test_asegment_cancelled_returns_while_the_policy_still_runs(self, build):
        begun, release = threading.Event(), threading.Event()

        def during():
            begun.set()
            assert release.wait(WAIT)

        policy = FakePolicy(deltas=("w",), during=during)
        coprs, _ = build(policy)

        async def main():
            task = asyncio.create_task(coprs.asegment(image_of(), "x"))
            await asyncio.to_thread(begun.wait, WAIT)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return policy.num_abandoned  # the policy is blocked until the release

        try:
            assert asyncio.run(main()) == 0
        finally:
            release.set()
        assert policy.was_abandoned.wait(WAIT)

    def test_astream_closed_early_abandons_the_request(self, build):
        policy = FakePolicy(deltas=("w",) * 50)
        coprs, _ = build(policy)

        async def main():
            events = coprs.astream(image_of(), "x")
            async for _ in events:
                break
            await events.aclose()

        asyncio.run(main())
        assert policy.was_abandoned.wait(WAIT)
        assert policy.num_abandoned == 1


class TestThreads:
    def test_segment_from_several_threads_does_not_mix_requests(self, tiny_llava_bundle, scene):
        requests = [
            (image, text) for image in (scene, scene[:, ::-1]) for text in ("a disc", "a box")
        ]
        with CoPRS.load(tiny_llava_bundle) as coprs:
            expected = [coprs.segment(*request) for request in requests]
        barrier = threading.Barrier(len(requests), timeout=WAIT)
        results = [None] * len(requests)

        def run(i):
            barrier.wait()
            results[i] = coprs.segment(*requests[i])

        with CoPRS.load(tiny_llava_bundle) as coprs:
            threads = [threading.Thread(target=run, args=(i,)) for i in range(len(requests))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT)
        for one, other in zip(results, expected, strict=True):
            assert np.array_equal(one.prior_logits, other.prior_logits)
        assert len({result.prior_logits.tobytes() for result in expected}) == len(requests)
