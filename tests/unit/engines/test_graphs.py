import numpy as np
import pytest

from coprs_deploy.engines.graphs import SegmentationGraphs, join_chunks
from coprs_deploy.engines.runner import Runner
from coprs_deploy.images import prepare_image
from coprs_deploy.specs import (
    IMAGE_ENCODER,
    MASK_DECODER,
    PRIOR,
    Geometry,
    GraphSpec,
    OptimizationProfile,
    graph_specs,
)

GEOMETRY = Geometry(image_size=16, patch_size=4, out_chans=8)
WIDTH = 3
UNPADDED = np.array([12, 16], dtype=np.int64)


class Held:
    def __init__(self, values):
        self.values = values
        self.shape = values.shape
        self.dtype = str(values.dtype)

    def numpy(self):
        return self.values


class FakeRunner(Runner):
    def __init__(self, spec, compute, closed, fails_to_close=False):
        super().__init__(spec, "a runner for tests")
        self.compute = compute
        self.closed = closed
        self.fails_to_close = fails_to_close
        self.calls = []

    def _run(self, inputs):
        self.calls.append(inputs)
        output = self.spec.outputs[0]
        return {output.name: Held(self.compute(**inputs))}

    def close(self):
        self.closed.append(self.spec.name)
        if self.fails_to_close:
            raise RuntimeError(f"{self.spec.name} cannot be closed")


def embedding_of(image):
    return np.full((1, 8, 4, 4), image.mean(), dtype=np.float32)


def prior_of(image_embedding, concentration):
    sums = concentration.sum(axis=1) + image_embedding.numpy().mean()
    return np.broadcast_to(sums[:, None, None, None], (len(sums), 1, 16, 16)).astype(np.float32)


def mask_of(image_embedding, prior_logits, unpadded_size):
    shift = np.float32(image_embedding.numpy().mean() + unpadded_size[0])
    return prior_logits.numpy() * 2 + shift


def make_stages(minimum=1, maximum=1, failing=()):
    closed = []
    specs = graph_specs(GEOMETRY, WIDTH, OptimizationProfile(minimum, minimum, maximum))
    compute = {IMAGE_ENCODER: embedding_of, PRIOR: prior_of, MASK_DECODER: mask_of}
    runners = {
        name: FakeRunner(spec, compute[name], closed, name in failing)
        for name, spec in specs.items()
    }
    return SegmentationGraphs(runners), closed


def concentrations(count):
    return np.arange(count * WIDTH, dtype=np.float32).reshape(count, WIDTH)


def test_an_image_is_encoded_once_and_stays_where_it_is():
    stages, _ = make_stages()
    prepared = prepare_image(np.full((12, 16, 3), 9, dtype=np.uint8), GEOMETRY)
    embedding = stages.encode(prepared)
    assert isinstance(embedding, Held)
    assert stages.runners[IMAGE_ENCODER].calls[0]["image"] is prepared.image
    np.testing.assert_allclose(embedding.numpy(), embedding_of(prepared.image))


@pytest.mark.parametrize(
    ("profile", "count", "sizes"),
    [
        ((1, 1), 1, [1]),
        ((1, 1), 3, [1, 1, 1]),
        ((1, 4), 1, [1]),
        ((1, 4), 4, [4]),
        ((1, 4), 5, [4, 1]),
        ((1, 4), 9, [4, 4, 1]),
        ((3, 3), 1, [3]),
        ((3, 3), 3, [3]),
        ((3, 3), 4, [3, 3]),
        ((3, 3), 5, [3, 3]),
        ((2, 4), 5, [4, 2]),
        ((2, 4), 7, [4, 3]),
    ],
)
def test_targets_are_served_in_chunks_that_the_graph_takes(profile, count, sizes):
    stages, _ = make_stages(*profile)
    embedding = Held(np.ones((1, 8, 4, 4), np.float32))
    asked = concentrations(count)
    priors = stages.priors(embedding, asked)
    calls = [call["concentration"] for call in stages.runners[PRIOR].calls]
    assert [len(call) for call in calls] == sizes == [chunk.shape[0] for chunk in priors]
    sent = np.concatenate(calls)
    np.testing.assert_array_equal(sent[:count], asked)
    np.testing.assert_array_equal(sent[count:], np.repeat(asked[-1:], len(sent) - count, axis=0))

    masks = stages.masks(embedding, priors, UNPADDED)
    decoded = [call["prior_logits"] for call in stages.runners[MASK_DECODER].calls]
    assert all(found is chunk for found, chunk in zip(decoded, priors, strict=True))
    expected_prior = asked.sum(axis=1) + 1
    for chunks, expected in ((priors, expected_prior), (masks, 2 * expected_prior + 1 + 12)):
        joined = join_chunks(chunks, count)
        assert joined.shape == (count, 1, 16, 16)
        np.testing.assert_allclose(joined[:, 0, 0, 0], expected)


def test_every_stage_is_given_the_same_embedding_and_size():
    stages, _ = make_stages()
    embedding = Held(np.ones((1, 8, 4, 4), np.float32))
    stages.masks(embedding, stages.priors(embedding, concentrations(2)), UNPADDED)
    calls = stages.runners[PRIOR].calls + stages.runners[MASK_DECODER].calls
    assert len(calls) == 4
    assert all(call["image_embedding"] is embedding for call in calls)
    assert all(call["unpadded_size"] is UNPADDED for call in calls[2:])


def test_no_targets_run_no_graph():
    stages, _ = make_stages()
    embedding = Held(np.ones((1, 8, 4, 4), np.float32))
    priors = stages.priors(embedding, concentrations(0))
    assert priors == stages.masks(embedding, priors, UNPADDED) == []
    assert stages.runners[PRIOR].calls == []


def test_a_concentration_of_another_width_is_refused():
    stages, _ = make_stages()
    embedding = Held(np.ones((1, 8, 4, 4), np.float32))
    with pytest.raises(
        ValueError, match=r"concentration as float32 \(1, 4\); it takes .* \(1, 3\)"
    ):
        stages.priors(embedding, np.zeros((1, 4), np.float32))


class JoiningRunner(FakeRunner):
    """A prior that can be joined with the mask decoder."""

    def fused_with(self, following):
        spec = GraphSpec(
            "both",
            (*self.spec.inputs, following.spec.inputs[2]),
            (*self.spec.outputs, *following.spec.outputs),
            self.spec.targets,
        )
        joined = FakeRunner(spec, None, self.closed)

        def run(inputs):
            joined.calls.append(inputs)
            embedding = inputs["image_embedding"]
            priors = Held(prior_of(embedding, inputs["concentration"]))
            masks = Held(mask_of(embedding, priors, inputs["unpadded_size"]))
            return {"prior_logits": priors, "mask_logits": masks}

        joined._run = run
        return joined


@pytest.mark.parametrize("count", [1, 5])
def test_graphs_that_can_be_joined_are_one_call_with_the_same_outputs(count):
    apart, closed = make_stages(1, 4)
    runners = dict(apart.runners)
    prior = runners[PRIOR]
    runners[PRIOR] = JoiningRunner(prior.spec, prior.compute, closed)
    together = SegmentationGraphs(runners)
    assert together.is_fused and not apart.is_fused
    embedding = Held(np.ones((1, 8, 4, 4), np.float32))
    found, expected = (
        stages.priors_and_masks(embedding, concentrations(count), UNPADDED)
        for stages in (together, apart)
    )
    for chunks, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(join_chunks(chunks, count), join_chunks(wanted, count))
    assert len(together._joined.calls) == (count + 3) // 4
    assert runners[PRIOR].calls == []
    together.close()
    assert closed[0] == "both"  # before the engines that it runs


def test_leaving_the_block_closes_all_graphs():
    stages, closed = make_stages()
    with stages as entered:
        assert entered is stages
        assert closed == []
    assert sorted(closed) == sorted([IMAGE_ENCODER, PRIOR, MASK_DECODER])


def test_a_graph_that_cannot_be_closed_does_not_keep_the_others_open():
    stages, closed = make_stages(failing=(PRIOR,))
    with pytest.raises(RuntimeError, match="prior cannot be closed"):
        stages.close()
    assert sorted(closed) == sorted([IMAGE_ENCODER, PRIOR, MASK_DECODER])


def test_the_runners_cannot_be_changed_from_outside():
    stages, _ = make_stages()
    given = dict(stages.runners)
    again = SegmentationGraphs(given)
    given.clear()
    assert len(again.runners) == 3
