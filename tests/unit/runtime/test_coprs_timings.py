"""CoPRS timings: overlap of image encoder and policy, cached embeddings, and warm-up."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from coprs_deploy.engines.runner import HostTensor
from coprs_deploy.runtime import PriorEvent
from coprs_deploy.runtime.encoder import PendingEmbedding
from coprs_deploy.specs import OptimizationProfile, graph_specs
from tests.unit.runtime_fakes import DIMENSION, GEOMETRY, WAIT, FakePolicy, FakeRunner, image_of


class TestOverlap:
    def test_image_encoder_runs_concurrently_with_the_policy(self, build):
        both = threading.Barrier(2, timeout=WAIT)  # broken unless both run at once
        policy = FakePolicy(deltas=("one",), during=both.wait)
        coprs, _ = build(policy, encode=both.wait)
        timings = coprs.segment(image_of(), "x").timings
        assert 0 < timings.image_encoder_overlap_ms <= timings.image_encoder_ms

    def test_image_encoder_time_after_the_policy_is_no_overlap(self, build, monkeypatch):
        policy_ended = threading.Event()
        wait = PendingEmbedding.wait

        def wait_after_release(self, request):
            policy_ended.set()
            return wait(self, request)

        monkeypatch.setattr(PendingEmbedding, "wait", wait_after_release)
        coprs, _ = build(encode=lambda: policy_ended.wait(WAIT))
        timings = coprs.segment(image_of(), "x").timings
        assert timings.image_encoder_overlap_ms < timings.image_encoder_ms


class TestCache:
    def test_second_request_on_an_image_encodes_nothing(self, build):
        coprs, runners = build()
        first, second = (coprs.segment(image_of(9), text) for text in ("x", "y"))
        assert runners["image_encoder"].calls == 1
        assert first.timings.image_encoder_ms > 0
        assert second.timings.image_encoder_ms == second.timings.image_encoder_overlap_ms == 0
        assert np.array_equal(first.prior_logits, second.prior_logits)
        assert len(coprs._pipeline.cache) == 1

    def test_equal_pixels_of_another_shape_are_another_image(self, build):
        coprs, runners = build()
        coprs.segment(image_of(9, (20, 30)), "x")
        coprs.segment(image_of(9, (30, 20)), "x")
        assert runners["image_encoder"].calls == 2

    def test_disabled_cache_encodes_every_request(self, build):
        coprs, runners = build(max_cached_images=0)
        for _ in range(2):
            assert coprs.segment(image_of(), "x").timings.image_encoder_ms > 0
        assert runners["image_encoder"].calls == 2
        assert len(coprs._pipeline.cache) == 0

    def test_full_cache_evicts_the_least_recently_used_image(self, build):
        coprs, runners = build(max_cached_images=2)
        for value in (1, 2, 1, 3):  # 3 replaces 2, which was used before 1
            coprs.segment(image_of(value), "x")
        assert runners["image_encoder"].calls == 3
        coprs.segment(image_of(1), "x")
        assert runners["image_encoder"].calls == 3
        coprs.segment(image_of(2), "x")
        assert runners["image_encoder"].calls == 4

    def test_failing_image_encoder_raises_and_is_retried_by_the_next_request(self, build):
        failures = [RuntimeError("out of memory")]

        def encode():
            if failures:
                raise failures.pop()

        coprs, runners = build(encode=encode)
        with pytest.raises(RuntimeError, match="out of memory"):
            coprs.segment(image_of(), "x")
        assert coprs.segment(image_of(), "x").found
        assert runners["image_encoder"].calls == 2


class TestTimings:
    def test_reference_to_mask_covers_prior_mask_decoder_and_resize(self, build):
        coprs, _ = build()
        timings = coprs.segment(image_of(), "x").timings
        parts = timings.prior_ms + timings.mask_decoder_ms + timings.resize_ms
        assert 0 < parts <= timings.reference_to_mask_ms <= timings.total_ms

    def test_reader_of_a_stream_does_not_count_as_time_of_the_masks(self, build):
        coprs, _ = build()
        for event in coprs.stream(image_of(), "x"):
            if isinstance(event, PriorEvent):
                time.sleep(0.2)
        assert event.timings.reference_to_mask_ms < 200
        assert coprs._pipeline._estimates.masks.quantile() < 0.2

    def test_policy_timings_and_token_counts_are_passed_on(self, build):
        class DetailedPolicy(FakePolicy):
            def stream(self, request):
                *deltas, result = super().stream(request)
                yield from deltas
                yield dataclasses.replace(
                    result, queue_ms=5.0, num_cached_tokens=17, preprocess_ms=3.0
                )

        timings = build(DetailedPolicy())[0].segment(image_of(), "x").timings
        assert (timings.queue_ms, timings.policy_preprocess_ms) == (5.0, 3.0)
        assert (timings.prefill_ms, timings.decode_ms) == (1.0, 2.0)
        assert (timings.prompt_tokens, timings.cached_prompt_tokens) == (21, 17)
        assert timings.response_tokens == 7
        assert timings.tokens_per_second == pytest.approx(7 / 0.002)


class TestWarmUp:
    def test_warm_up_runs_every_graph_and_caches_nothing(self, build):
        coprs, runners = build()
        timings = coprs.warm_up()
        assert [runner.calls for runner in runners.values()] == [2, 2, 2]
        assert timings.decode_ms == 2.0
        assert len(coprs._pipeline.cache) == 0

    def test_warm_up_requests_have_the_token_budget_of_others(self, build):
        policy = FakePolicy()
        build(policy)[0].warm_up()
        limits = [(each.max_new_tokens, each.max_reasoning_tokens) for each in policy.requests]
        assert limits == [(None, 4)] * 2

    def test_warm_up_runs_every_batch_size_of_the_profile(self, build):
        sizes = []
        specs = graph_specs(GEOMETRY, DIMENSION, images=OptimizationProfile(1, 2, 4))

        class BatchRunner(FakeRunner):
            def __init__(self, name, before):
                super().__init__(name, before)
                self.spec = specs[name]

            def _run(self, inputs):
                if self.spec.name != "image_encoder":
                    return super()._run(inputs)
                sizes.append(len(inputs["image"]))
                (output,) = self.spec.outputs
                zeros = np.zeros(output.shape_for(sizes[-1]), np.float32)
                return {output.name: HostTensor(zeros)}

        coprs, _ = build(runner_class=BatchRunner)
        coprs.warm_up()
        assert sizes == [1, 2, 4, 1]  # the last is a whole request
