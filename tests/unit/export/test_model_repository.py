"""Model repository of Triton: files, configurations, and the Python model in this process."""

import hashlib
import io
import runpy
import sys

import msgspec
import numpy as np
import pytest
from PIL import Image

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.cli.main import main
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.engines.graphs import masks_at_original_size
from coprs_deploy.errors import ArtifactError
from coprs_deploy.export.model_repository import graph_config, write_model_repository
from coprs_deploy.images import load_image, prepare_image
from coprs_deploy.specs import GRAPH_NAMES, OptimizationProfile, graph_specs
from tests import ROOT
from tests.unit.triton_stand_in import Request, check_tensors, read_config, stand_in

SCENE = (ROOT / "examples" / "scene.png").read_bytes()
MODELS = ["coprs_image_encoder", "coprs_prior", "coprs_mask_decoder"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "models"
    write_model_repository(open_bundle(demo.BUNDLE), path)
    return path


@pytest.fixture
def python_model(repository, monkeypatch):
    """The class in ``model.py``, initialized as Triton does it, and the models that it called."""
    module, calls = stand_in(repository)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    model = runpy.run_path(str(repository / "coprs/1/model.py"))["TritonPythonModel"]()
    model.initialize({"model_repository": str(repository / "coprs"), "model_version": "1"})
    return model, calls


def concentrations(count):
    return np.random.default_rng(0).normal(0, 2, (count, 128)).astype(np.float32)


def request(image, vectors):
    return Request(image=np.array([image], np.object_), concentration=vectors)


def expected_masks(image, vectors):
    """The masks of the bundle itself, without Triton."""
    bundle = open_bundle(demo.BUNDLE)
    graphs = {name: open_bundle_graph(bundle, name, RunnerOptions()) for name in GRAPH_NAMES}
    geometry = bundle.manifest.geometry
    with SegmentationGraphs(graphs) as together:
        prepared = prepare_image(load_image(image), geometry)
        embedding = together.encode(prepared)
        _, chunks = together.priors_and_masks(embedding, vectors, prepared.unpadded_size)
        return masks_at_original_size(chunks, len(vectors), prepared, geometry)


def test_repository_has_a_valid_configuration_for_every_model(repository):
    assert sorted(p.name for p in repository.iterdir()) == sorted(["coprs", *MODELS])
    for folder in repository.iterdir():
        config = read_config(folder)
        assert config.name == folder.name
        assert config.max_batch_size == 0
        assert config.backend == ("python" if folder.name == "coprs" else "onnxruntime")
        file = config.default_model_filename or "model.py"
        assert (folder / "1" / file).is_file()
    kinds = read_config(repository / "coprs").instance_group
    assert [(group.kind, group.count) for group in kinds] == [(2, 2)]  # KIND_CPU


def test_graph_files_are_those_of_the_bundle(repository):
    for name in GRAPH_NAMES:
        copied = (repository / f"coprs_{name}" / "1" / f"{name}.onnx").read_bytes()
        original = (demo.BUNDLE / f"{name}.onnx").read_bytes()
        assert hashlib.sha256(copied).digest() == hashlib.sha256(original).digest()


@pytest.mark.parametrize("count", [1, 3])
def test_python_model_returns_the_masks_of_the_bundle(repository, python_model, count):
    model, calls = python_model
    scaled = io.BytesIO()
    Image.open(io.BytesIO(SCENE)).resize((300, 200)).save(scaled, "PNG")
    vectors = concentrations(count)
    sent = request(scaled.getvalue(), vectors)
    check_tensors(read_config(repository / "coprs").input, sent.tensors)
    (response,) = model.execute([sent])
    assert not response.has_error()
    check_tensors(read_config(repository / "coprs").output, response.output_tensors())
    masks, logits = (tensor.as_numpy() for tensor in response.output_tensors())
    assert masks.shape == (count, 200, 300)
    assert logits.shape == (count, 1, 64, 64)
    expected = expected_masks(scaled.getvalue(), vectors)
    assert expected.any()
    assert (masks != expected).mean() < 1e-4  # the order of threads may change a last bit
    assert calls == [MODELS[0], *count * [MODELS[1]], *count * [MODELS[2]]]


@pytest.mark.parametrize(
    ("image", "vectors", "message"),
    [
        (b"no image", concentrations(1), "is not an image that Pillow can read"),
        (SCENE, concentrations(0), "concentration has 0 rows; accepted: one for each target"),
        (SCENE, concentrations(1)[:, :64], "it takes concentration: float32 (1, 128)"),
    ],
)
def test_wrong_request_gets_an_error_and_the_others_their_masks(
    python_model, image, vectors, message
):
    model, _ = python_model
    wrong, right = model.execute([request(image, vectors), request(SCENE, concentrations(1))])
    assert wrong.has_error() and not right.has_error()
    assert message in wrong.error().message()
    assert wrong.error().code == "invalid argument"


def test_symbolic_sizes_are_open_in_the_configuration():
    manifest = open_bundle(demo.BUNDLE).manifest
    profile = OptimizationProfile(1, 2, 4)
    specs = graph_specs(manifest.geometry, 128, profile, profile)
    for name, record in manifest.graphs.items():
        changes = {"spec": specs[name], "runtime": "tensorrt", "file": f"{name}.engine"}
        text = graph_config(msgspec.structs.replace(record, **changes))
        assert 'backend: "tensorrt"' in text
        assert f'default_model_filename: "{name}.engine"' in text
        assert "dims: [ -1," in text


def test_only_a_model_repository_is_replaced(tmp_path):
    path, bundle = tmp_path / "models", open_bundle(demo.BUNDLE)
    write_model_repository(bundle, path)
    with pytest.raises(ArtifactError, match="pass --overwrite"):
        write_model_repository(bundle, path)
    write_model_repository(bundle, path, overwrite=True)
    (path / "coprs" / "config.pbtxt").unlink()
    with pytest.raises(ArtifactError, match="it is not replaced"):
        write_model_repository(bundle, path, overwrite=True)


def test_export_for_a_runtime_without_backend_writes_nothing(tiny_checkpoint, tmp_path, capsys):
    out, models = tmp_path / "bundle", tmp_path / "models"
    command = ["export", str(tiny_checkpoint), "--out", str(out), "--triton", str(models)]
    assert main([*command, "--runtime", "openvino"]) == 2
    assert "accepted with --triton: onnxruntime, tensorrt" in capsys.readouterr().err
    assert not out.exists() and not models.exists()


@pytest.mark.parametrize(("out", "models"), [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_export_repository_that_is_not_beside_the_bundle_is_refused(out, models, tmp_path, capsys):
    command = ["export", str(demo.CHECKPOINT), "--out", str(tmp_path / out)]
    assert main([*command, "--triton", str(tmp_path / models), "--overwrite"]) == 2
    assert "choose a directory beside it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_export_writes_a_repository_beside_the_bundle(tiny_checkpoint, tmp_path):
    out, models = tmp_path / "bundle", tmp_path / "models"
    command = ["export", str(tiny_checkpoint), "--out", str(out), "--triton", str(models)]
    assert main(command) == 0
    assert read_config(models / "coprs").input[1].dims[1] == 64
    manifest = (models / "coprs" / "manifest.json").read_bytes()
    assert manifest == (out / "manifest.json").read_bytes()
