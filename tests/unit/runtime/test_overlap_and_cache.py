"""The image encoder beside the policy, kept embeddings, and the times of each stage."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from coprs_deploy.engines.runner import HostTensor
from coprs_deploy.runtime import CoPRS
from coprs_deploy.specs import OptimizationProfile, graph_specs
from tests.unit.runtime_fakes import DIMENSION, GEOMETRY, WAIT, FakePolicy, picture


class TestOverlap:
    def test_the_image_encoder_runs_while_the_policy_writes(self, build):
        both = threading.Barrier(2, timeout=WAIT)  # broken unless both are at work at once
        policy = FakePolicy(words=("one",), during=both.wait)
        coprs, _ = build(policy, encode=both.wait)
        assert coprs.segment(picture(), "x").found

    def test_the_hidden_time_is_what_ran_beside_the_policy(self, build):
        encoded = threading.Event()

        def encode():
            time.sleep(0.05)
            encoded.set()

        coprs, _ = build(FakePolicy(during=lambda: encoded.wait(WAIT)), encode)
        timings = coprs.segment(picture(), "x").timings
        assert timings.image_encoder_ms >= 50
        assert timings.image_encoder_hidden_ms == pytest.approx(timings.image_encoder_ms, rel=0.2)

    def test_time_after_the_policy_is_not_hidden(self, build):
        finished = threading.Event()

        def encode():
            finished.wait(WAIT)
            time.sleep(0.1)

        class Quick(FakePolicy):
            def stream(self, request):
                yield from super().stream(request)
                finished.set()

        timings = build(Quick(), encode)[0].segment(picture(), "x").timings
        assert timings.image_encoder_ms >= 100
        assert timings.image_encoder_hidden_ms <= timings.image_encoder_ms - 90


class TestCache:
    def test_a_second_question_on_a_picture_encodes_nothing(self, build):
        coprs, runners = build()
        first, second = (coprs.segment(picture(9), text) for text in ("x", "y"))
        assert runners["image_encoder"].calls == 1
        assert first.timings.image_encoder_ms > 0
        assert second.timings.image_encoder_ms == second.timings.image_encoder_hidden_ms == 0
        assert np.array_equal(first.priors, second.priors)

    def test_equal_pixels_in_another_shape_are_another_picture(self, build):
        coprs, runners = build()
        coprs.segment(picture(9, (20, 30)), "x")
        coprs.segment(picture(9, (30, 20)), "x")
        assert runners["image_encoder"].calls == 2

    def test_without_a_cache_each_question_encodes(self, build):
        coprs, runners = build(max_cached_images=0)
        for _ in range(2):
            assert coprs.segment(picture(), "x").timings.image_encoder_ms > 0
        assert runners["image_encoder"].calls == 2

    def test_the_picture_that_waited_longest_is_forgotten(self, build):
        coprs, runners = build(max_cached_images=2)
        for value in (1, 2, 1, 3):  # the third picture replaces 2, which waited longer than 1
            coprs.segment(picture(value), "x")
        assert runners["image_encoder"].calls == 3
        coprs.segment(picture(1), "x")
        assert runners["image_encoder"].calls == 3
        coprs.segment(picture(2), "x")
        assert runners["image_encoder"].calls == 4

    def test_an_encoder_that_fails_raises_and_is_asked_again(self, build):
        failures = [RuntimeError("out of memory")]

        def encode():
            if failures:
                raise failures.pop()

        coprs, runners = build(encode=encode)
        with pytest.raises(RuntimeError, match="out of memory"):
            coprs.segment(picture(), "x")
        assert coprs.segment(picture(), "x").found
        assert runners["image_encoder"].calls == 2


class TestTimings:
    def test_the_time_from_the_last_state_to_the_mask_covers_what_happens_there(self, build):
        coprs, runners = build()
        runners["prior"].before = runners["mask_decoder"].before = lambda: time.sleep(0.02)
        timings = coprs.segment(picture(), "x").timings
        assert timings.reference_to_mask_ms >= timings.prior_ms + timings.mask_decoder_ms >= 40
        assert timings.total_ms >= timings.reference_to_mask_ms

    def test_the_policy_says_what_it_waited_wrote_and_kept(self, build):
        class Telling(FakePolicy):
            def stream(self, request):
                *words, result = super().stream(request)
                yield from words
                yield dataclasses.replace(
                    result, queue_ms=5.0, num_cached_tokens=17, preprocess_ms=3.0
                )

        timings = build(Telling())[0].segment(picture(), "x").timings
        assert (timings.queue_ms, timings.cached_prompt_tokens) == (5.0, 17)
        assert timings.policy_image_ms == 3.0
        assert timings.tokens_per_second == pytest.approx(7 / 0.002)

    def test_warming_up_runs_every_stage_and_keeps_nothing(self, build):
        coprs, runners = build()
        timings = coprs.warm_up()
        assert [runner.calls for runner in runners.values()] == [1, 1, 1]
        assert timings.decode_ms == 2.0
        assert len(coprs._cache) == 0

    def test_warming_up_runs_every_number_of_images(self, build):
        coprs, runners = build()
        encoder, sizes = runners["image_encoder"], []
        encoder.spec = graph_specs(GEOMETRY, DIMENSION, images=OptimizationProfile(1, 2, 4))[
            "image_encoder"
        ]

        def run(inputs):
            sizes.append(len(inputs["image"]))
            (output,) = encoder.spec.outputs
            zeros = np.zeros(output.shape_for(sizes[-1]), np.float32)
            return {output.name: HostTensor(zeros)}

        encoder._run = run
        coprs.warm_up()
        assert sizes == [1, 2, 4]

    def test_loading_tells_what_it_does(self, tiny_bundle):
        steps = []
        CoPRS.load(tiny_bundle, progress=steps.append).close()
        assert steps[:2] == [
            "checking the bundle's files",
            "loading graphs and policy (transformers)",
        ]
        assert steps[2].startswith("graphs ready after")
        assert steps[3].startswith("policy ready after")
        assert "transformers qwen2_5_vl on cpu" in steps[3]

    def test_the_policy_can_be_named_in_the_call(self, tiny_bundle):
        with pytest.raises(ValueError, match="policy is 'gpt'; accepted: transformers, vllm"):
            CoPRS.load(tiny_bundle, policy="gpt")
