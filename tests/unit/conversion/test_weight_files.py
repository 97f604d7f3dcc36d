"""Weight files of other projects: reading, and refusing without running code."""

import argparse
import contextlib
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from coprs_deploy.checkpoint import expected_shapes
from coprs_deploy.conversion.weight_files import (
    find_shards,
    merge_shards,
    read_sam,
    read_state_dict,
    sam_config_from_shapes,
)
from coprs_deploy.errors import ConversionError
from coprs_deploy.model_config import SAM_SIZES, SamConfig, SegmentationConfig
from coprs_deploy.specs import Geometry


def sam_shapes(config):
    shapes = expected_shapes(SegmentationConfig(policy_hidden_size=8, sam=config))
    return {name: shape for name, shape in shapes.items() if not name.startswith("prior.")}


@st.composite
def sam_configs(draw):
    heads, patch = draw(st.integers(1, 3)), 4 * draw(st.integers(1, 3))
    depth, grid = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    windowed = draw(st.integers(0, depth - 1))  # at least one block shows the window's size
    others = [block for block in range(depth) if block != windowed]
    global_blocks = draw(st.sets(st.sampled_from(others))) if others else ()
    return SamConfig(
        encoder_embed_dim=heads * 4 * draw(st.integers(1, 3)),
        encoder_depth=depth,
        encoder_num_heads=heads,
        encoder_global_attn_indexes=tuple(sorted(global_blocks)),
        window_size=draw(st.integers(1, grid - 1)),
        mlp_ratio=float(draw(st.integers(1, 4))),
        mask_in_chans=4 * draw(st.integers(1, 3)),
        decoder_depth=draw(st.integers(1, 2)),
        decoder_mlp_dim=draw(st.integers(1, 9)),
        num_mask_tokens=draw(st.integers(1, 4)),
        iou_head_hidden_dim=draw(st.integers(1, 9)),
        geometry=Geometry(
            image_size=grid * patch,
            patch_size=patch,
            out_chans=16 * draw(st.integers(1, 3)),
        ),
    )


@settings(max_examples=25, deadline=None)
@given(sam_configs())
def test_sam_config_from_shapes_returns_sizes(config):
    assert sam_config_from_shapes(sam_shapes(config)) == config


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_sam_config_from_shapes_returns_public_sizes(size):
    assert sam_config_from_shapes(sam_shapes(SAM_SIZES[size])) == SAM_SIZES[size]


def test_read_sam_returns_config_and_weights(sam_file, sam_config, sam_tensors):
    config, tensors = read_sam(sam_file)
    assert config == sam_config
    assert tensors.keys() == sam_tensors.keys()
    assert all(torch.equal(tensors[name], sam_tensors[name]) for name in tensors)


def test_read_state_dict_reads_old_format(tmp_path):
    path = tmp_path / "old.pth"
    weight = torch.arange(6.0)
    torch.save({"weight": weight}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(path)["weight"], weight)


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def write_with_torch(data, path):
    torch.save(data, path)


def write_in_the_old_format(data, path):
    torch.save(data, path, _use_new_zipfile_serialization=False)


def write_a_plain_pickle(data, path):
    path.write_bytes(pickle.dumps(data))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's note on a plain pickle
@pytest.mark.parametrize("write", [write_with_torch, write_in_the_old_format, write_a_plain_pickle])
def test_read_state_dict_malicious_file_is_refused_and_not_run(tmp_path, write):
    path, victim = tmp_path / "sam.pth", tmp_path / "victim"
    write({"weight": torch.zeros(2), "more": Malicious(victim)}, path)
    with pytest.raises(ConversionError) as caught:
        read_state_dict(path)
    assert not victim.exists()
    message = str(caught.value)
    assert str(path) in message
    assert "save its state dict alone" in message
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert victim.exists() or write is write_a_plain_pickle  # the file does run code when unpickled


@pytest.mark.parametrize("kept", [0, 1, 10, 0.5, 0.9, -1])
def test_read_state_dict_truncated_file_is_named(tmp_path, sam_file, kept):
    whole = sam_file.read_bytes()
    end = int(kept * len(whole)) if isinstance(kept, float) else kept
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[:end])
    with pytest.raises(ConversionError, match=r"cut\.pth"):
        read_state_dict(path)


OTHER_KINDS = {
    "web page": b"<html>404</html>",
    "image": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("content", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_read_state_dict_other_file_is_named(tmp_path, content):
    path = tmp_path / "sam.pth"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"sam\.pth"):
        read_state_dict(path)


@pytest.mark.parametrize("content", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_read_state_dict_other_file_is_not_pytorch(tmp_path, content):
    path = tmp_path / "sam.pth"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="is not a PyTorch file") as caught:
        read_state_dict(path)
    assert "weights_only" not in str(caught.value)


def test_read_state_dict_missing_file_or_directory_is_named(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(ConversionError, match=f"there is no file {path}"):
            read_state_dict(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.zeros(1)], "contains a list, not a dictionary of tensors"),
        ({}, "contains a dict, not a dictionary of tensors"),
        (torch.zeros(1), "contains a Tensor, not a dictionary of tensors"),
        ({"model": {"state_dict": {"deep": {"w": torch.zeros(1)}}}}, "contains a dict, not a"),
    ],
)
def test_read_state_dict_other_content_is_refused(tmp_path, data, message):
    path = tmp_path / "weights.pth"
    torch.save(data, path)
    with pytest.raises(ConversionError, match=message):
        read_state_dict(path)


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


OPTIMIZER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
    "param_groups": [{"lr": 1e-4, "params": [0]}],
}
WRAPPED = {
    "an entry": lambda tensors: {"model": tensors},
    "two entries": lambda tensors: {"checkpoint": {"state_dict": tensors}},
    "an optimizer": lambda tensors: {"model": tensors, "optimizer": OPTIMIZER, "epoch": 3},
    "a flat optimizer": lambda tensors: {"m": tensors, "opt": {"exp_avg": torch.zeros(2)}},
    "a scalar tensor": lambda tensors: {"model": tensors, "ema_decay": torch.tensor(0.999)},
    "data parallelism": lambda tensors: prefixed("module.", tensors),
    "Lightning": lambda tensors: {"state_dict": prefixed("model.", tensors), "loops": {}},
    "a compiled model": lambda tensors: prefixed("module._orig_mod.", tensors),
    "a compiled part": lambda tensors: {
        name.replace("mask_decoder.", "mask_decoder._orig_mod."): tensor
        for name, tensor in tensors.items()
    },
    "parameters": lambda tensors: {n: torch.nn.Parameter(t) for n, t in tensors.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_read_sam_wrapped_state_dict_is_read(tmp_path, sam_tensors, sam_config, wrap):
    path = tmp_path / "sam.pth"
    torch.save(wrap(sam_tensors), path)
    config, tensors = read_sam(path)
    assert config == sam_config
    assert_same(tensors, sam_tensors)


def test_read_sam_safetensors_file_is_read(tmp_path, sam_tensors, sam_config):
    path = tmp_path / "sam.safetensors"
    save_file(prefixed("module.", sam_tensors), path)
    config, tensors = read_sam(path)
    assert config == sam_config
    assert_same(tensors, dict(sorted(sam_tensors.items())))


def test_read_state_dict_encoder_alone_keeps_its_names(tmp_path):
    weight = {"image_encoder.blocks.0.norm1.weight": torch.ones(2)}
    path = tmp_path / "encoder.pth"
    torch.save(prefixed("module.", weight), path)
    assert_same(read_state_dict(path), weight)


class Settings(argparse.Namespace):
    """What training scripts store beside the weights."""


UNCLEAR = {
    "two models": lambda tensors: {"ema": tensors, "model": tensors},
    "tensors and others": lambda tensors: {**tensors, "epoch": 3},
    "a larger model": lambda tensors: {
        "state_dict": {**prefixed("model.sam.", tensors), "model.lm.weight": torch.zeros(2)}
    },
    "code": lambda tensors: {"model": tensors, "args": Settings(lr=1e-4)},
}


@pytest.mark.parametrize("wrap", UNCLEAR.values(), ids=UNCLEAR)
def test_read_sam_unclear_file_is_refused_with_the_line_that_fixes_it(tmp_path, sam_tensors, wrap):
    path = tmp_path / "it's a file.pth"
    torch.save(wrap(sam_tensors), path)
    with pytest.raises(ConversionError) as caught:
        read_sam(path)
    line = str(caught.value).split("`")[1]
    exec(line, {})
    assert_same(read_sam(tmp_path / "it's a file-weights.pth")[1], sam_tensors)


def test_read_state_dict_name_with_and_without_wrapper_is_refused(tmp_path):
    path = tmp_path / "twice.pth"
    torch.save({"module.a.w": torch.zeros(1), "a.w": torch.ones(1)}, path)
    with pytest.raises(ConversionError, match=r"twice\.pth contains tensors twice"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.tensor([1.0, float("nan"), 2.0]),
            r"not finite \(NaN or inf\): 1 of the 3 of b\.w\.",
        ),
        (torch.tensor([float("inf"), -float("inf")]), r"not finite .*: 2 of the 2 of b\.w\."),
        (torch.tensor([1, 2]), r"b\.w as torch\.int64; accepted: dense floating-point"),
        (torch.eye(2).to_sparse(), r"b\.w as torch\.sparse_coo; accepted: dense floating-point"),
        (torch.zeros(2, device="meta"), r"b\.w as an empty tensor; accepted: dense"),
        (
            torch.zeros(2, dtype=torch.float8_e4m3fn),
            r"b\.w as torch\.float8_e4m3fn; accepted: dense",
        ),
        (torch.zeros(2, dtype=torch.complex64), r"b\.w as torch\.complex64; accepted: dense"),
    ],
)
def test_read_state_dict_unusable_values_are_named(tmp_path, tensor, message):
    path = tmp_path / "sam.pth"
    torch.save({"a.w": torch.zeros(2), "b.w": tensor}, path)
    with pytest.raises(ConversionError, match=r"sam\.pth has .*" + message):
        read_state_dict(path)


def test_read_state_dict_flipped_weights_are_named(tmp_path, sam_file):
    data = bytearray(sam_file.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "sam.pth"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=r"sam\.pth is damaged: the checksum of .* differs"):
        read_state_dict(path)


def test_read_state_dict_without_checksums_is_read(tmp_path, sam_tensors):
    path = tmp_path / "sam.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(sam_tensors, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_state_dict(path), sam_tensors)


def test_read_sam_other_model_is_refused(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save({"layer1.weight": torch.zeros(3, 3), "fc.bias": torch.zeros(3)}, path)
    with pytest.raises(ConversionError, match=r"not a SAM checkpoint .* fc.bias, layer1.weight"):
        read_sam(path)


@pytest.mark.parametrize(
    "name",
    [
        "image_encoder.pos_embed",
        "image_encoder.blocks.0.mlp.lin1.weight",
        "image_encoder.neck.0.weight",
        "prompt_encoder.mask_downscaling.3.weight",
        "mask_decoder.mask_tokens.weight",
    ],
)
def test_read_sam_missing_part_is_refused(tmp_path, sam_tensors, name):
    path = tmp_path / "sam.pth"
    torch.save({n: t for n, t in sam_tensors.items() if n != name}, path)
    with pytest.raises(ConversionError, match="not a SAM checkpoint"):
        read_sam(path)


def shard(directory, num_ranks, rank):
    """Path of FSDP's file of one rank."""
    return directory / f"model_world_size_{num_ranks}_rank_{rank}.pt"  # codespell:ignore world


@contextlib.contextmanager
def rank_of(num_ranks, rank):
    """Be one rank of a process group that never communicates."""
    sizes = {"rank": rank, "world_size": num_ranks}  # codespell:ignore world
    dist.init_process_group("fake", store=FakeStore(), **sizes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def write_shards(directory, tensors, num_ranks, mesh_shape=None, placements=None):
    """Write FSDP's file of each rank: DTensors with the rank's shard."""
    mesh_shape = mesh_shape or (num_ranks,)
    placements = placements or (*[Replicate()] * (len(mesh_shape) - 1), Shard(0))
    for rank in range(num_ranks):
        with rank_of(num_ranks, rank):
            mesh = init_device_mesh("cpu", mesh_shape)
            state = {}
            for name, tensor in tensors.items():
                local = tensor
                for dimension, split in enumerate(placements):
                    if split.is_shard():
                        count = mesh_shape[dimension]
                        parts = list(local.chunk(count, split.dim))
                        parts += [parts[0].narrow(split.dim, 0, 0)] * (count - len(parts))
                        local = parts[mesh.get_coordinate()[dimension]]
                state[name] = DTensor.from_local(
                    local.clone(memory_format=torch.contiguous_format),
                    mesh,
                    placements,
                    run_check=False,
                    shape=tensor.shape,
                    stride=tensor.stride(),
                )
            torch.save(state, shard(directory, num_ranks, rank))


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "even": torch.randn(8, 3, generator=generator),
        "uneven": torch.randn(7, 3, generator=generator),
        "fewer_rows_than_ranks": torch.randn(2, 5, generator=generator),
        "bias": torch.randn(4, generator=generator).bfloat16(),
    }


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert type(found[name]) is torch.Tensor
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_merge_shards_returns_whole_weights(tmp_path, weights, num_ranks):
    write_shards(tmp_path, weights, num_ranks)
    paths = find_shards(tmp_path)
    assert paths == [shard(tmp_path, num_ranks, rank) for rank in range(num_ranks)]
    assert_same(merge_shards(paths), weights)


def test_merge_shards_second_dimension_is_merged(tmp_path, weights):
    matrices = {name: t for name, t in weights.items() if t.ndim == 2}
    write_shards(tmp_path, matrices, 2, placements=(Shard(1),))
    assert_same(merge_shards(find_shards(tmp_path)), matrices)


def test_merge_shards_replicas_are_merged_once(tmp_path, weights):
    write_shards(tmp_path, weights, 4, mesh_shape=(2, 2))  # HSDP: two replicas of two shards
    assert_same(merge_shards(find_shards(tmp_path)), weights)


def test_merge_shards_plain_tensors_come_from_first_rank(tmp_path, weights):
    for rank in range(2):
        torch.save(weights, shard(tmp_path, 2, rank))
    assert_same(merge_shards(find_shards(tmp_path)), weights)
    replicated = tmp_path / "replicated"
    replicated.mkdir()
    write_shards(replicated, weights, 2, placements=(Replicate(),))
    assert_same(merge_shards(find_shards(replicated)), weights)


def test_find_shards_orders_ranks_by_number(tmp_path):
    whole = {"weight": torch.arange(24.0).reshape(12, 2)}
    write_shards(tmp_path, whole, 12)  # rank_10 sorts before rank_2 as text
    assert_same(merge_shards(find_shards(tmp_path)), whole)


def test_merge_shards_tensor_parallel_is_refused(tmp_path, weights):
    matrices = {"even": weights["even"]}
    write_shards(tmp_path, matrices, 4, mesh_shape=(2, 2), placements=(Shard(0), Shard(1)))
    with pytest.raises(
        ConversionError, match=r"even is sharded as .*; supported: sharded over the"
    ):
        merge_shards(find_shards(tmp_path))


def test_find_shards_missing_rank_is_named(tmp_path, weights):
    write_shards(tmp_path, weights, 4)
    (shard(tmp_path, 4, 1)).unlink()
    (shard(tmp_path, 4, 3)).unlink()
    with pytest.raises(ConversionError, match=rf"lacks {shard(Path(), 4, 1)} \(2 of 4"):
        find_shards(tmp_path)


def test_find_shards_two_numbers_of_ranks_are_refused(tmp_path, weights):
    write_shards(tmp_path, weights, 2)
    write_shards(tmp_path, weights, 3)
    with pytest.raises(ConversionError, match=r"shards of \[2, 3\] ranks: keep one set"):
        find_shards(tmp_path)


def test_find_shards_without_files_returns_none(tmp_path):
    path = shard(tmp_path, 2, 0)
    path.with_name(path.name.replace("model", "optim")).touch()
    path.with_name(f"{path.name}.tmp").touch()
    assert find_shards(tmp_path) == []


def test_merge_shards_rank_with_other_tensors_is_named(tmp_path, weights):
    write_shards(tmp_path, weights, 2)
    torch.save({"even": torch.zeros(4, 3)}, shard(tmp_path, 2, 1))
    with pytest.raises(ConversionError, match=r"rank_1\.pt has other tensors than .*rank_0\.pt"):
        merge_shards(find_shards(tmp_path))


def test_merge_shards_short_part_is_refused(tmp_path, weights):
    write_shards(tmp_path, {"even": weights["even"]}, 2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_shards(elsewhere, {"even": weights["even"][:4]}, 2)
    (shard(elsewhere, 2, 1)).replace(shard(tmp_path, 2, 1))
    with pytest.raises(
        ConversionError, match=r"even has shape \(6, 3\) after merging, not \(8, 3\)"
    ):
        merge_shards(find_shards(tmp_path))


@pytest.mark.parametrize("values", [([1], [1]), (3, 3)])
def test_merge_shards_without_tensor_is_refused(tmp_path, values):
    for rank, value in enumerate(values):
        torch.save({"weight": value}, shard(tmp_path, 2, rank))
    with pytest.raises(ConversionError, match=r"weight is a (list|int), which cannot be merged"):
        merge_shards(find_shards(tmp_path))


def test_merge_shards_other_content_is_refused(tmp_path, weights):
    torch.save(weights, shard(tmp_path, 2, 0))
    torch.save([1], shard(tmp_path, 2, 1))
    with pytest.raises(ConversionError, match=r"rank_1\.pt contains a list, not a state dict"):
        merge_shards(find_shards(tmp_path))


def test_merge_shards_malicious_file_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    for rank in range(2):
        torch.save({"w": Malicious(victim)}, shard(tmp_path, 2, rank))
    with pytest.raises(ConversionError, match=r"rank_0\.pt contains more than weights"):
        merge_shards(find_shards(tmp_path))
    assert not victim.exists()


FSDP_SCRIPT = """
    import sys
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, directory, shard = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", f"file://{directory}/store", None, 2, rank)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
    if rank == 0:
        torch.save(model.state_dict(), f"{directory}/whole.pt")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    torch.save(model.state_dict(), shard)
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_merge_shards_of_two_fsdp_processes_returns_weights(tmp_path):
    script = textwrap.dedent(FSDP_SCRIPT)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path), str(shard(tmp_path, 2, rank))]
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert_same(merge_shards(find_shards(tmp_path)), whole)
