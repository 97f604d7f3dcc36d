"""Export: bundle contents, equivalence check, and what remains after a failure."""

import importlib.metadata
import json
import shutil
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from coprs_deploy import demo
from coprs_deploy.artifacts import record_files
from coprs_deploy.bundle import open_bundle, read_manifest
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_graph
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import (
    ArtifactError,
    CheckpointError,
    EnvironmentNotReadyError,
    EquivalenceError,
)
from coprs_deploy.export import ExportOptions, export_checkpoint, exporter, graph_writer
from coprs_deploy.export.tolerances import TOLERANCES, Tolerance
from coprs_deploy.images import prepare_image
from coprs_deploy.specs import GRAPH_NAMES, OptimizationProfile, graph_specs

FP32 = ("onnxruntime", "fp32")


def open_graphs_of(bundle_path):
    """Open the three graphs of a bundle."""
    bundle = open_bundle(bundle_path)
    return SegmentationGraphs(
        {
            name: open_graph("onnxruntime", bundle.graph_path(name), graph.spec, RunnerOptions())
            for name, graph in bundle.manifest.graphs.items()
        }
    )


def run(graphs, scene, geometry, concentrations):
    prepared = prepare_image(scene, geometry)
    embedding = graphs.encode(prepared)
    priors = graphs.priors(embedding, concentrations)
    masks = graphs.masks(embedding, priors, prepared.unpadded_size)
    return [np.concatenate([chunk.numpy() for chunk in chunks]) for chunks in (priors, masks)]


def reference(checkpoint_path, scene, concentrations):
    """Run PyTorch's modules, one target at a time."""
    checkpoint = read_checkpoint(checkpoint_path)
    model = load_segmentation_model(checkpoint)
    specs = read_specs(checkpoint)
    with SegmentationGraphs(
        {n: TorchRunner(m, specs[n]) for n, m in model.graph_modules().items()}
    ) as graphs:
        return run(graphs, scene, checkpoint.config.model.geometry, concentrations)


def read_specs(checkpoint):
    config = checkpoint.config.model
    return graph_specs(config.geometry, config.policy_hidden_size)


def concentrations_of(count):
    return np.random.default_rng(5).standard_normal((count, 64), dtype=np.float32)


@pytest.fixture
def written_graphs(tiny_bundle, monkeypatch):
    """Copy the graphs of the tiny bundle instead of tracing them again.

    The returned dictionary maps a graph's name to a factor of its weights.
    """
    factors = {}

    def copy_graph(module, spec, path, metadata, opset):
        model = onnx.load(tiny_bundle / f"{spec.name}.onnx")
        for weight in model.graph.initializer:
            values = numpy_helper.to_array(weight)
            if values.dtype == np.float32:
                values = values * np.float32(factors.get(spec.name, 1))
                weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(model, path)

    monkeypatch.setattr(graph_writer, "export_onnx_graph", copy_graph)
    return factors


class TestBundle:
    def test_export_manifest_equals_checkpoint(self, tiny_bundle, tiny_checkpoint):
        manifest = open_bundle(tiny_bundle).manifest
        checkpoint = read_checkpoint(tiny_checkpoint)
        config = checkpoint.config
        assert manifest.checkpoint_fingerprint == checkpoint.fingerprint()
        assert manifest.checkpoint_note == config.provenance["note"]
        assert manifest.geometry == config.model.geometry
        assert manifest.policy.prompt == config.prompt
        assert manifest.policy.hidden_size == config.model.policy_hidden_size == 64
        assert manifest.policy.min_pixels == config.policy_image.min_pixels
        assert manifest.policy.max_pixels == config.policy_image.max_pixels
        assert manifest.gpu is None

    def test_export_manifest_describes_each_graph(self, tiny_bundle, tiny_checkpoint):
        manifest = read_manifest(tiny_bundle)
        assert list(manifest.graphs) == list(GRAPH_NAMES)
        specs = read_specs(read_checkpoint(tiny_checkpoint))
        for name, graph in manifest.graphs.items():
            assert (graph.runtime, graph.precision, graph.file) == (*FP32, f"{name}.onnx")
            assert graph.spec == specs[name]

    def test_export_lists_every_file_and_copies_policy(self, tiny_bundle, tiny_checkpoint):
        manifest = read_manifest(tiny_bundle)
        assert manifest.policy.path == "policy"
        assert manifest.policy.files == record_files(tiny_checkpoint / "policy")
        listed = {file.path for file in manifest.files}
        assert listed == {f"{name}.onnx" for name in GRAPH_NAMES}
        on_disk = {p.relative_to(tiny_bundle).parts[0] for p in tiny_bundle.iterdir()}
        assert on_disk == {*listed, "manifest.json", "policy"}

    def test_export_manifest_records_toolchain(self, tiny_bundle):
        toolchain = read_manifest(tiny_bundle).toolchain
        for package in ("torch", "onnx", "onnxscript", "onnxruntime", "transformers"):
            assert toolchain[package] == importlib.metadata.version(package)
        assert toolchain["python"].startswith("3.")
        assert "onnxruntime-gpu" not in toolchain

    @pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_llava_bundle"])
    def test_export_manifest_records_equivalence_within_tolerance(self, bundle, request):
        records = read_manifest(request.getfixturevalue(bundle)).equivalence
        assert [record.graph for record in records] == [*GRAPH_NAMES, "end_to_end"]
        for record in records:
            limit = TOLERANCES[FP32][record.graph]
            assert record.passed
            assert (
                0 < record.relative_error <= limit.relative_error
            )  # 0 would mean that nothing was compared
            assert record.max_abs_error > 0
            assert abs(record.mean_error) <= limit.mean_error
            assert limit.cosine <= record.cosine <= 1
            assert record.inputs == 3
        assert [record.mask_iou for record in records[:2]] == [None, None]

    def test_export_graphs_equal_pytorch(self, tiny_bundle, tiny_checkpoint, scene):
        concentrations = concentrations_of(2)
        with open_graphs_of(tiny_bundle) as graphs:
            geometry = read_manifest(tiny_bundle).geometry
            found = run(graphs, scene, geometry, concentrations)
        expected = reference(tiny_checkpoint, scene, concentrations)
        for ours, theirs in zip(found, expected, strict=True):
            limit = TOLERANCES[FP32]["end_to_end"].relative_error
            assert np.abs(ours - theirs).max() <= limit * np.abs(theirs).max()
        priors = expected[0]
        assert np.abs(priors[0] - priors[1]).max() > 0.01 * np.abs(priors).max()

    def test_export_manifest_is_indented_json(self, tiny_bundle):
        text = (tiny_bundle / "manifest.json").read_text(encoding="utf-8")
        data = json.loads(text)
        assert text.endswith("}\n")
        assert data["schema_version"] == 1
        assert data["graphs"]["prior"]["spec"]["inputs"][1] == {
            "name": "concentration",
            "dtype": "float32",
            "shape": [1, 64],
        }


class TestExternalPolicy:
    def test_export_external_policy_is_not_copied(self, tiny_checkpoint, tmp_path, written_graphs):
        options = ExportOptions(external_policy=True)
        path = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle.path
        policy = open_bundle(path).manifest.policy
        assert policy.is_external
        assert policy.path.startswith("../")
        assert (path / policy.path).resolve() == (tiny_checkpoint / "policy").resolve()
        assert policy.files == record_files(tiny_checkpoint / "policy")
        assert not (path / "policy").exists()

    def test_export_external_policy_moves_with_bundle(
        self, tiny_checkpoint, tmp_path, written_graphs
    ):
        home = tmp_path / "home"
        shutil.copytree(tiny_checkpoint, home / "checkpoint")
        options = ExportOptions(external_policy=True)
        export_checkpoint(home / "checkpoint", home / "bundle", options)
        assert open_bundle(home / "bundle").manifest.policy.path == "../checkpoint/policy"
        bundle = open_bundle(home.rename(tmp_path / "elsewhere") / "bundle")
        assert (bundle.policy_path / "config.json").is_file()


class TestReport:
    def test_export_report_has_steps_times_and_memory(
        self, tiny_checkpoint, tmp_path, written_graphs
    ):
        steps = []
        report = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", progress=steps.append)
        assert steps == [
            "load checkpoint",
            "fingerprint checkpoint",
            *(f"export {name}" for name in GRAPH_NAMES),
            *(f"check {side} {n}" for side in ("reference", "candidate") for n in GRAPH_NAMES),
            "write bundle",
        ]
        assert list(report.seconds) == steps
        assert all(seconds >= 0 for seconds in report.seconds.values())
        model = load_segmentation_model(read_checkpoint(tiny_checkpoint))
        assert report.weights_bytes == sum(4 * p.numel() for p in model.parameters())
        assert report.weights_bytes < report.peak_bytes_export <= report.peak_bytes_total
        assert report.bundle.manifest == read_manifest(tmp_path / "bundle")

    def test_export_report_has_the_sum_of_a_repeated_step(self, monkeypatch):
        clock = iter([0.0, 1.0, 1.0, 3.0, 3.0, 7.0])
        monkeypatch.setattr(exporter.time, "perf_counter", lambda: next(clock))
        timer = exporter._StepTimer(lambda step: None)
        for step in ("candidate policy", "write decoder", "candidate policy"):
            timer.start(step)
        timer.stop()
        assert timer.seconds == {"candidate policy": 5.0, "write decoder": 2.0}


class TestTargets:
    @pytest.fixture(scope="module")
    @staticmethod
    def export(tiny_checkpoint, tmp_path_factory):
        """Export the tiny checkpoint for a number of targets, once for each."""
        exported = {}

        def exporter_of(text):
            if text not in exported:
                out = tmp_path_factory.mktemp("targets") / "bundle"
                options = ExportOptions(targets=OptimizationProfile.parse(text))
                exported[text] = export_checkpoint(tiny_checkpoint, out, options).bundle.path
            return exported[text]

        return exporter_of

    @pytest.mark.slow
    @pytest.mark.parametrize("profile", ["1,2,4", "3"])
    @pytest.mark.parametrize("count", [1, 2, 4, 5])
    def test_export_profile_accepts_any_number_of_targets(
        self, export, profile, count, tiny_checkpoint, scene
    ):
        path = export(profile)
        concentrations = concentrations_of(count)
        with open_graphs_of(path) as graphs:
            found = run(graphs, scene, read_manifest(path).geometry, concentrations)
        expected = reference(tiny_checkpoint, scene, concentrations)
        for ours, theirs in zip(found, expected, strict=True):
            limit = TOLERANCES[FP32]["end_to_end"].relative_error * np.abs(theirs).max()
            assert np.abs(ours[:count] - theirs).max() <= limit

    @pytest.mark.slow
    def test_export_profile_is_symbolic_and_number_is_static(self, export):
        ranged, fixed = (read_manifest(export(text)).graphs for text in ("1,2,4", "3"))
        assert ranged["prior"].spec.inputs[1].shape == ("targets", 64)
        assert ranged["prior"].spec.targets == OptimizationProfile(1, 2, 4)
        assert ranged["mask_decoder"].spec.outputs[0].shape == ("targets", 1, 64, 64)
        assert fixed["prior"].spec.inputs[1].shape == (3, 64)
        for graphs in (ranged, fixed):
            assert graphs["image_encoder"].spec.outputs[0].shape == (1, 64, 16, 16)


class TestEquivalence:
    @pytest.mark.parametrize("graph", GRAPH_NAMES)
    def test_export_wrong_weights_are_refused_and_nothing_is_written(
        self, graph, tiny_checkpoint, tmp_path, written_graphs
    ):
        written_graphs[graph] = 1.01
        with pytest.raises(EquivalenceError) as caught:
            export_checkpoint(tiny_checkpoint, tmp_path / "bundle")
        message = str(caught.value)
        assert f"{graph}: relative error " in message
        limit = TOLERANCES[FP32][graph]
        assert f"(allowed: {limit.relative_error:.0e}, {limit.mean_error:.0e}" in message
        assert not [n for n in GRAPH_NAMES if n != graph and f"{n}: relative error" in message]
        assert list(tmp_path.iterdir()) == []

    def test_export_stricter_tolerance_is_applied(
        self, tiny_checkpoint, tmp_path, monkeypatch, written_graphs
    ):
        impossible = Tolerance(0.0, 0.0, 1.0, None, "nothing is exactly equal")
        monkeypatch.setitem(TOLERANCES, FP32, {**TOLERANCES[FP32], "image_encoder": impossible})
        with pytest.raises(
            EquivalenceError, match=r"image_encoder: relative error .* \(allowed: 0e\+00"
        ):
            export_checkpoint(tiny_checkpoint, tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == []

    def test_export_weights_that_are_not_finite_are_named_first(self, tiny_checkpoint, tmp_path):
        checkpoint = tmp_path / "checkpoint"
        shutil.copytree(tiny_checkpoint, checkpoint)
        weights = load_file(checkpoint / "segmentation.safetensors")
        weights["prior.k_proj.weight"][0, 0] = torch.inf
        save_file(weights, checkpoint / "segmentation.safetensors")
        steps, message = [], r"not finite .*: 1 of the .* of prior\.k_proj\.weight"
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(checkpoint, tmp_path / "bundle", progress=steps.append)
        assert steps == ["load checkpoint"]

    def test_export_failure_keeps_existing_bundle(
        self, tiny_bundle, tiny_checkpoint, tmp_path, written_graphs
    ):
        out = tmp_path / "bundle"
        shutil.copytree(tiny_bundle, out)
        before = record_files(out)
        written_graphs["prior"] = 1.01
        with pytest.raises(EquivalenceError):
            export_checkpoint(tiny_checkpoint, out, ExportOptions(overwrite=True))
        assert record_files(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


class TestMissingPackages:
    @pytest.mark.parametrize(
        ("package", "options", "message"),
        [
            ("onnxruntime", {}, "ONNX Runtime"),
            ("onnxruntime", {"runtime": "openvino", "precision": "fp16"}, "ONNX Runtime"),
            ("openvino", {"runtime": "openvino"}, "OpenVINO"),
            ("nncf", {"policy_runtime": "openvino"}, "int8 graph needs nncf"),
        ],
    )
    def test_export_names_them_before_the_first_step(
        self, package, options, message, tmp_path, monkeypatch
    ):
        if options:
            pytest.importorskip("openvino", reason="OpenVINO is not installed")
        monkeypatch.setitem(sys.modules, package, None)
        steps = []
        with pytest.raises(EnvironmentNotReadyError, match=f"{message}.* is not installed; pip"):
            export_checkpoint(
                demo.CHECKPOINT, tmp_path / "bundle", ExportOptions(**options), steps.append
            )
        assert steps == []


class TestOutput:
    def test_export_existing_bundle_is_replaced_only_with_overwrite(
        self, tiny_bundle, tiny_checkpoint, tmp_path, written_graphs
    ):
        out = tmp_path / "bundle"
        shutil.copytree(tiny_bundle, out)
        (out / "manifest.json").write_text("{}")
        steps = []
        with pytest.raises(ArtifactError, match="--overwrite"):
            export_checkpoint(tiny_checkpoint, out, progress=steps.append)
        assert steps == []
        assert (out / "manifest.json").read_text() == "{}"
        export_checkpoint(tiny_checkpoint, out, ExportOptions(overwrite=True))
        assert open_bundle(out).manifest.checkpoint_fingerprint
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]

    def test_export_foreign_directory_is_refused(self, tiny_checkpoint, tmp_path):
        (tmp_path / "cat.jpg").write_bytes(b"cat")
        with pytest.raises(ArtifactError, match=r"has no manifest\.json: it is not replaced"):
            export_checkpoint(tiny_checkpoint, tmp_path, ExportOptions(overwrite=True))

    def test_export_checkpoint_directory_is_refused_as_output(self, tiny_checkpoint):
        with pytest.raises(ArtifactError, match="it is not replaced"):
            export_checkpoint(tiny_checkpoint, tiny_checkpoint, ExportOptions(overwrite=True))

    def test_export_to_the_hub_names_the_upload(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        message = "`coprs-deploy push DIRECTORY hf://lab/model`"
        with pytest.raises(ArtifactError, match=message):
            export_checkpoint(demo.CHECKPOINT, "hf://lab/model")
        assert list(tmp_path.iterdir()) == []

    def test_export_missing_checkpoint_is_named(self, tmp_path):
        with pytest.raises(CheckpointError, match="there is no checkpoint directory"):
            export_checkpoint(tmp_path / "absent", tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorflow"}, r"runtime and precision are .*; accepted: onnxruntime fp32"),
        ({"precision": "bf16"}, r"accepted for onnxruntime: fp32, fp16"),
        ({"precision": "fp4"}, r"precision is 'fp4'; accepted: fp32, bf16, fp16"),
        ({"precision": "int8"}, r"pass --calibration DIR with --precision int8"),
    ],
)
def test_export_options_unknown_runtime_or_precision_names_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        ExportOptions(**options)
