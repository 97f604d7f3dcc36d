"""Fixtures: export variants, inputs, bundles, and the targets that name functions."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from coprs_deploy.bench import preparation, run
from coprs_deploy.bench.accuracy import write_inputs
from coprs_deploy.bench.case import Case, Group, read_inputs
from coprs_deploy.bench.fixtures import ExportVariant, Fixtures, Model
from coprs_deploy.bench.options import BenchOptions
from coprs_deploy.bench.suites import SUITES, suite
from coprs_deploy.bench.suites.graphs import variants
from coprs_deploy.bench.worker import WorkerError, load_target
from coprs_deploy.bundle import read_manifest
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER

ROOT = Path(__file__).parents[3]
ANY = ExportVariant()
MANY = ExportVariant(targets="1,4,16", images="1,2,8")
WIDE = ExportVariant(aspect_ratio="16:9")
DROPPED = ExportVariant(aspect_ratio="16:9", drop_padding=True)


def sources():
    return [*(ROOT / "coprs_deploy/bench").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]


def named_targets():
    """Every ``module:function`` that a string of bench or of its scripts names."""
    texts = "\n".join(path.read_text(encoding="utf-8") for path in sources())
    targets = set(re.findall(r'"(coprs_deploy[\w.]*:\w+)"', texts))
    for pattern, module in (
        (r'\.make\(\s*[^,]+,\s*"(\w+)"', "coprs_deploy.bench.preparation"),
        (r'\.evaluate\(\s*"(\w+)"', "coprs_deploy.bench.accuracy"),
    ):
        targets |= {f"{module}:{name}" for name in re.findall(pattern, texts)}
    return sorted(targets)


def test_named_targets_are_found():
    assert len(named_targets()) >= 20


@pytest.mark.parametrize("target", named_targets())
def test_named_target_resolves(target):
    assert callable(load_target(target))


def test_suites_resolve_by_their_name():
    for name in SUITES:
        assert name == suite(name).NAME
        assert suite(name).SUMMARY


def test_suite_plans_of_the_demo_model_name_functions_that_resolve(tmp_path):
    options = BenchOptions()
    with Fixtures(tmp_path, options) as fixtures:
        suite_plans = [suite(name).suite_plan(fixtures) for name in SUITES]
    cases = [
        case for suite_plan in suite_plans for group in suite_plan.groups for case in group.cases
    ]
    assert len(cases) > 40
    assert all(callable(load_target(target)) for target in {case.target for case in cases})
    assert list(tmp_path.iterdir()) == []


def test_variant_suffixes_differ():
    suffixes = [variant.suffix for variant in (ANY, MANY, WIDE, DROPPED)]
    assert suffixes == ["1x1", "1-4-16x1-2-8", "1x1-16to9", "1x1-16to9-dropped"]
    words = [variant.description for variant in (MANY, WIDE, DROPPED)]
    assert words == ["", "for 16:9", "for 16:9 without padding"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [WIDE, DROPPED])
def test_variant_matches_its_own_export_only(variant, tiny_checkpoint, tmp_path):
    out = tmp_path / "bundle"
    settings = asdict(variant)
    made = preparation.export_bundle(
        str(tiny_checkpoint), str(out), "onnxruntime", "fp32", **settings
    )
    manifest = read_manifest(out)
    assert [other for other in (ANY, WIDE, DROPPED, MANY) if other.matches(manifest)] == [variant]
    assert ExportVariant.of(manifest) == variant
    assert made["accuracy"]["embedding_cosine"] > 0.9999
    assert made["metrics"]["peak_over_weights"] > 1


def test_variant_of_a_bundle_without_aspect_ratio_takes_any(tiny_bundle):
    manifest = read_manifest(tiny_bundle)
    assert ANY.matches(manifest)
    assert ExportVariant.of(manifest) == ANY
    assert not WIDE.matches(manifest)
    assert not MANY.matches(manifest)


@pytest.mark.parametrize(("aspect_ratio", "sides"), [("9:16", (128, 72)), ("16:9", (72, 128))])
def test_inputs_fit_the_aspect_ratio(tiny_bundle, tmp_path, aspect_ratio, sides):
    for wanted in ("", aspect_ratio, aspect_ratio):
        write_inputs(str(tmp_path), None, str(tiny_bundle), False, 3, aspect_ratio=wanted)
        sizes = [sample["unpadded_size"].tolist() for sample in read_inputs(str(tmp_path))]
        assert len(sizes) == 3
        inside = [height <= sides[0] and width <= sides[1] for height, width in sizes]
        assert all(inside) == bool(wanted)


@pytest.mark.slow
def test_bundle_int8_is_shared_by_runtimes_that_read_onnx(tiny_checkpoint, tmp_path):
    model = Model("tiny", tiny_checkpoint, None, is_random=True)
    with Fixtures(tmp_path, BenchOptions(sizes=("tiny",))) as fixtures:
        made = fixtures.bundle(model, "onnxruntime", "int8", DROPPED)
        assert DROPPED.matches(read_manifest(made))
        assert fixtures.bundle(model, "openvino", "int8", DROPPED) == made


def test_bundle_without_checkpoint_raises(tiny_bundle, tmp_path):
    model = Model("mine", None, tiny_bundle)
    with Fixtures(tmp_path, BenchOptions()) as fixtures:
        assert fixtures.bundle(model, "openvino", "fp32") == str(tiny_bundle)
        with pytest.raises(WorkerError, match="name its checkpoint"):
            fixtures.bundle(model, "onnxruntime", "fp32", WIDE)


def test_make_error_is_raised_again(tmp_path):
    with Fixtures(tmp_path, BenchOptions()) as fixtures:
        for _ in range(2):
            with pytest.raises(WorkerError, match="AttributeError"):
                fixtures.make("nothing", "no_such_function")
        assert len(fixtures._made) == 1


def test_suite_of_square_scenes_is_skipped_for_an_aspect_ratio(tmp_path):
    with Fixtures(tmp_path, BenchOptions()) as fixtures:
        fixtures.model = Model("mine", None, None, variant=WIDE)
        suite_plan = run.suite_plan_of(suite("answer"), fixtures)
    assert not suite_plan.groups
    assert suite_plan.skipped[0].reason == "its scenes are square, and the bundle is for 16:9"


def test_select_without_the_baseline_takes_the_first_case():
    group = Group("engines", "demo", (Case("base"), Case("b"), Case("c")), "base")
    assert run.select(group, "").baseline == "base"
    kept = run.select(group, "demo: [bc]$")
    assert [case.name for case in kept.cases] == ["b", "c"]
    assert kept.baseline == "b"


def test_prepare_adds_settings_or_the_error():
    def fail():
        raise WorkerError("export failed")

    cases = (
        Case("a", settings={"x": 1}, prepare=lambda: {"bundle": "b"}),
        Case("b", prepare=fail),
    )
    first, second = run.prepare(Group("engines", "demo", cases)).cases
    assert first.settings == {"x": 1, "bundle": "b"}
    assert second.error == "export failed"


@pytest.mark.parametrize(
    ("graph", "precision", "is_random", "count"),
    [
        (IMAGE_ENCODER, "fp32", True, 3),
        (IMAGE_ENCODER, "int8", True, 3),
        (IMAGE_ENCODER, "fp16", True, 1),
        (IMAGE_ENCODER, "fp32", False, 1),
        (MASK_DECODER, "fp32", True, 1),
    ],
)
def test_variants_of_encoders_of_real_size_only(graph, precision, is_random, count):
    model = Model("any", None, None, is_random=is_random)
    assert len(variants(model, graph, precision)) == count
