"""Checkpoints: writing, reading, and refusing what does not fit."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from coprs_deploy.checkpoint import (
    CONFIG_FILE,
    NAMES_SHOWN,
    POLICY_DIRECTORY,
    SEGMENTATION_FILE,
    CheckpointConfig,
    PolicyImageLimits,
    check_tensors,
    expected_shapes,
    load_segmentation_model,
    read_checkpoint,
    write_checkpoint,
)
from coprs_deploy.errors import ArtifactError, CheckpointError
from coprs_deploy.model_config import SAM_SIZES, SegmentationConfig
from coprs_deploy.models import SegmentationModel
from coprs_deploy.prompts import PromptTemplate

MODEL = SegmentationConfig(policy_hidden_size=64, sam=SAM_SIZES["tiny"])
CONFIG = CheckpointConfig(
    model=MODEL,
    prompt=PromptTemplate("<image> {instruction}", "<image>"),
    policy_image=PolicyImageLimits(784, 12_544),
    provenance={"source": "made by hand", "seed": 3},
)
PRIOR_QUERY = "prior.q_proj.weight"


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in expected_shapes(MODEL).items()
    }


def save_policy(directory):
    (directory / "config.json").write_text('{"model_type": "none"}')


@pytest.fixture
def checkpoint(tmp_path, tensors):
    return write_checkpoint(tmp_path / "checkpoint", CONFIG, tensors, save_policy)


def change_config(checkpoint, change):
    file = checkpoint.path / CONFIG_FILE
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


# Writing and reading


def test_read_checkpoint_returns_written_config(checkpoint):
    read = read_checkpoint(checkpoint.path)
    assert read == checkpoint
    assert read.config == CONFIG
    assert read.policy_path == checkpoint.path / "policy"
    assert read_checkpoint(str(checkpoint.path)) == checkpoint
    assert sorted(path.name for path in checkpoint.path.iterdir()) == [
        CONFIG_FILE,
        POLICY_DIRECTORY,
        SEGMENTATION_FILE,
    ]


def test_load_model_weights_equal_written_bits(checkpoint, tensors):
    model = load_segmentation_model(checkpoint)
    state = model.state_dict()
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_load_model_computes(checkpoint):
    model = load_segmentation_model(checkpoint)
    with torch.no_grad():
        prior, mask = model(
            torch.zeros(1, 3, 128, 128), torch.zeros(2, 64), torch.tensor([100, 128])
        )
    assert prior.shape == mask.shape == (2, 1, 64, 64)


def test_load_model_narrow_weights_become_float32(checkpoint, tensors):
    file = checkpoint.path / SEGMENTATION_FILE
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, file)
    state = load_segmentation_model(checkpoint).state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.bfloat16().float()), name


def test_write_checkpoint_strided_tensors_are_written(tmp_path, tensors):
    strided = {
        name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in tensors.items()
    }
    assert any(not tensor.is_contiguous() for tensor in strided.values())
    written = write_checkpoint(tmp_path / "checkpoint", CONFIG, strided, save_policy)
    stored = load_file(written.path / SEGMENTATION_FILE)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def test_fingerprint_depends_on_contents(tmp_path, tensors, checkpoint):
    again = write_checkpoint(tmp_path / "again", CONFIG, tensors, save_policy)
    assert again.fingerprint() == checkpoint.fingerprint()
    (again.policy_path / "config.json").write_text("{}")
    assert again.fingerprint() != checkpoint.fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", again.fingerprint())


def test_read_checkpoint_imports_no_torch_and_reads_no_weights(checkpoint):
    (checkpoint.path / SEGMENTATION_FILE).write_bytes(b"not weights")
    program = (
        "import sys; from coprs_deploy.checkpoint import read_checkpoint\n"
        "read_checkpoint(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", program, checkpoint.path], check=False)
    assert run.returncode == 0


# Atomicity


def fail_to_save(directory):
    (directory / "half.safetensors").write_bytes(b"half")
    raise OSError("no space left")


def test_write_checkpoint_shared_memory_is_written(tmp_path, tensors):
    shape = tensors["mask_decoder.mask_tokens.weight"].shape
    whole = torch.arange(2.0 * shape.numel())
    same = whole[: shape.numel()].reshape(shape)
    shared = {
        **tensors,
        "mask_decoder.mask_tokens.weight": same,
        "mask_decoder.iou_token.weight": same[:1],
        "prompt_encoder.no_mask_embed.weight": same[:1],
    }
    written = write_checkpoint(tmp_path / "shared", CONFIG, shared, save_policy)
    stored = load_file(written.path / SEGMENTATION_FILE)
    assert stored.keys() == shared.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in shared.items())


def test_write_checkpoint_failing_policy_leaves_nothing(tmp_path, tensors):
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(tmp_path / "checkpoint", CONFIG, tensors, fail_to_save)
    assert list(tmp_path.iterdir()) == []


def test_write_checkpoint_failing_policy_keeps_old_checkpoint(tmp_path, tensors, checkpoint):
    before = checkpoint.fingerprint()
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(checkpoint.path, CONFIG, tensors, fail_to_save, overwrite=True)
    assert checkpoint.fingerprint() == before
    assert list(tmp_path.iterdir()) == [checkpoint.path]


def test_write_checkpoint_config_without_json_leaves_nothing(tmp_path, tensors):
    config = CheckpointConfig(MODEL, CONFIG.prompt, provenance={"source": object()})
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path / "checkpoint", config, tensors, save_policy)
    assert list(tmp_path.iterdir()) == []


def test_write_checkpoint_policy_gets_existing_empty_directory(tmp_path, tensors):
    seen = []

    def look(directory):
        seen.append((directory.name, directory.is_dir(), list(directory.iterdir())))

    write_checkpoint(tmp_path / "checkpoint", CONFIG, tensors, look)
    assert seen == [(POLICY_DIRECTORY, True, [])]


def test_write_checkpoint_existing_is_replaced_only_with_overwrite(checkpoint, tensors):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    before = checkpoint.fingerprint()
    with pytest.raises(ArtifactError, match="pass --overwrite"):
        write_checkpoint(checkpoint.path, CONFIG, zeros, save_policy)
    assert checkpoint.fingerprint() == before
    write_checkpoint(checkpoint.path, CONFIG, zeros, save_policy, overwrite=True)
    stored = load_file(checkpoint.path / SEGMENTATION_FILE)
    assert not any(tensor.any() for tensor in stored.values())


def test_write_checkpoint_foreign_directory_is_refused(tmp_path, tensors):
    (tmp_path / "photo.jpg").write_text("dear")
    with pytest.raises(ArtifactError, match=r"has no config\.json: it is not replaced"):
        write_checkpoint(tmp_path, CONFIG, tensors, save_policy, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_write_checkpoint_wrong_tensors_leave_nothing(tmp_path, tensors):
    incomplete = {name: tensor for name, tensor in tensors.items() if name != PRIOR_QUERY}
    with pytest.raises(CheckpointError, match=f"missing: {PRIOR_QUERY}"):
        write_checkpoint(tmp_path / "checkpoint", CONFIG, incomplete, save_policy)
    assert list(tmp_path.iterdir()) == []


# Refusals


def test_read_checkpoint_missing_directory_names_command(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint directory .*nowhere; `coprs-deploy"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        read_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("part", [CONFIG_FILE, SEGMENTATION_FILE, POLICY_DIRECTORY])
def test_read_checkpoint_missing_part_is_named(checkpoint, part):
    (checkpoint.path / part).rename(checkpoint.path.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=f"has no {re.escape(part)}; a checkpoint contains"):
        read_checkpoint(checkpoint.path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", pytest.param(b"[" * 100_000, id="nested")],
)
def test_read_checkpoint_invalid_config_is_refused(checkpoint, content):
    (checkpoint.path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid: ."):
        read_checkpoint(checkpoint.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(modell={}), "unknown field `modell`"),
        (lambda data: data.pop("prompt"), "missing required field `prompt`"),
        (lambda data: data["model"].update(policy_hidden_size=0), "policy_hidden_size is 0"),
        (lambda data: data["model"]["sam"].update(encoder_depth="3"), r"\$\.model\.sam"),
        (lambda data: data["policy_image"].update(min_pixels=99_999), "min_pixels is 99999"),
        (lambda data: data["prompt"].update(text=""), "exactly once"),
    ],
)
def test_read_checkpoint_wrong_field_is_named(checkpoint, change, message):
    change_config(checkpoint, change)
    with pytest.raises(CheckpointError, match=rf"config\.json is not valid: .*{message}"):
        read_checkpoint(checkpoint.path)


@pytest.mark.parametrize(("low", "high"), [(0, 10), (-1, 10), (11, 10), (9, 10**12)])
def test_image_limits_out_of_order_are_refused(low, high):
    with pytest.raises(ValueError, match=f"min_pixels is {low}, max_pixels {high}; accepted: 1 <="):
        PolicyImageLimits(low, high)


def test_image_limits_default_equals_paper():
    assert PolicyImageLimits() == PolicyImageLimits(3_136, 705_600)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop(PRIOR_QUERY), f"missing: {PRIOR_QUERY}"),
        (lambda stored: stored.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda stored: stored.update({PRIOR_QUERY: torch.zeros(64, 65)}),
            re.escape(f"misshaped: {PRIOR_QUERY} is (64, 65), not (64, 64)"),
        ),
        (
            lambda stored: stored.update({PRIOR_QUERY: torch.zeros(4096)}),
            re.escape(f"misshaped: {PRIOR_QUERY} is (4096,), not (64, 64)"),
        ),
    ],
)
def test_load_model_wrong_weights_are_named(checkpoint, tensors, change, message):
    stored = dict(tensors)
    change(stored)
    file = checkpoint.path / SEGMENTATION_FILE
    save_file(stored, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_segmentation_model(checkpoint)
    assert str(file) in str(caught.value)


def test_load_model_other_architecture_is_refused(checkpoint):
    change_config(checkpoint, lambda data: data["model"].update(policy_hidden_size=65))
    with pytest.raises(CheckpointError, match=rf"{PRIOR_QUERY} is \(64, 64\), not \(64, 65\)"):
        load_segmentation_model(read_checkpoint(checkpoint.path))


@pytest.mark.parametrize("kept", [0, 7, 2_000, -1])
def test_load_model_truncated_file_is_refused(checkpoint, kept):
    file = checkpoint.path / SEGMENTATION_FILE
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"segmentation\.safetensors cannot be read: ."):
        load_segmentation_model(checkpoint)


def test_load_model_integers_are_refused(checkpoint, tensors):
    stored = {**tensors, PRIOR_QUERY: tensors[PRIOR_QUERY].int()}
    save_file(stored, checkpoint.path / SEGMENTATION_FILE)
    message = (
        r"segmentation\.safetensors has prior\.q_proj\.weight as torch\.int32; accepted: dense"
    )
    with pytest.raises(CheckpointError, match=message):
        load_segmentation_model(checkpoint)


def test_load_model_pickle_is_refused(checkpoint, tensors):
    torch.save(tensors, checkpoint.path / SEGMENTATION_FILE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_segmentation_model(checkpoint)


def test_expected_shapes_equal_model():
    state = SegmentationModel(MODEL).state_dict()
    assert expected_shapes(MODEL) == {name: tuple(t.shape) for name, t in state.items()}


def test_check_tensors_any_order_is_accepted():
    wanted = {"a": (1, 2), "b": (2,)}
    assert check_tensors({"b": [2], "a": (1, 2)}, wanted, "the weights") is None
    assert check_tensors({}, {}, "the weights") is None


def test_check_tensors_every_mismatch_is_listed():
    found, wanted = {"a": (1,), "c": (3,)}, {"a": (2,), "b": (2,)}
    message = (
        "the weights do not match .*: missing: b; unexpected: c; misshaped: a is (1,), not (2,)"
    )
    with pytest.raises(CheckpointError, match=re.escape(message).replace(r"\.\*", ".*")):
        check_tensors(found, wanted, "the weights")


@pytest.mark.parametrize("count", [NAMES_SHOWN, NAMES_SHOWN + 1, 100])
def test_check_tensors_long_list_is_shortened(count):
    wanted = {f"layer{number:03}": (1,) for number in range(count)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors({}, wanted, "the weights")
    message = str(caught.value)
    assert message.count("layer") == NAMES_SHOWN
    hidden = count - NAMES_SHOWN
    assert message.endswith(f" and {hidden} more" if hidden else f"layer{count - 1:03}")
