"""Precomputed embeddings: values, deduplication, resume after a kill, checksums."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from coprs_deploy.artifacts import exclusive
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.cli.main import main
from coprs_deploy.conversion import ConversionOptions, random_checkpoint
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from coprs_deploy.errors import ArtifactError
from coprs_deploy.images import image_key, prepare_image
from coprs_deploy.training import features
from coprs_deploy.training.features import FeatureStore, compute_features, max_feature_bytes

HALF_ROUNDING = 1e-3
"""Rounding error of a float16 embedding relative to its largest value."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return read_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def images():
    return [example.image for example in SceneExamples(PLAIN, 5)]


@pytest.fixture
def store(checkpoint, images, tmp_path):
    compute_features(checkpoint, images, 5, tmp_path / "store", images_per_shard=2)
    return tmp_path / "store"


def test_embedding_equals_that_of_the_encoder(checkpoint, images, store):
    model = load_segmentation_model(checkpoint)
    opened = FeatureStore(store)
    opened.require_encoder(model)
    assert len(opened) == 5
    for image in images:
        prepared = prepare_image(image, model.config.geometry)
        with torch.inference_mode():
            expected = model.image_encoder(torch.from_numpy(prepared.image))[0]
        actual = opened.embedding(image)
        assert actual.dtype == torch.float16
        assert (actual - expected).abs().max() <= HALF_ROUNDING * expected.abs().max()


def test_compute_features_stores_equal_images_once(checkpoint, images, tmp_path):
    twice = [*images[:2], images[0].copy(), *images[:2]]
    report = compute_features(checkpoint, twice, len(twice), tmp_path / "store")
    assert (report.num_images, report.num_new, report.num_examples) == (2, 2, 5)
    assert report.bytes_written >= max_feature_bytes(checkpoint, 2)
    again = compute_features(checkpoint, images, 5, tmp_path / "store")
    assert (again.num_images, again.num_new) == (5, 3)


def test_embedding_of_an_unknown_image_is_refused_with_the_fix(store):
    with pytest.raises(ArtifactError, match="adds missing embeddings"):
        FeatureStore(store).embedding(np.zeros((8, 9, 3), np.uint8))


def test_embedding_with_a_changed_byte_is_refused(store, images):
    shard = store / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    opened = FeatureStore(store)
    refused = 0
    for image in images:
        try:
            opened.embedding(image)
        except ArtifactError as error:
            assert "shard-00000.safetensors is damaged" in str(error)
            refused += 1
    assert refused == 1


@pytest.mark.parametrize("cut", [0, 5, 2000])
def test_feature_store_with_a_truncated_shard_is_refused(store, cut):
    shard = store / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match=r"shard-00000\.safetensors is damaged"):
        FeatureStore(store)


def test_compute_features_recomputes_a_removed_shard(checkpoint, images, store):
    (store / "shard-00000.safetensors").unlink()
    assert len(FeatureStore(store)) == 3
    assert image_key(images[0]) not in FeatureStore(store)
    assert compute_features(checkpoint, images, 5, store).num_new == 2
    opened = FeatureStore(store)
    assert all(opened.embedding(image).shape == opened.index.shape for image in images)


def test_features_of_another_encoder_are_refused(store, images, tmp_path):
    other = random_checkpoint(tmp_path / "other", options=ConversionOptions(seed=1))
    with pytest.raises(ValueError, match="different image encoder; recompute"):
        FeatureStore(store).require_encoder(load_segmentation_model(other))
    with pytest.raises(ValueError, match="different image encoder; choose another directory"):
        compute_features(other, images, 5, store)


def test_feature_store_of_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"coprs-deploy features CHECKPOINT"):
        FeatureStore(tmp_path)


def test_compute_features_on_a_full_disk_is_refused(checkpoint, tmp_path, monkeypatch):
    usage = features.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ArtifactError, match="GB are free"):
        compute_features(checkpoint, iter(()), 1000, tmp_path / "store")


def test_compute_features_in_a_locked_directory_is_refused(checkpoint, tmp_path):
    with (
        exclusive(tmp_path / features.LOCK_FILE, "held"),
        pytest.raises(ArtifactError, match="another process is writing"),
    ):
        compute_features(checkpoint, iter(()), 0, tmp_path)


def test_features_command_run_twice_computes_nothing_new(tiny_checkpoint, tmp_path, capsys):
    file = tmp_path / "some.jsonl"
    write_examples(file, SceneExamples(PLAIN, 3))
    command = ["features", str(tiny_checkpoint), str(file), "--out", str(tmp_path / "store")]
    for new in (3, 0):
        assert main([*command, "--json"]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["num_new"] == new
        assert "3 examples, at most" in shown.err


def test_features_command_without_a_valid_row_fails_with_the_reasons(
    tiny_checkpoint, tmp_path, capsys
):
    file = tmp_path / "bad.jsonl"
    write_examples(file, SceneExamples(PLAIN, 2))
    rows = [json.loads(line) | {"instruction": ""} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "store"
    assert main(["features", str(tiny_checkpoint), str(file), "--out", str(out)]) == 1
    assert "row 1" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_killed_features_command_resumes(tiny_checkpoint, tmp_path):
    file, out = tmp_path / "some.jsonl", tmp_path / "store"
    write_examples(file, SceneExamples(PLAIN, 400))
    command = [sys.executable, "-m", "coprs_deploy", "features", str(tiny_checkpoint)]
    command += [str(file), "--out", str(out), "--images-per-shard", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(out.glob("shard-*.safetensors"))) < 2:
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline, "no shard was written"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_stored = len(FeatureStore(out))
    assert 16 <= num_stored < 400
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout)["num_new"] == 400 - num_stored
    opened = FeatureStore(out)
    assert len(opened) == 400
    for example in SceneExamples(PLAIN, 20):
        assert opened.embedding(example.image).shape == opened.index.shape
