"""Embeddings on disk: right, stored once, resumable after a real kill, checked when read."""

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
from coprs_deploy.training.features import FeatureStore, compute_features, largest_bytes

HALF_ROUNDING = 1e-3
"""Of an embedding in float16, relative to its largest value."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return read_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def images():
    return [example.image for example in SceneExamples(PLAIN, 5)]


@pytest.fixture
def store(checkpoint, images, tmp_path):
    compute_features(checkpoint, images, 5, tmp_path / "store", shard_images=2)
    return tmp_path / "store"


def test_an_embedding_is_that_of_the_encoder(checkpoint, images, store):
    model = load_segmentation_model(checkpoint)
    opened = FeatureStore(store)
    opened.require_encoder(model)
    assert len(opened) == 5
    for image in images:
        prepared = prepare_image(image, model.config.geometry)
        with torch.inference_mode():
            expected = model.image_encoder(torch.from_numpy(prepared.image))[0]
        found = opened.embedding(image)
        assert found.dtype == torch.float16
        assert (found - expected).abs().max() <= HALF_ROUNDING * expected.abs().max()


def test_equal_images_are_stored_once(checkpoint, images, tmp_path):
    twice = [*images[:2], images[0].copy(), *images[:2]]
    report = compute_features(checkpoint, twice, len(twice), tmp_path / "store")
    assert (report.num_images, report.num_new, report.num_examples) == (2, 2, 5)
    assert report.bytes_written >= largest_bytes(checkpoint, 2)
    again = compute_features(checkpoint, images, 5, tmp_path / "store")
    assert (again.num_images, again.num_new) == (5, 3)


def test_a_picture_that_is_missing_is_named_with_the_way_out(store):
    with pytest.raises(ArtifactError, match="adds what is missing"):
        FeatureStore(store).embedding(np.zeros((8, 9, 3), np.uint8))


def test_a_changed_byte_is_noticed(store, images):
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
def test_a_shard_that_was_cut_short_is_refused(store, images, cut):
    shard = store / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match="damaged"):
        FeatureStore(store).embedding(images[0])


def test_a_shard_without_its_listing_does_not_exist(checkpoint, images, store):
    (store / "shard-00002.json").unlink()
    assert len(FeatureStore(store)) == 4
    assert compute_features(checkpoint, images, 5, store).num_new == 1
    assert image_key(images[4]) in FeatureStore(store)


def test_a_removed_shard_is_computed_again(checkpoint, images, store):
    for name in ("shard-00000.json", "shard-00000.safetensors"):
        (store / name).unlink()
    assert compute_features(checkpoint, images, 5, store).num_new == 2
    opened = FeatureStore(store)
    assert all(opened.embedding(image).shape == opened.index.shape for image in images)


def test_a_listing_without_its_shard_is_refused(store):
    (store / "shard-00001.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors is missing"):
        FeatureStore(store)


def test_another_encoder_is_refused(store, images, tmp_path):
    other = random_checkpoint(tmp_path / "other", options=ConversionOptions(seed=1))
    with pytest.raises(ValueError, match="another image encoder"):
        FeatureStore(store).require_encoder(load_segmentation_model(other))
    with pytest.raises(ValueError, match="choose another folder"):
        compute_features(other, images, 5, store)


def test_a_folder_without_embeddings_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"coprs-deploy features CHECKPOINT"):
        FeatureStore(tmp_path)


def test_a_disk_that_is_too_small_is_said_before_the_start(checkpoint, tmp_path, monkeypatch):
    usage = features.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ArtifactError, match="GB free"):
        compute_features(checkpoint, iter(()), 1000, tmp_path / "store")


def test_two_computations_do_not_share_a_folder(checkpoint, tmp_path):
    with (
        exclusive(tmp_path / features.LOCK_FILE, "held"),
        pytest.raises(ArtifactError, match="another process writes"),
    ):
        compute_features(checkpoint, iter(()), 0, tmp_path)


def test_the_command_line_computes_and_then_has_nothing_to_do(tiny_checkpoint, tmp_path, capsys):
    file = tmp_path / "some.jsonl"
    write_examples(file, SceneExamples(PLAIN, 3))
    command = ["features", str(tiny_checkpoint), str(file), "--out", str(tmp_path / "store")]
    for new in (3, 0):
        assert main([*command, "--json"]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["num_new"] == new
        assert "3 examples, at most" in shown.err


@pytest.mark.slow
def test_a_killed_computation_goes_on(tiny_checkpoint, tmp_path):
    file, out = tmp_path / "some.jsonl", tmp_path / "store"
    write_examples(file, SceneExamples(PLAIN, 400))
    command = [sys.executable, "-m", "coprs_deploy.cli.main", "features", str(tiny_checkpoint)]
    command += [str(file), "--out", str(out), "--shard-images", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(out.glob("shard-*.json"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "no shard was written"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(FeatureStore(out))
    assert 16 <= kept < 400
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout)["num_new"] == 400 - kept
    opened = FeatureStore(out)
    assert len(opened) == 400
    for example in SceneExamples(PLAIN, 20):
        opened.embedding(example.image)
