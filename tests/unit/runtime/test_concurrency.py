"""Many questions, event loops and threads."""

import asyncio
import threading
import time

import numpy as np
import pytest

from coprs_deploy.errors import (
    InstructionError,
)
from coprs_deploy.policy import TextDelta
from coprs_deploy.runtime import CoPRS, PriorEvent, SegmentationResult
from tests.unit.runtime_fakes import (
    WAIT,
    FakePolicy,
    picture,
)


class TestMany:
    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_answers_come_in_the_order_of_the_questions(self, build, concurrency):
        coprs, _ = build(FakePolicy(concurrency=concurrency))
        questions = [(picture(i), f"question {i}") for i in range(7)]
        answers = list(coprs.segment_many(questions))
        assert [a.instruction for a in answers] == [text for _, text in questions]
        assert [int(a.image[0, 0, 0]) for a in answers] == list(range(7))

    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_questions_are_read_one_ahead(self, build, concurrency):
        coprs, _ = build(FakePolicy(concurrency=concurrency))
        read = []

        def questions():
            for i in range(9):
                read.append(i)
                yield picture(i), "x"

        answers = coprs.segment_many(questions())
        assert read == []
        next(answers)
        assert len(read) == concurrency + 1
        next(answers)
        assert len(read) == concurrency + 2
        answers.close()
        assert len(read) == concurrency + 2

    def test_the_next_picture_is_encoded_while_this_answer_is_written(self, build):
        seen = []
        second = threading.Event()

        def encode():
            seen.append(None)
            if len(seen) == 2:
                second.set()

        coprs, _ = build(FakePolicy(words=("w",), during=lambda: second.wait(WAIT)), encode)
        answers = coprs.segment_many([(picture(1), "x"), (picture(2), "x")])
        assert next(answers).found
        assert second.is_set()
        answers.close()

    def test_a_policy_that_serves_several_at_once_is_given_several(self, build):
        together = threading.Barrier(3, timeout=WAIT)  # broken unless three are at work at once
        policy = FakePolicy(words=("w",), during=together.wait, concurrency=3)
        answers = build(policy)[0].segment_many([(picture(i), "x") for i in range(3)])
        assert len(list(answers)) == 3

    def test_targets_are_passed_on(self, build):
        (answer,) = build()[0].segment_many([(picture(), "x")], targets=2)
        assert len(answer.masks) == 2

    def test_no_questions_give_no_answers(self, build):
        assert list(build()[0].segment_many([])) == []

    def test_the_first_question_that_fails_raises(self, build):
        answers = build()[0].segment_many([(picture(), "x"), (picture(), ""), (picture(), "x")])
        with pytest.raises(InstructionError):
            list(answers)

    @pytest.mark.parametrize("bad", [(b"no image", "x"), (picture(), "")])
    def test_answers_before_a_question_that_fails_are_given(self, build, bad):
        answers = build()[0].segment_many([(picture(), "x"), bad])
        assert next(answers).found
        with pytest.raises(ValueError, match=r"not an image|instruction is empty"):
            next(answers)


class TestAsync:
    def test_the_asynchronous_answer_is_the_same(self, build):
        coprs, _ = build()
        expected = coprs.segment(picture(), "x", 2)
        found = asyncio.run(coprs.asegment(picture(), "x", 2))
        assert np.array_equal(found.priors, expected.priors)
        assert found.response == expected.response

    def test_the_asynchronous_stream_has_the_same_events(self, build):
        coprs, _ = build()

        async def collect():
            return [type(event) async for event in coprs.astream(picture(), "x")]

        assert asyncio.run(collect()) == [TextDelta, TextDelta, PriorEvent, SegmentationResult]

    def test_errors_are_raised_to_the_one_who_awaits(self, build):
        coprs, _ = build()
        with pytest.raises(InstructionError):
            asyncio.run(coprs.asegment(picture(), ""))

    def test_the_event_loop_goes_on_while_the_policy_writes(self, build):
        ticked = threading.Event()
        coprs, _ = build(FakePolicy(during=lambda: ticked.wait(WAIT)))

        async def main():
            asyncio.get_running_loop().call_later(0.01, ticked.set)
            return await asyncio.wait_for(coprs.asegment(picture(), "x"), WAIT)

        assert asyncio.run(main()).found
        assert ticked.is_set()

    def test_questions_asked_together_are_all_answered(self, build):
        coprs, _ = build(FakePolicy(concurrency=4))

        async def main():
            return await asyncio.gather(
                *(coprs.asegment(picture(i), f"question {i}") for i in range(4))
            )

        assert [a.instruction for a in asyncio.run(main())] == [f"question {i}" for i in range(4)]

    def test_a_cancelled_question_is_abandoned_and_the_next_one_answered(self, build):
        started, release = threading.Event(), threading.Event()

        def during():
            started.set()
            release.wait(WAIT)

        policy = FakePolicy(words=("w",) * 50, during=during)
        coprs, runners = build(policy)

        async def main():
            task = asyncio.create_task(coprs.asegment(picture(), "x"))
            await asyncio.to_thread(started.wait, WAIT)
            task.cancel()
            asyncio.get_running_loop().call_soon(release.set)
            threading.Timer(0.2, release.set).start()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await coprs.asegment(picture(), "again")

        answer = asyncio.run(main())
        assert answer.instruction == "again"
        assert policy.abandoned == 1
        assert runners["prior"].calls == 1

    def test_cancelling_does_not_hold_up_the_event_loop(self, build):
        started, release = threading.Event(), threading.Event()

        def during():
            started.set()
            release.wait(1)

        coprs, _ = build(FakePolicy(words=("w",), during=during))

        async def main():
            task = asyncio.create_task(coprs.asegment(picture(), "x"))
            await asyncio.to_thread(started.wait, WAIT)
            task.cancel()
            before = time.perf_counter()
            await asyncio.sleep(0.01)
            held_up = time.perf_counter() - before
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            return held_up

        assert asyncio.run(main()) < 0.5

    def test_leaving_an_asynchronous_stream_early_abandons_it(self, build):
        policy = FakePolicy(words=("w",) * 50, during=lambda: time.sleep(0.05))
        coprs, _ = build(policy)

        async def main():
            events = coprs.astream(picture(), "x")
            async for _ in events:
                break
            await events.aclose()

        asyncio.run(main())
        # Nobody waits for the policy to notice, so this does.
        deadline = time.monotonic() + WAIT
        while not policy.abandoned and time.monotonic() < deadline:
            time.sleep(0.01)
        assert policy.abandoned == 1


class TestThreads:
    def test_questions_from_several_threads_do_not_mix(self, tiny_llava_bundle, scene):
        questions = [
            (image, text) for image in (scene, scene[:, ::-1]) for text in ("a disc", "a box")
        ]
        with CoPRS.load(tiny_llava_bundle) as coprs:
            expected = [coprs.segment(*question) for question in questions]
        barrier = threading.Barrier(len(questions), timeout=WAIT)
        found = [None] * len(questions)

        def ask(i):
            barrier.wait()
            found[i] = coprs.segment(*questions[i])

        with CoPRS.load(tiny_llava_bundle) as coprs:
            threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT)
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one.priors, other.priors)
        assert len({answer.priors.tobytes() for answer in expected}) == len(questions)
