"""Image encoders recognized by their tensors: accepted, swapped, and refused with the reason."""

import msgspec
import pytest
import torch

from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.cli.main import main
from coprs_deploy.conversion import encoder_files
from coprs_deploy.conversion.converters import random_tensors
from coprs_deploy.conversion.weight_files import read_state_dict
from coprs_deploy.encoder_config import ENCODERS
from coprs_deploy.errors import ConversionError
from coprs_deploy.model_config import SAM_SIZES, SegmentationConfig
from tests.unit.light_encoders import ENCODERS as TINY
from tests.unit.light_encoders import SAM

NAMES = {"tiny_vit": "tinyvit_tiny", "efficientvit": "efficientvit_tiny", "resnet": "nanosam_tiny"}


@pytest.fixture(autouse=True)
def tiny_encoders(monkeypatch):
    """Make tiny encoders known."""
    known = {NAMES[family]: encoder for family, encoder in TINY.items()}
    monkeypatch.setattr(encoder_files, "ENCODERS", known)
    monkeypatch.setattr(encoder_files, "TITLES", {name: name for name in known})


@pytest.fixture(scope="module")
def sam_weights(sam_config):
    """Weights of a SAM: an encoder is put in the place of its own."""
    return {
        name: tensor
        for name, tensor in random_tensors(
            SegmentationConfig(policy_hidden_size=8, sam=SAM_SIZES["tiny"]), seed=1
        ).items()
        if not name.startswith("prior.")
    }


@pytest.fixture(scope="module")
def encoder_weights():
    """Weights of each tiny light encoder."""
    return {
        family: {
            name: tensor
            for name, tensor in random_tensors(
                SegmentationConfig(policy_hidden_size=8, sam=config), seed=2
            ).items()
            if name.startswith("image_encoder.")
        }
        for family, config in SAM.items()
    }


@pytest.fixture
def save(tmp_path):
    def save(tensors, name="encoder.pt"):
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    return save


def decoder_of(tensors):
    return {n: t for n, t in tensors.items() if not n.startswith(("image_encoder.", "prior."))}


def bare(tensors):
    """Names without ``image_encoder.``, as in a file with an encoder alone."""
    return {name.removeprefix("image_encoder."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", SAM)
@pytest.mark.parametrize("is_bare", [False, True])
def test_encoder_is_recognized_by_its_tensors(family, is_bare, encoder_weights, save):
    expected = encoder_weights[family]
    stored = dict(bare(expected) if is_bare else expected)
    counted = next(name for name in stored if name.endswith("running_var"))
    stored[counted.replace("running_var", "num_batches_tracked")] = torch.tensor(5)
    if family == "tiny_vit":
        prefix = "" if is_bare else "image_encoder."
        stored |= {
            f"{prefix}head.weight": torch.ones(3, 4),
            f"{prefix}norm_head.bias": torch.ones(4),
        }
        stored[f"{prefix}layers.1.blocks.0.attn.attention_bias_idxs"] = torch.ones(2).long()
    file = encoder_files.read_image_encoder(save({"model": stored}), SAM_SIZES["tiny"])
    assert file.sam == SAM[family]
    assert file.tensors.keys() == expected.keys()
    assert all(torch.equal(file.tensors[name], expected[name]) for name in expected)


def test_sam_encoder_is_accepted_in_place_of_a_light_one(sam_weights, save):
    file = encoder_files.read_image_encoder(save(sam_weights), SAM["resnet"])
    assert file.sam.image_encoder is None
    assert file.sam.geometry == SAM_SIZES["tiny"].geometry
    assert file.sam.encoder_depth == SAM_SIZES["tiny"].encoder_depth
    assert file.tensors.keys() == {n for n in sam_weights if n.startswith("image_encoder.")}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"image_encoder.fuse_stage2.weight": torch.ones(2)}, "non-commercial use only"),
        ({"fuse_stage2.op_list.0.conv.weight": torch.ones(2)}, "NTU S-Lab License 1.0"),
        ({"image_encoder.trunk.pos_embed": torch.ones(2)}, "SAM 2, whose embedding differs"),
        ({"vision_backbone.a": torch.ones(2)}, "SAM 3, whose embedding differs"),
        ({"unet.conv.weight": torch.ones(2)}, "has no image encoder that is known"),
        ({"prompt_encoder.a.weight": torch.ones(2)}, "has no image encoder that is known"),
        ({"image_encoder.backbone.conv1.weight": torch.ones(2)}, "of other sizes"),
        (
            {
                "image_encoder.pos_embed": torch.ones(2),
                "image_encoder.neck.0.weight": torch.ones(2),
            },
            "is not a SAM checkpoint",
        ),
    ],
)
def test_other_encoder_is_refused_with_the_reason(tensors, words, save):
    with pytest.raises(ConversionError, match=words):
        encoder_files.read_image_encoder(save(tensors), SAM_SIZES["tiny"])


def test_incomplete_encoder_is_refused_with_the_missing_tensor(encoder_weights, save):
    stored = dict(encoder_weights["tiny_vit"])
    del stored["image_encoder.neck.3.bias"]
    with pytest.raises(ConversionError, match=r"missing: neck\.3\.bias"):
        encoder_files.read_image_encoder(save(stored), SAM_SIZES["tiny"])


def test_encoder_of_another_grid_is_refused(save):
    tensors = random_tensors(
        SegmentationConfig(policy_hidden_size=8, sam=SAM_SIZES["tiny"]), seed=1
    )
    grid = msgspec.structs.replace(SAM_SIZES["tiny"].geometry, image_size=256)
    sam = msgspec.structs.replace(SAM_SIZES["tiny"], geometry=grid)
    with pytest.raises(
        ConversionError, match="an embedding of 16 cells a side, the model takes 32"
    ):
        encoder_files.read_image_encoder(save(tensors), sam)


class TestDecoder:
    @pytest.mark.parametrize("family", SAM)
    def test_same_decoder_is_accepted_also_in_half_precision(
        self, family, encoder_weights, sam_weights, save
    ):
        stored = encoder_weights[family] | {
            name: tensor.half() for name, tensor in decoder_of(sam_weights).items()
        }
        file = encoder_files.read_image_encoder(save(stored), SAM_SIZES["tiny"])
        encoder_files.require_same_decoder(file, sam_weights, "sam_vit_tiny.pth")

    def test_moved_decoder_is_refused_with_its_distance(self, encoder_weights, sam_weights, save):
        moved = {n: t * 1.02 for n, t in decoder_of(sam_weights).items()}
        file = encoder_files.read_image_encoder(
            save(encoder_weights["efficientvit"] | moved), SAM_SIZES["tiny"]
        )
        with pytest.raises(
            ConversionError, match=r"differs from that of .* by 2\.0%.*distilled_model/"
        ):
            encoder_files.require_same_decoder(file, sam_weights, "sam_vit_tiny.pth")

    def test_decoder_of_another_kind_is_refused(self, encoder_weights, sam_weights, save):
        other = {"mask_decoder.other.weight": torch.ones(3)}
        file = encoder_files.read_image_encoder(
            save(encoder_weights["resnet"] | other), SAM_SIZES["tiny"]
        )
        with pytest.raises(ConversionError, match="of another kind"):
            encoder_files.require_same_decoder(file, sam_weights, "sam_vit_tiny.pth")


class TestSwap:
    @pytest.mark.parametrize("family", SAM)
    def test_swap_replaces_the_encoder_and_nothing_else(
        self, family, tiny_checkpoint, encoder_weights, save, tmp_path, capsys
    ):
        file, out = save(bare(encoder_weights[family])), tmp_path / "light"
        command = ["convert", str(tiny_checkpoint), "--image-encoder", str(file), "--out", str(out)]
        assert main(command) == 0
        old, new = read_checkpoint(tiny_checkpoint), read_checkpoint(out)
        assert new.config.model.sam == SAM[family]
        assert new.config.prompt == old.config.prompt
        assert new.config.provenance["image_encoder"] == file.name
        before = load_segmentation_model(old).state_dict()
        after = load_segmentation_model(new).state_dict()
        kept = {name for name in before if not name.startswith("image_encoder.")}
        assert all(torch.equal(before[name], after[name]) for name in kept)
        assert after.keys() - kept == encoder_weights[family].keys()
        policy = {p.name: p.read_bytes() for p in old.policy_path.iterdir() if p.is_file()}
        assert policy == {p.name: p.read_bytes() for p in new.policy_path.iterdir() if p.is_file()}

    def test_swap_with_trained_decoder_names_sam_as_the_fix(
        self, tiny_checkpoint, encoder_weights, sam_weights, save, tmp_path, capsys
    ):
        file = save(encoder_weights["tiny_vit"] | decoder_of(sam_weights))
        sam, out = save(sam_weights, "sam_vit_tiny.pth"), tmp_path / "light"
        command = ["convert", str(tiny_checkpoint), "--image-encoder", str(file), "--out", str(out)]
        assert main(command) == 2 or not out.exists()
        assert "name the SAM it came from with --sam" in capsys.readouterr().err
        assert not out.exists()
        assert main([*command, "--sam", str(sam)]) == 0
        assert read_checkpoint(out).config.model.sam == SAM["tiny_vit"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["CHECKPOINT"], "--image-encoder is missing"),
            (["CHECKPOINT", "--image-encoder", "FILE", "--prompt-template", "FILE"], "--prompt-"),
            (["--random", "--image-encoder", "vit_x"], "accepted with --random: tinyvit_5m"),
            (["CHECKPOINT", "--image-encoder", "missing.pt"], "there is no file"),
        ],
    )
    def test_swap_refuses_wrong_use(
        self, arguments, words, tiny_checkpoint, encoder_weights, save, tmp_path, capsys
    ):
        file = tmp_path / "text"
        file.write_text("{instruction}")
        named = {"CHECKPOINT": str(tiny_checkpoint), "FILE": str(file)}
        out = tmp_path / "out"
        command = ["convert", *(named.get(a, a) for a in arguments), "--out", str(out)]
        assert main(command) != 0
        assert words in capsys.readouterr().err
        assert not out.exists()


def test_convert_policy_and_sam_with_light_encoder(
    untuned_policy, sam_weights, encoder_weights, save, tmp_path, monkeypatch
):
    monkeypatch.setattr("coprs_deploy.conversion.weight_files.PUBLIC_DECODER_HEADS", 2)
    sam = save(sam_weights, "sam_vit_tiny.pth")
    encoder = save(encoder_weights["resnet"] | decoder_of(sam_weights))
    command = ["convert", "--policy", str(untuned_policy), "--sam", str(sam)]
    out = tmp_path / "out"
    assert main([*command, "--image-encoder", str(encoder), "--out", str(out)]) == 0
    made = read_checkpoint(out)
    assert made.config.model.sam == SAM["resnet"]
    assert made.config.provenance["image_encoder"] == encoder.name
    weights = load_segmentation_model(made).state_dict()
    name = "image_encoder.pos_embedding"
    assert torch.equal(weights[name], encoder_weights["resnet"][name])


def test_light_encoder_as_sam_names_the_option(encoder_weights, sam_weights, save):
    from coprs_deploy.conversion.weight_files import read_sam

    file = save(encoder_weights["tiny_vit"] | decoder_of(sam_weights))
    assert "image_encoder.neck.0.weight" in read_state_dict(file)
    with pytest.raises(ConversionError, match="pass a light encoder as --image-encoder"):
        read_sam(file)


def test_random_checkpoint_with_encoder_name_has_that_encoder(tmp_path, capsys):
    command = ["convert", "--random", "--sam", "tiny", "--image-encoder", "tinyvit_5m"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    sam = read_checkpoint(tmp_path / "out").config.model.sam
    assert sam == SAM_SIZES["tiny"].with_image_encoder(ENCODERS["tinyvit_5m"])
    assert sam.encoder_name == "TinyViT-5M (MobileSAM, TinySAM)"
