"""Answers piece by piece, and what is refused before they start."""

import numpy as np
import pytest

from coprs_deploy.errors import (
    ImageDecodeError,
    InstructionError,
    PolicyError,
)
from coprs_deploy.images import prepare_image, resize_logits
from coprs_deploy.policy import TextDelta
from coprs_deploy.runtime import CoPRS, PriorEvent
from tests.unit.runtime_fakes import GEOMETRY, FakePolicy, picture


class TestStream:
    def test_words_come_first_then_the_prior_then_the_answer(self, build):
        coprs, _ = build()
        *words, prior, answer = coprs.stream(picture(), "x", targets=2)
        assert words == [TextDelta("a"), TextDelta(" thought")]
        assert isinstance(prior, PriorEvent)
        assert prior.priors.shape == (2, 20, 30)
        assert np.array_equal(prior.priors, answer.priors)
        assert answer.response == "a thought"

    def test_words_come_as_they_are_written(self, build):
        written = []
        coprs, _ = build(FakePolicy(words=("a", "b"), during=lambda: written.append(None)))
        events = coprs.stream(picture(), "x")
        next(events)
        assert len(written) == 1
        next(events)
        assert len(written) == 2
        events.close()

    def test_the_prior_comes_before_the_mask_is_decoded(self, build):
        coprs, runners = build()
        for event in coprs.stream(picture(), "x"):
            if isinstance(event, PriorEvent):
                assert (runners["prior"].calls, runners["mask_decoder"].calls) == (1, 0)
        assert runners["mask_decoder"].calls == 1

    def test_joined_graphs_come_apart_where_the_prior_is_wanted_first(self, build, monkeypatch):
        coprs, runners = build()
        both = []

        def joined(**inputs):
            both.append(inputs)
            prior = runners["prior"](
                image_embedding=inputs["image_embedding"], concentration=inputs["concentration"]
            )
            mask = runners["mask_decoder"](
                image_embedding=inputs["image_embedding"],
                unpadded_size=inputs["unpadded_size"],
                **prior,
            )
            return prior | mask

        monkeypatch.setattr(coprs._stages, "_joined", joined)
        whole = coprs.segment(picture(), "x", targets=2)
        assert len(both) == 2
        assert whole.timings.prior_ms == 0 < whole.timings.mask_decoder_ms
        *_, prior, answer = coprs.stream(picture(), "x", targets=2)
        assert len(both) == 2
        assert answer.timings.prior_ms > 0
        monkeypatch.undo()
        for found in (whole, answer):
            assert np.array_equal(found.priors, prior.priors)
            assert np.array_equal(found.masks, answer.masks)
            assert np.array_equal(found.mask_logits, answer.mask_logits)

    def test_nothing_starts_before_the_first_event_is_asked_for(self, build):
        coprs, runners = build()
        events = coprs.stream(picture(), "x")
        assert runners["image_encoder"].calls == 0
        events.close()

    def test_an_abandoned_stream_abandons_the_policy_and_frees_it(self, build):
        policy = FakePolicy()
        coprs, runners = build(policy)
        events = coprs.stream(picture(), "x")
        next(events)
        events.close()
        assert policy.abandoned == 1
        assert runners["prior"].calls == 0
        assert coprs.segment(picture(), "x").found

    def test_an_abandoned_stream_of_a_real_policy_frees_it(self, tiny_llava_bundle, scene):
        with CoPRS.load(tiny_llava_bundle) as coprs:
            expected = coprs.segment(scene, "the red disc")
            events = coprs.stream(scene, "something else")
            next(events)
            events.close()
            found = coprs.segment(scene, "the red disc")
        assert np.array_equal(found.priors, expected.priors)

    def test_each_target_is_decoded_in_order(self, build):
        coprs, runners = build()
        answer = coprs.segment(picture(), "x", targets=3)
        assert runners["prior"].calls == runners["mask_decoder"].calls == 3
        # The policy numbers its targets from 11; the fake decoder takes 10 away.
        np.testing.assert_allclose(answer.priors.mean(axis=(1, 2)), [11, 12, 13], rtol=1e-6)
        assert answer.masks.all()

    def test_logits_come_back_to_the_original_size(self, build):
        coprs, _ = build()
        rgb = picture(shape=(21, 57))
        answer = coprs.segment(rgb, "x")
        prepared = prepare_image(rgb, GEOMETRY)
        logits = np.full((1, 1, GEOMETRY.mask_size, GEOMETRY.mask_size), 11, dtype=np.float32)
        assert np.array_equal(answer.priors, resize_logits(logits, prepared, GEOMETRY))


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"instruction": ""}, InstructionError, "the instruction is empty"),
            ({"instruction": " \n"}, InstructionError, "the instruction is empty"),
            ({"instruction": None}, InstructionError, "instruction is a NoneType"),
            ({"targets": 0}, ValueError, "targets is 0"),
            ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
            ({"image": b"no image"}, ImageDecodeError, "not an image"),
            ({"image": 5}, ValueError, "image is a int"),
        ],
    )
    def test_a_question_is_checked_before_anything_runs(self, build, arguments, error, message):
        policy = FakePolicy()
        coprs, runners = build(policy)
        with pytest.raises(error, match=message):
            coprs.segment(**{"image": picture(), "instruction": "x", **arguments})
        assert runners["image_encoder"].calls == 0
        assert policy.requests == []

    def test_a_policy_that_ends_without_a_result_is_an_error(self, build):
        class Silent(FakePolicy):
            def stream(self, request):
                yield TextDelta("well")

        with pytest.raises(PolicyError, match="fake policy ended without a result"):
            build(Silent())[0].segment(picture(), "x")

    def test_a_policy_that_fails_leaves_the_next_question_alone(self, build):
        failures = [PolicyError("it broke")]

        def during():
            if failures:
                raise failures.pop()

        coprs, _ = build(FakePolicy(during=during))
        with pytest.raises(PolicyError, match="it broke"):
            coprs.segment(picture(), "x")
        assert coprs.segment(picture(), "x").found
