"""Chunking, batching and closing of the three graphs, on runners that compute."""

import numpy as np
import pytest

from coprs_deploy.engines.graphs import SegmentationGraphs, join_chunks
from coprs_deploy.engines.runner import HostTensor, Runner
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
HIDDEN_SIZE = 3
UNPADDED = np.array([12, 16], dtype=np.int64)


class FakeRunner(Runner):
    """Computes with a function, and writes down its calls."""

    def __init__(self, spec, compute, closed, fails_to_close=False):
        super().__init__(spec, "a runner for tests")
        self.compute = compute
        self.closed = closed
        self.fails_to_close = fails_to_close
        self.calls = []

    def _run(self, inputs):
        self.calls.append(inputs)
        output = self.spec.outputs[0]
        return {output.name: HostTensor(self.compute(**inputs))}

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


def make_graphs(minimum=1, maximum=1, failing=()):
    closed = []
    specs = graph_specs(GEOMETRY, HIDDEN_SIZE, OptimizationProfile(minimum, minimum, maximum))
    compute = {IMAGE_ENCODER: embedding_of, PRIOR: prior_of, MASK_DECODER: mask_of}
    runners = {
        name: FakeRunner(spec, compute[name], closed, name in failing)
        for name, spec in specs.items()
    }
    return SegmentationGraphs(runners), closed


def concentrations(count):
    return np.arange(count * HIDDEN_SIZE, dtype=np.float32).reshape(count, HIDDEN_SIZE)


def test_encode_returns_the_encoders_tensor():
    graphs, _ = make_graphs()
    prepared = prepare_image(np.full((12, 16, 3), 9, dtype=np.uint8), GEOMETRY)
    embedding = graphs.encode(prepared)
    assert isinstance(embedding, HostTensor)
    assert graphs.runners[IMAGE_ENCODER].calls[0]["image"] is prepared.image
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
def test_priors_and_masks_run_in_chunks_of_the_profile(profile, count, sizes):
    graphs, _ = make_graphs(*profile)
    embedding = HostTensor(np.ones((1, 8, 4, 4), np.float32))
    requested = concentrations(count)
    priors = graphs.priors(embedding, requested)
    calls = [call["concentration"] for call in graphs.runners[PRIOR].calls]
    assert [len(call) for call in calls] == sizes == [chunk.shape[0] for chunk in priors]
    sent = np.concatenate(calls)
    np.testing.assert_array_equal(sent[:count], requested)
    np.testing.assert_array_equal(
        sent[count:], np.repeat(requested[-1:], len(sent) - count, axis=0)
    )

    masks = graphs.masks(embedding, priors, UNPADDED)
    decoded = [call["prior_logits"] for call in graphs.runners[MASK_DECODER].calls]
    assert all(found is chunk for found, chunk in zip(decoded, priors, strict=True))
    expected_prior = requested.sum(axis=1) + 1
    for chunks, expected in ((priors, expected_prior), (masks, 2 * expected_prior + 1 + 12)):
        joined = join_chunks(chunks, count)
        assert joined.shape == (count, 1, 16, 16)
        np.testing.assert_allclose(joined[:, 0, 0, 0], expected)


def test_all_chunks_receive_the_same_embedding_and_size():
    graphs, _ = make_graphs()
    embedding = HostTensor(np.ones((1, 8, 4, 4), np.float32))
    graphs.masks(embedding, graphs.priors(embedding, concentrations(2)), UNPADDED)
    calls = graphs.runners[PRIOR].calls + graphs.runners[MASK_DECODER].calls
    assert len(calls) == 4
    assert all(call["image_embedding"] is embedding for call in calls)
    assert all(call["unpadded_size"] is UNPADDED for call in calls[2:])


def test_no_concentrations_run_no_graph():
    graphs, _ = make_graphs()
    embedding = HostTensor(np.ones((1, 8, 4, 4), np.float32))
    priors = graphs.priors(embedding, concentrations(0))
    assert priors == graphs.masks(embedding, priors, UNPADDED) == []
    assert graphs.runners[PRIOR].calls == []


def test_concentrations_of_another_hidden_size_are_refused():
    graphs, _ = make_graphs()
    embedding = HostTensor(np.ones((1, 8, 4, 4), np.float32))
    with pytest.raises(
        ValueError, match=r"concentration as float32 \(1, 4\); it takes .* \(1, 3\)"
    ):
        graphs.priors(embedding, np.zeros((1, 4), np.float32))


class FusibleRunner(FakeRunner):
    """A prior that can be fused with the mask decoder."""

    def fused_with(self, following):
        spec = GraphSpec(
            "both",
            (*self.spec.inputs, following.spec.inputs[2]),
            (*self.spec.outputs, *following.spec.outputs),
            self.spec.targets,
        )
        fused = FakeRunner(spec, None, self.closed)

        def run(inputs):
            fused.calls.append(inputs)
            embedding = inputs["image_embedding"]
            priors = HostTensor(prior_of(embedding, inputs["concentration"]))
            masks = HostTensor(mask_of(embedding, priors, inputs["unpadded_size"]))
            return {"prior_logits": priors, "mask_logits": masks}

        fused._run = run
        return fused


@pytest.mark.parametrize("count", [1, 5])
def test_fused_graphs_run_once_a_chunk_with_the_same_outputs(count):
    apart, closed = make_graphs(1, 4)
    runners = dict(apart.runners)
    prior = runners[PRIOR]
    runners[PRIOR] = FusibleRunner(prior.spec, prior.compute, closed)
    together = SegmentationGraphs(runners)
    assert together.is_fused and not apart.is_fused
    embedding = HostTensor(np.ones((1, 8, 4, 4), np.float32))
    found, expected = (
        graphs.priors_and_masks(embedding, concentrations(count), UNPADDED)
        for graphs in (together, apart)
    )
    for chunks, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(join_chunks(chunks, count), join_chunks(wanted, count))
    assert len(together._fused.calls) == (count + 3) // 4
    assert runners[PRIOR].calls == []
    together.close()
    assert closed[0] == "both"  # before the engines that it runs


def test_leaving_the_with_block_closes_all_graphs():
    graphs, closed = make_graphs()
    with graphs as entered:
        assert entered is graphs
        assert closed == []
    assert sorted(closed) == sorted([IMAGE_ENCODER, PRIOR, MASK_DECODER])


def test_close_with_one_failing_graph_closes_the_others():
    graphs, closed = make_graphs(failing=(PRIOR,))
    with pytest.raises(RuntimeError, match="prior cannot be closed"):
        graphs.close()
    assert sorted(closed) == sorted([IMAGE_ENCODER, PRIOR, MASK_DECODER])


def test_runners_are_copied_from_the_argument():
    graphs, _ = make_graphs()
    given = dict(graphs.runners)
    again = SegmentationGraphs(given)
    given.clear()
    assert len(again.runners) == 3
