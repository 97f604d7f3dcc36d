"""Equivalence check: what passes, and what must fail."""

from dataclasses import replace

import numpy as np
import pytest

from coprs_deploy.bundle import TRT_VARIANT_NAMES
from coprs_deploy.engines import ONNX_RUNTIMES
from coprs_deploy.engines.runner import HostTensor, Runner
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export.equivalence import compare_graphs, mask_iou, require_equivalence
from coprs_deploy.export.samples import draw_masked_samples, sample_inputs
from coprs_deploy.export.tolerances import TOLERANCES, Tolerance
from coprs_deploy.specs import GRAPH_NAMES, Geometry, GraphSpec, graph_specs

GEOMETRY = Geometry(image_size=32, patch_size=8, out_chans=8)
SPECS = graph_specs(GEOMETRY, policy_hidden_size=6)
LIMITS = {
    name: Tolerance(1e-3, 1e-5, 0.999, 0.99 if name in ("mask_decoder", "end_to_end") else None, "")
    for name in (*GRAPH_NAMES, "end_to_end")
}


class FunctionRunner(Runner):
    """Graph whose output depends on the mean of its inputs, with an injected error."""

    opened = 0

    def __init__(self, name, error):
        super().__init__(SPECS[name], "function")
        self.error = error
        type(self).opened += 1

    def _run(self, inputs):
        arrays = [v if isinstance(v, np.ndarray) else v.numpy() for v in inputs.values()]
        spec = self.spec.outputs[0]
        seed = np.float32(sum(float(np.tanh(np.abs(a.astype(np.float64)).mean())) for a in arrays))
        ramp = np.linspace(-1, 1, int(np.prod(spec.shape)), dtype=np.float32).reshape(spec.shape)
        return {spec.name: HostTensor(self.error(ramp * (2 + seed)))}

    def close(self):
        type(self).opened -= 1


def exact(values):
    return values


def opener(**errors):
    return lambda name: FunctionRunner(name, errors.get(name, exact))


def compare(**errors):
    samples = sample_inputs(GEOMETRY, 6)
    records = compare_graphs(opener(), opener(**errors), samples, LIMITS)
    return {record.graph: record for record in records}


def test_compare_graphs_equal_graphs_have_zero_error():
    records = compare()
    assert list(records) == ["image_encoder", "prior", "mask_decoder", "end_to_end"]
    for record in records.values():
        assert record.passed
        assert (record.max_abs_error, record.relative_error, record.mean_error) == (0, 0, 0)
        assert record.cosine == pytest.approx(1)
        assert record.inputs == 3
    assert [r.mask_iou for r in records.values()] == [None, None, 1.0, 1.0]


@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_compare_graphs_error_shows_in_its_graph_and_end_to_end(graph):
    records = compare(**{graph: lambda values: values * np.float32(1.1)})
    assert {name for name, record in records.items() if not record.passed} >= {graph}
    assert all(records[name].passed for name in GRAPH_NAMES if name != graph)
    assert records[graph].relative_error == pytest.approx(0.1, rel=1e-3)  # float32 of 1.1
    assert records["end_to_end"].max_abs_error > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_compare_graphs_single_nonfinite_value_fails(graph, value):
    def spoil(values):
        spoiled = values.copy()
        spoiled.flat[3] = value
        return spoiled

    with np.errstate(invalid="ignore"):
        assert not compare(**{graph: spoil})[graph].passed


def test_compare_graphs_nonfinite_reference_fails():
    samples = sample_inputs(GEOMETRY, 6)
    spoiled = opener(prior=lambda values: values * np.float32(np.nan))
    with np.errstate(invalid="ignore"):
        records = compare_graphs(spoiled, opener(), samples, LIMITS)
    assert not records[1].passed


def test_compare_graphs_one_sided_shift_fails_within_relative_error():
    def shift(values):
        return values + np.float32(1e-4)

    def shake(values):
        return values + np.float32(1e-4) * np.where(np.arange(values.size) % 2, 1, -1).reshape(
            values.shape
        ).astype(np.float32)

    shifted, shaken = compare(prior=shift)["prior"], compare(prior=shake)["prior"]
    assert shifted.relative_error == pytest.approx(
        shaken.relative_error, rel=0.01
    )  # float32 rounding
    assert shifted.mean_error > 10 * abs(shaken.mean_error)
    assert shaken.passed
    assert not shifted.passed
    assert compare(prior=lambda values: values - np.float32(1e-4))["prior"].mean_error < 0


def test_compare_graphs_reports_worst_sample():
    calls = []

    def worse_every_time(values):
        calls.append(None)
        return values * np.float32(1 + 1e-4 * len(calls))

    assert compare(prior=worse_every_time)["prior"].relative_error == pytest.approx(3e-4, rel=0.01)


def test_compare_graphs_low_mask_iou_fails():
    tolerances = {**LIMITS, "mask_decoder": Tolerance(10, 10, -1, 0.99, "only the masks count")}
    samples = sample_inputs(GEOMETRY, 6)

    def flip_some(values):
        return np.where(np.arange(values.size).reshape(values.shape) % 10 == 0, -values, values)

    records = compare_graphs(opener(), opener(mask_decoder=flip_some), samples, tolerances)
    assert records[2].mask_iou == pytest.approx(0.818, abs=0.01)  # one cell in ten is flipped
    assert not records[2].passed


def test_compare_graphs_negated_output_fails_cosine():
    tolerances = {**LIMITS, "prior": Tolerance(10, 10, 0.9, None, "only the direction counts")}
    samples = sample_inputs(GEOMETRY, 6)
    turned = opener(prior=lambda values: -values)
    records = compare_graphs(opener(), turned, samples, tolerances)
    assert records[1].cosine == pytest.approx(-1)
    assert not records[1].passed


def test_compare_graphs_zero_outputs_agree():
    def silent(values):
        return np.zeros_like(values)

    samples = sample_inputs(GEOMETRY, 6)
    both = compare_graphs(opener(prior=silent), opener(prior=silent), samples, LIMITS)
    one = compare_graphs(opener(), opener(prior=silent), samples, LIMITS)
    assert both[1].passed
    assert not one[1].passed


def test_compare_graphs_opens_one_graph_at_a_time():
    most = []

    def watch(values):
        most.append(FunctionRunner.opened)
        return values

    FunctionRunner.opened = 0
    compare(**dict.fromkeys(GRAPH_NAMES, watch))
    assert set(most) == {1}
    assert FunctionRunner.opened == 0


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_compare_graphs_end_to_end_uses_fused_launch(monkeypatch, factor):
    """If the runtime fuses prior and mask decoder, the fused launch counts, and is closed."""

    class Fused(FunctionRunner):
        def __init__(self, prior, decoder):
            super().__init__("mask_decoder", exact)
            self.both = (prior, decoder)
            named = {t.name: t for r in self.both for t in r.spec.inputs}
            outputs = (*prior.spec.outputs, *decoder.spec.outputs)
            inputs = tuple(t for name, t in named.items() if name != "prior_logits")
            self.spec = GraphSpec("both", inputs, outputs)

        def _run(self, inputs):
            prior, decoder = self.both
            shared = {"image_embedding": inputs["image_embedding"]}
            given = prior(concentration=inputs["concentration"], **shared)
            masks = decoder(unpadded_size=inputs["unpadded_size"], **shared, **given)
            values = masks["mask_logits"].numpy() * np.float32(factor)
            return given | {"mask_logits": HostTensor(values)}

    def fused_with(prior, decoder):
        return Fused(prior, decoder)

    monkeypatch.setattr(FunctionRunner, "fused_with", fused_with)
    Fused.opened = FunctionRunner.opened = 0
    records = compare()
    assert all(records[name].passed for name in GRAPH_NAMES)
    assert records["end_to_end"].passed == (factor == 1)
    assert Fused.opened == FunctionRunner.opened == 0


def test_compare_graphs_steps_are_announced():
    steps = []
    compare_graphs(opener(), opener(), sample_inputs(GEOMETRY, 6), LIMITS, steps.append)
    assert steps == [
        f"{side} {name}" for side in ("reference", "candidate") for name in GRAPH_NAMES
    ]


def test_require_equivalence_error_lists_failing_graphs():
    samples = sample_inputs(GEOMETRY, 6)
    candidate = opener(mask_decoder=lambda values: values * np.float32(1.1))
    records = compare_graphs(opener(), candidate, samples, LIMITS)
    with pytest.raises(EquivalenceError) as caught:
        require_equivalence(records, LIMITS)
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert "mask_decoder: relative error 1.00e-01, mean error " in message
    assert "mask IoU 1.00000 (allowed: 1e-03, 1e-05, 0.999, mask IoU 0.99)" in message
    assert "end_to_end: relative error" in message
    assert "image_encoder" not in message
    assert "prior:" not in message


def test_require_equivalence_passing_records_return_none():
    require_equivalence(tuple(compare().values()), LIMITS)


@pytest.mark.parametrize(
    ("first", "second", "iou"),
    [
        ([1, 1, -1, -1], [1, 1, -1, -1], 1.0),
        ([1, 1, -1, -1], [-1, 1, 1, -1], 1 / 3),
        ([1, 1, -1, -1], [-1, -1, 1, 1], 0.0),
        ([-1, -1, -1, -1], [-1, -1, -1, -1], 1.0),
        ([-1, -1, -1, -1], [-1, 1, -1, -1], 0.0),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1.0),
        ([0, 1, 0, 0], [1, 1, 0, 0], 0.5),
    ],
)
def test_mask_iou_thresholds_at_zero_and_empty_masks_agree(first, second, iou):
    arrays = (np.array(x, dtype=np.float32).reshape(1, 1, 2, 2) for x in (first, second))
    assert mask_iou(*arrays) == pytest.approx(iou)


def test_sample_inputs_differ_in_padding_content_and_concentration():
    samples = sample_inputs(GEOMETRY, 6, num_targets=3)
    sizes = [tuple(sample.prepared.unpadded_size) for sample in samples]
    assert sizes == [(18, 32), (32, 20), (32, 32)]
    assert [sample.concentration.shape for sample in samples] == [(3, 6)] * 3
    assert len({sample.concentration.tobytes() for sample in samples}) == 3
    assert len({sample.prepared.image.tobytes() for sample in samples}) == 3


def test_sample_inputs_equal_seeds_are_equal():
    first, again, other = (sample_inputs(GEOMETRY, 6, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a.prepared.image, b.prepared.image)
        assert np.array_equal(a.concentration, b.concentration)
        assert not np.array_equal(a.prepared.image, c.prepared.image)


@pytest.mark.parametrize("key", TOLERANCES, ids=" ".join)
def test_tolerances_have_reason_and_can_fail(key):
    table = TOLERANCES[key]
    assert set(table) == {*GRAPH_NAMES, "end_to_end"}
    assert key[0] in (*ONNX_RUNTIMES, *TRT_VARIANT_NAMES)
    for name, tolerance in table.items():
        assert tolerance.reason
        assert 0 < tolerance.mean_error <= tolerance.relative_error <= 0.2
        assert 0.9 < tolerance.cosine < 1
        assert (tolerance.mask_iou is not None) == (name in ("mask_decoder", "end_to_end"))


def test_compare_graphs_known_reference_is_not_run_again():
    samples, known = sample_inputs(GEOMETRY, 6), {}
    first = compare_graphs(opener(), opener(), samples, LIMITS, known=known)
    assert set(known) == set(GRAPH_NAMES)

    def never(name):
        raise AssertionError(f"the reference of {name} was opened")

    assert compare_graphs(never, opener(), samples, LIMITS, known=known) == first
    wrong = compare_graphs(never, opener(prior=lambda v: v * 1.1), samples, LIMITS, known=known)
    assert not wrong[1].passed


def test_compare_graphs_pooled_masks_use_ciou():
    """A lost small mask counts by its cells, not as a whole sample."""
    samples = sample_inputs(GEOMETRY, 6)
    calls = []

    def lose_the_first(values):
        calls.append(values)
        return np.full_like(values, -1) if len(calls) == 1 else values

    def few(values):
        return np.where(values > values.max() * 0.99, values, -np.abs(values) - 1)

    limit = LIMITS["end_to_end"]
    assert not limit.pools_masks
    for pools, expected in ((False, 0.0), (True, 2 / 3)):
        calls.clear()
        limits = {**LIMITS, "mask_decoder": replace(limit, pools_masks=pools)}
        decoder = opener(mask_decoder=lambda v: lose_the_first(few(v)))
        records = compare_graphs(opener(mask_decoder=few), decoder, samples, limits)
        assert records[2].mask_iou == pytest.approx(expected)


class TestMaskedSamples:
    def ratio(self, masks):
        return [float((mask > 0).mean()) for mask in masks]

    def draw(self, decoder, seed=0):
        images = [sample.prepared for sample in sample_inputs(GEOMETRY, 6)]
        return draw_masked_samples(images, opener(mask_decoder=decoder), 6, seed=seed)

    def test_masked_samples_choose_mask_nearest_to_a_quarter(self):
        ratios = iter([0.0, 1.0, 0.9, 0.2, 0.6] + [0.0] * 11 + [0.2])

        def decoder(values):
            ratio = next(ratios, 0.0)
            wanted = np.full(values.size, -1, np.float32)
            wanted[: round(ratio * values.size)] = 1
            return wanted.reshape(values.shape)

        images = [sample_inputs(GEOMETRY, 6)[0].prepared]
        samples, known = draw_masked_samples(images, opener(mask_decoder=decoder), 6)
        generator = np.random.default_rng(0)
        drawn = [generator.standard_normal((1, 6), dtype=np.float32) for _ in range(4)]
        assert np.array_equal(samples[0].concentration, drawn[3])
        assert self.ratio(known["mask_decoder"]) == [pytest.approx(0.2, abs=0.01)]

    def test_masked_samples_known_outputs_equal_reference(self):
        samples, known = self.draw(exact)
        fresh = {}
        compare_graphs(opener(), opener(), samples, LIMITS, known=fresh)
        for name in GRAPH_NAMES:
            assert all(map(np.array_equal, known[name], fresh[name])), name

    def test_sample_inputs_equal_seeds_are_equal(self):
        first, again, other = (self.draw(exact, seed)[0] for seed in (0, 0, 1))
        assert np.array_equal(first[0].concentration, again[0].concentration)
        assert not np.array_equal(first[0].concentration, other[0].concentration)
