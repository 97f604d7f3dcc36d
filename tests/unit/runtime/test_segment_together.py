"""``CoPRS.segment_together``: results and errors in order, embeddings shared and released."""

import numpy as np
import pytest

from coprs_deploy.errors import CoPRSError, ImageDecodeError, InstructionError
from tests.unit.runtime_fakes import FakePolicy, image_of


class Backwards(FakePolicy):
    """Answers the last request first."""

    answers_together = True

    def answer_together(self, requests):
        answers = list(super().answer_together(requests))
        yield from reversed(answers)


def test_results_are_in_the_order_of_the_requests(build):
    coprs, runners = build(Backwards())
    assert coprs.answers_together
    first, second = coprs.decode(image_of(10)), coprs.decode(image_of(90, (10, 40)))
    requests = [(first, "a"), (second, "b"), (first, "c")]
    found = coprs.segment_together(requests, 2)
    assert [result.instruction for result in found] == ["a", "b", "c"]
    for result, (image, instruction) in zip(found, requests, strict=True):
        expected = coprs.segment(image, instruction, 2)
        assert np.array_equal(result.masks, expected.masks)
        assert result.image is image.rgb
    assert runners["image_encoder"].calls == 2
    assert found[1].timings.total_ms > 0


@pytest.mark.parametrize("is_decoded", [True, False])
def test_requests_on_one_image_share_its_embedding_without_a_cache(build, is_decoded):
    coprs, runners = build(FakePolicy(), max_cached_images=0)
    image = coprs.decode(image_of()) if is_decoded else image_of()
    found = coprs.segment_together([(image, "a"), (image, "b"), (image, "c")])
    assert [result.found for result in found] == [True] * 3
    assert runners["image_encoder"].calls == 1
    assert not coprs._pipeline.cache._num_waiting


def test_error_is_the_result_of_its_request(build):
    coprs, _ = build(FakePolicy())
    found = coprs.segment_together(
        [(image_of(), "a"), (b"no image", "b"), (image_of(), "x" * 100_000), (image_of(), "d")]
    )
    assert [type(each) for each in found[1:3]] == [ImageDecodeError, InstructionError]
    assert found[0].found
    assert found[3].found


def test_error_of_policy_or_encoder_is_the_result_of_its_request(build):
    def fail():
        raise RuntimeError("out of memory")

    for policy, encode in ((FakePolicy(during=fail), lambda: None), (FakePolicy(), fail)):
        coprs, _ = build(policy, encode)
        found = coprs.segment_together([(image_of(), "a"), (image_of(1), "b")])
        assert [str(error) for error in found] == ["out of memory"] * 2
        assert not coprs._pipeline.cache._num_waiting


def test_no_match_and_no_requests_are_results(build):
    coprs, _ = build(FakePolicy(found=0))
    assert coprs.segment_together([]) == []
    (found,) = coprs.segment_together([(image_of(), "a")])
    assert not found.found
    assert not coprs._pipeline.cache._num_waiting


def test_closed_runtime_and_wrong_limits_are_refused(build):
    coprs, _ = build()
    with pytest.raises(ValueError, match="max_targets is 0"):
        coprs.segment_together([(image_of(), "a")], 0)
    coprs.close()
    with pytest.raises(CoPRSError, match="was closed"):
        coprs.segment_together([(image_of(), "a")])
