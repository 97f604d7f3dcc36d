"""Fixtures: export variants, inputs, bundles, and the targets that name functions."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as replace_field

from coprs_deploy import demo
from coprs_deploy.bench import preparation, run
from coprs_deploy.bench.accuracy import SceneReference
from coprs_deploy.bench.case import BenchOptions, Case, Group, read_inputs
from coprs_deploy.bench.fixtures import Fixtures, Model, shape_words, variant_of
from coprs_deploy.bench.graph_suites import precisions, variants
from coprs_deploy.bench.preparation import write_inputs
from coprs_deploy.bench.run import SUITES
from coprs_deploy.bench.worker import WorkerError, load_target
from coprs_deploy.bundle import read_manifest
from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.export import ExportOptions
from coprs_deploy.machine import installed_versions
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, OptimizationProfile

ROOT = Path(__file__).parents[3]
ANY = ExportOptions()
MANY = ExportOptions(targets=OptimizationProfile(1, 4, 16), images=OptimizationProfile(1, 2, 8))
WIDE = ExportOptions(aspect_ratio=(16, 9))
DROPPED = ExportOptions(aspect_ratio=(16, 9), drop_padding=True)


def sources():
    return [*(ROOT / "coprs_deploy/bench").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]


def named_targets():
    """Every ``module:function`` that a string of bench or of its scripts names."""
    texts = "\n".join(path.read_text(encoding="utf-8") for path in sources())
    targets = set(re.findall(r'"(coprs_deploy[\w.]*:\w+)"', texts))
    made = re.findall(r'\bmake,?\(?\s*"(\w+)"', texts)
    return sorted(targets | {f"coprs_deploy.bench.preparation:{name}" for name in made})


def test_named_targets_are_found():
    assert len(named_targets()) >= 9


@pytest.mark.parametrize("target", named_targets())
def test_named_target_resolves(target):
    assert callable(load_target(target))


def test_groups_of_the_demo_model_name_functions_that_resolve_and_makes_nothing(tmp_path):
    groups, _ = run.list_groups(Fixtures(tmp_path, BenchOptions(suites=tuple(SUITES)), print))
    cases = [case for group in groups for case in group.cases]
    assert {group.suite for group in groups} == set(SUITES)
    assert len(cases) > 40
    functions = {case.settings["function"] for case in cases if "function" in case.settings}
    targets = {case.target for case in cases} | functions
    assert all(callable(load_target(target)) for target in targets)
    assert list(tmp_path.iterdir()) == []


def test_engines_suite_lists_no_peer_that_is_not_installed(tmp_path, monkeypatch):
    names = [case.name for case in engines_cases(tmp_path)]
    for what in ("segment-anything", "segment-anything .*export, openvino", "graph, openvino"):
        assert any(re.search(what, name) for name in names), what
    found = installed_versions

    def without(*missing):
        def installed(packages):
            return {k: v for k, v in found(packages).items() if k not in missing}

        monkeypatch.setattr("coprs_deploy.bench.fixtures.installed_versions", installed)

    def missing(*arguments):
        raise MissingDependencyError("OpenVINO is not installed")

    monkeypatch.setattr("coprs_deploy.engines.openvino_runner._import_openvino", missing)
    without("openvino")
    names = [case.name for case in engines_cases(tmp_path)]
    assert not any("openvino" in name for name in names)
    assert any(re.search("segment-anything .*export, onnxruntime", name) for name in names)
    without("openvino", "segment-anything")
    assert not any("segment-anything" in case.name for case in engines_cases(tmp_path))
    _, skipped = run.list_groups(Fixtures(tmp_path, BenchOptions(suites=("engines",)), print))
    remedies = {each.name: each.remedy for each in skipped}
    assert "[bench]" in remedies["segment-anything"]
    assert "[edge]" in remedies["openvino cpu"]


def engines_cases(folder):
    groups, _ = run.list_groups(Fixtures(folder, BenchOptions(suites=("engines",)), print))
    return [case for group in groups for case in group.cases]


@pytest.mark.parametrize("own", ["onnxruntime", "tensorrt"])
def test_precisions_of_a_bundle_without_checkpoint_name_every_runtime_that_reads_it(
    tiny_bundle, monkeypatch, own
):
    manifest = read_manifest(tiny_bundle)
    encoder = replace_field(manifest.graphs[IMAGE_ENCODER], runtime=own)
    changed = replace_field(manifest, graphs={**manifest.graphs, IMAGE_ENCODER: encoder})
    monkeypatch.setattr("coprs_deploy.bench.graph_suites.read_manifest", lambda path: changed)
    expected = [own] if own == "tensorrt" else ["onnxruntime", "openvino"]
    runtimes = ["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "torch"]
    found = precisions(Model("mine", None, tiny_bundle), runtimes)
    assert found == [(runtime, "fp32") for runtime in expected]


def test_variants_are_described_by_their_aspect_ratio():
    words = [shape_words(variant) for variant in (MANY, WIDE, DROPPED)]
    assert words == ["", "for 16:9", "for 16:9 without padding"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [WIDE, DROPPED])
def test_variant_of_an_export_is_the_exported_one(variant, tiny_checkpoint, tmp_path):
    model = Model("tiny", tiny_checkpoint, None)
    options = Fixtures(tmp_path, BenchOptions(), print).export_options(
        model, "onnxruntime", "fp32", variant
    )
    out = tmp_path / "bundle"
    made = preparation.export_bundle(out, tiny_checkpoint, options)
    assert variant_of(read_manifest(out)) == variant
    assert made["accuracy"].embedding_cosine > 0.9999
    assert made["metrics"]["peak_over_weights"] > 1
    assert made["stages"]["export"] == 1e3 * made["metrics"]["export_s"]


def test_variant_of_a_bundle_without_aspect_ratio_takes_any(tiny_bundle):
    assert variant_of(read_manifest(tiny_bundle)) == ANY


@pytest.mark.parametrize(("aspect_ratio", "sides"), [((9, 16), (128, 72)), ((16, 9), (72, 128))])
def test_inputs_fit_the_aspect_ratio(tiny_bundle, tmp_path, aspect_ratio, sides):
    for name, wanted in (("any", None), ("one", aspect_ratio)):
        out, settings = tmp_path / name, {"has_gt": False, "count": 3, "aspect_ratio": wanted}
        write_inputs(out, None, tiny_bundle, **settings)
        sizes = [sample["unpadded_size"].tolist() for sample in read_inputs(out)]
        assert len(sizes) == 3
        inside = [height <= sides[0] and width <= sides[1] for height, width in sizes]
        assert all(inside) == (wanted is not None)


@pytest.mark.slow
def test_bundle_int8_is_shared_by_runtimes_that_read_onnx(tiny_checkpoint, tmp_path):
    fixtures = Fixtures(tmp_path, BenchOptions(sizes=("tiny",)), print)
    model = Model("tiny", tiny_checkpoint, None, has_gt=True)
    made = fixtures.bundle(model, "onnxruntime", "int8", DROPPED)
    assert variant_of(read_manifest(made)) == DROPPED
    assert fixtures.bundle(model, "openvino", "int8", DROPPED) == made


def test_kept_bundle_that_was_changed_is_the_error_of_its_cases(tmp_path, monkeypatch):
    fixtures = Fixtures(tmp_path, BenchOptions(), print)
    monkeypatch.setattr(fixtures, "make", lambda *names, **settings: tmp_path / "nothing")
    with pytest.raises(WorkerError, match="there is no bundle"):
        fixtures.bundle(fixtures.model, "onnxruntime", "fp32", WIDE)


def test_bundle_with_its_own_profile_is_measured_as_it_is(tmp_path):
    fixtures = Fixtures(tmp_path, BenchOptions(), print)
    model = replace(fixtures.model, variant=MANY)
    assert fixtures.bundle(model, "onnxruntime", "fp32") == demo.BUNDLE


def test_bundle_without_checkpoint_raises(tiny_bundle, tmp_path):
    fixtures, model = Fixtures(tmp_path, BenchOptions(), print), Model("mine", None, tiny_bundle)
    assert fixtures.bundle(model, "openvino", "fp32") == tiny_bundle
    with pytest.raises(WorkerError, match="name its checkpoint"):
        fixtures.bundle(model, "onnxruntime", "fp32", WIDE)


def test_make_error_is_raised_again_without_another_try(tmp_path, monkeypatch):
    fixtures = Fixtures(tmp_path, BenchOptions(), print)
    with pytest.raises(WorkerError, match="AttributeError"):
        fixtures.make("no_such_function", "name")
    monkeypatch.setattr("coprs_deploy.bench.fixtures.call_once", None)
    with pytest.raises(WorkerError, match="AttributeError"):
        fixtures.make("no_such_function", "name")


def test_failed_float32_reference_is_a_note(tmp_path, monkeypatch):
    def fail(*arguments, **settings):
        raise WorkerError("out of memory")

    monkeypatch.setattr("coprs_deploy.bench.fixtures.call_once", fail)
    reference = Fixtures(tmp_path, BenchOptions(), print).scene_reference(4)
    assert reference == SceneReference(None, True, "PyTorch float32 failed: out of memory")


def test_requests_are_listed_with_each_policy_that_the_bundle_has(tmp_path):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    fixtures = Fixtures(tmp_path, BenchOptions(suites=("answer", "start")), print)
    groups, _ = run.list_groups(fixtures)
    policies = {
        case.name: case.settings["policy"]
        for group in groups
        for case in group.cases
        if "policy" in case.settings
    }
    version = installed_versions(("openvino",))["openvino"]
    shown = f"openvino {version} cpu fp32"
    assert policies[f"coprs-deploy graph, {shown}, new image"] == "transformers"
    assert policies[f"coprs-deploy graph, {shown}, openvino policy, new image"] == "openvino"
    assert policies["first mask, onnxruntime fp32, openvino policy"] == "openvino"


def test_suite_of_square_scenes_is_skipped_for_an_aspect_ratio(tmp_path):
    fixtures = Fixtures(tmp_path, BenchOptions(suites=("answer", "start")), print)
    fixtures.model = Model("mine", None, None, variant=WIDE)
    groups, (skipped,) = run.list_groups(fixtures)
    assert groups == []
    assert skipped.reason == "its scenes are square, and the bundle is for 16:9"
    assert skipped.suite == "answer, start"


def test_select_without_the_baseline_takes_the_first_case():
    group = Group("demo", (Case("base"), Case("b"), Case("c")), "base")
    assert run.select(group, "").baseline == "base"
    kept = run.select(group, "demo: [bc]$")
    assert [case.name for case in kept.cases] == ["b", "c"]
    assert kept.baseline == "b"


def test_prepare_makes_settings_or_the_error():
    def fail():
        raise WorkerError("export failed")

    cases = (
        Case("a", settings={"x": 1, "bundle": lambda: "b"}),
        Case("b", settings={"bundle": fail}),
    )
    first, second = run.prepare(Group("demo", cases)).cases
    assert first.settings == {"x": 1, "bundle": "b"}
    assert second.error == "export failed"


ENCODER = r"vit_b: image_encoder.*onnxruntime .* cpu fp32$"


def prepared_names(folder, pattern):
    options = BenchOptions(suites=("engines",), sizes=("vit_b", "vit_h"), filter=pattern)
    fixtures = Fixtures(folder, options, print)
    groups, _ = run.list_groups(fixtures)
    return list(fixtures.pending(lambda: [run.prepare(group) for group in groups]))


def test_filter_prepares_only_what_its_cases_need(tmp_path):
    names = prepared_names(tmp_path, ENCODER + "(?<!for 16:9)")
    assert names == [
        "random checkpoint vit_b",
        "write inputs vit_b 2 1x1 random",
        "export bundle vit_b onnx fp32 1x1 random",
        "export segment anything vit_b random",
    ]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "random-checkpoint-vit_b").mkdir()
    (one,) = set(names) - set(prepared_names(tmp_path, ENCODER))
    assert one == "random checkpoint vit_b"
    wide = prepared_names(tmp_path, "vit_h: image_encoder.*cpu int8, for 16:9 without")
    assert [name.partition(" vit_h ")[2] for name in wide if "bundle" in name] == [
        "onnx int8 1x1 for 16:9 without padding random"
    ]


@pytest.mark.parametrize(("work_dir", "is_told"), [(None, True), (Path("kept"), False)])
def test_announcement_counts_cases_and_estimates_the_preparation(tmp_path, work_dir, is_told):
    options = BenchOptions(
        suites=("engines",), sizes=("vit_b",), filter=ENCODER, work_dir=work_dir, min_time_s=12
    )
    fixtures = Fixtures(tmp_path, options, print)
    groups, _ = run.list_groups(fixtures)
    text = run.announcement(groups, fixtures)
    # Two cases of 12 s and a warm-up second; four steps of 10 s and .1 s a megabyte.
    assert text.startswith("2 cases, measured for 26 s or more; to prepare, about 190 s on two")
    assert "export bundle vit_b onnx fp32 1x1 random" in text
    assert ("--work-dir DIR keeps it" in text) == is_told


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
    model = Model("vit_b", None, None, random_bytes=int(is_random))
    assert len(variants(model, graph, precision)) == count


def test_variants_of_light_encoders_skip_padding_only_by_dropping_it():
    model = Model("tinyvit_5m", None, None, random_bytes=1)
    found = variants(model, IMAGE_ENCODER, "fp32")
    assert [(form.aspect_ratio, form.drop_padding) for form in found] == [
        (None, False),
        ((16, 9), True),
    ]
