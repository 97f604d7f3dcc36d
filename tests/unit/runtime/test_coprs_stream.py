"""CoPRS streams, and refusals before anything runs."""

import numpy as np
import pytest

from coprs_deploy.errors import ImageDecodeError, InstructionError, PolicyError
from coprs_deploy.images import prepare_image
from coprs_deploy.logits import resize_logits
from coprs_deploy.policy import TextDelta
from coprs_deploy.runtime import CoPRS, PriorEvent
from tests.unit.runtime_fakes import GEOMETRY, FakePolicy, FakeRunner, image_of


class TestStream:
    def test_stream_yields_text_then_prior_then_result(self, build):
        coprs, _ = build()
        *deltas, prior, result = coprs.stream(image_of(), "x", max_targets=2)
        assert deltas == [TextDelta("some"), TextDelta(" text")]
        assert isinstance(prior, PriorEvent)
        assert prior.prior_logits.shape == (2, 20, 30)
        assert np.array_equal(prior.prior_logits, result.prior_logits)
        assert np.array_equal(prior.prior, result.prior)
        assert result.response == "some text"

    def test_stream_yields_text_as_it_is_written(self, build):
        written = []
        coprs, _ = build(FakePolicy(deltas=("a", "b"), during=lambda: written.append(None)))
        events = coprs.stream(image_of(), "x")
        next(events)
        assert len(written) == 1
        next(events)
        assert len(written) == 2
        events.close()

    def test_stream_yields_the_prior_before_masks_are_decoded(self, build):
        coprs, runners = build()
        for event in coprs.stream(image_of(), "x"):
            if isinstance(event, PriorEvent):
                assert (runners["prior"].calls, runners["mask_decoder"].calls) == (1, 0)
        assert runners["mask_decoder"].calls == 1

    def test_stream_runs_fused_graphs_separately(self, build):
        fused_calls = []

        class FusableRunner(FakeRunner):
            def fused_with(self, following):
                return Fused(self, following)

        class Fused:
            def __init__(self, prior, mask_decoder):
                self.prior, self.mask_decoder = prior, mask_decoder

            def __call__(self, image_embedding, concentration, unpadded_size):
                fused_calls.append(len(concentration))
                prior = self.prior(image_embedding=image_embedding, concentration=concentration)
                mask = self.mask_decoder(
                    image_embedding=image_embedding, unpadded_size=unpadded_size, **prior
                )
                return prior | mask

            def close(self):
                pass

        coprs, _ = build(runner_class=FusableRunner)
        whole = coprs.segment(image_of(), "x", max_targets=2)
        assert fused_calls == [1, 1]
        assert whole.timings.prior_ms == 0 < whole.timings.mask_decoder_ms
        *_, prior, streamed = coprs.stream(image_of(), "x", max_targets=2)
        assert fused_calls == [1, 1]
        assert streamed.timings.prior_ms > 0
        for result in (whole, streamed):
            assert np.array_equal(result.prior_logits, prior.prior_logits)
            assert np.array_equal(result.masks, streamed.masks)
            assert np.array_equal(result.mask_logits, streamed.mask_logits)

    def test_stream_starts_nothing_before_the_first_event(self, build):
        coprs, runners = build()
        events = coprs.stream(image_of(), "x")
        assert runners["image_encoder"].calls == 0
        events.close()

    def test_stream_closed_early_abandons_the_policy(self, build):
        policy = FakePolicy()
        coprs, runners = build(policy)
        events = coprs.stream(image_of(), "x")
        next(events)
        events.close()
        assert policy.num_abandoned == 1
        assert runners["prior"].calls == 0
        assert coprs.segment(image_of(), "x").found

    def test_stream_closed_early_leaves_a_real_policy_usable(self, tiny_llava_bundle, scene):
        with CoPRS.load(tiny_llava_bundle) as coprs:
            expected = coprs.segment(scene, "the red disc")
            events = coprs.stream(scene, "something else")
            next(events)
            events.close()
            result = coprs.segment(scene, "the red disc")
        assert np.array_equal(result.prior_logits, expected.prior_logits)

    def test_segment_decodes_targets_in_order(self, build):
        coprs, runners = build()
        result = coprs.segment(image_of(), "x", max_targets=3)
        assert runners["prior"].calls == runners["mask_decoder"].calls == 3
        # Concentrations start at 11; the fake mask decoder subtracts 10.
        np.testing.assert_allclose(result.prior_logits.mean(axis=(1, 2)), [11, 12, 13], rtol=1e-6)
        assert result.masks.all()

    def test_segment_resizes_logits_to_the_original_size(self, build):
        coprs, _ = build()
        rgb = image_of(shape=(21, 57))
        result = coprs.segment(rgb, "x")
        prepared = prepare_image(rgb, GEOMETRY)
        logits = np.full((1, 1, GEOMETRY.mask_size, GEOMETRY.mask_size), 11, dtype=np.float32)
        assert np.array_equal(result.prior_logits, resize_logits(logits, prepared, GEOMETRY))


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"instruction": ""}, InstructionError, "the instruction is empty"),
            ({"instruction": " \n"}, InstructionError, "the instruction is empty"),
            ({"instruction": None}, InstructionError, "instruction is a NoneType"),
            ({"max_targets": 0}, ValueError, "max_targets is 0"),
            ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
            ({"image": b"no image"}, ImageDecodeError, "not an image"),
            ({"image": 5}, ValueError, "image is a int"),
        ],
    )
    def test_segment_invalid_arguments_are_refused_before_anything_runs(
        self, build, arguments, error, message
    ):
        policy = FakePolicy()
        coprs, runners = build(policy)
        with pytest.raises(error, match=message):
            coprs.segment(**{"image": image_of(), "instruction": "x", **arguments})
        assert runners["image_encoder"].calls == 0
        assert policy.requests == []

    def test_segment_policy_without_a_result_is_an_error(self, build):
        class SilentPolicy(FakePolicy):
            def stream(self, request):
                yield TextDelta("well")

        with pytest.raises(PolicyError, match="fake policy ended without a result"):
            build(SilentPolicy())[0].segment(image_of(), "x")

    def test_segment_after_a_failed_request_succeeds(self, build):
        failures = [PolicyError("it broke")]

        def during():
            if failures:
                raise failures.pop()

        coprs, _ = build(FakePolicy(during=during))
        with pytest.raises(PolicyError, match="it broke"):
            coprs.segment(image_of(), "x")
        assert coprs.segment(image_of(), "x").found
