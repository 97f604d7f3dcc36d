"""How far prior and masks move with another image encoder."""

import json

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.cli.main import main
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export.encoder_swap import compare_image_encoders, mean_movement
from tests.unit.light_encoders import write_light_checkpoint


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(90, 60), (50, 80)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def light(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint with a light encoder of another input size."""
    path = tmp_path_factory.mktemp("light") / "checkpoint"
    return write_light_checkpoint(path, tiny_checkpoint, "tiny_vit", swap=True).path


def test_same_checkpoint_does_not_move(tiny_checkpoint, images):
    moved = compare_image_encoders(tiny_checkpoint, tiny_checkpoint, images)
    assert [m.image for m in moved] == [str(images / "0.png"), str(images / "1.png")]
    assert mean_movement(moved).mask_iou == 1.0
    assert mean_movement(moved).embedding_error == mean_movement(moved).prior_error == 0.0


def test_unrelated_encoder_moves_everything(tiny_checkpoint, light, images):
    for moved in compare_image_encoders(tiny_checkpoint, light, images):
        assert moved.embedding_error > 0.5
        assert abs(moved.embedding_cosine) < 0.5
        assert moved.prior_error > 0
        assert moved.mask_iou < 0.9


def test_checkpoints_that_differ_elsewhere_are_refused(tiny_checkpoint, images, tmp_path):
    other = tmp_path / "other"
    write_light_checkpoint(other, tiny_checkpoint, "resnet", seed=5)
    with pytest.raises(EquivalenceError, match="in more than its image encoder, first in "):
        compare_image_encoders(tiny_checkpoint, other, images)
    assert read_checkpoint(other).config.model.sam.image_encoder is not None


def test_verify_encoder_swap_prints_images_and_mean(tiny_checkpoint, light, images, capsys):
    command = ["verify", "--encoder-swap", str(tiny_checkpoint), str(light)]
    assert main([*command, "--images", str(images)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == [
        str(images / "0.png"),
        str(images / "1.png"),
        "mean",
    ]
    assert main([*command, "--images", str(images), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["mean"]["mask_iou"] == np.mean([m["mask_iou"] for m in shown["images"]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "BUNDLE --against CHECKPOINT, or --encoder-swap OLD NEW"),
        (["--encoder-swap", "a", "b"], "needs --images DIR"),
        (["--encoder-swap", "CHECKPOINT", "CHECKPOINT", "--images", "EMPTY"], "has no images"),
        (["--encoder-swap", "CHECKPOINT", "CHECKPOINT", "--images", "none"], "is no directory"),
    ],
)
def test_verify_encoder_swap_refuses_wrong_use(arguments, words, tiny_checkpoint, tmp_path, capsys):
    named = {"CHECKPOINT": str(tiny_checkpoint), "EMPTY": str(tmp_path)}
    assert main(["verify", *(named.get(a, a) for a in arguments)]) != 0
    assert words in capsys.readouterr().err
