"""The launch files: read by accelerate itself, their layers exist, their shell is valid."""

import re
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from tests import ROOT

LAUNCH = ROOT / "examples" / "launch"


@pytest.mark.parametrize(("name", "machines", "processes"), [("1x8", 1, 8), ("2x8", 2, 16)])
def test_accelerate_reads_its_files(name, machines, processes):
    file = LAUNCH / f"fsdp2_{name}.yaml"
    config = load_config_from_file(str(file))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.distributed_type == "FSDP"
    assert config.mixed_precision == "bf16"
    settings = config.fsdp_config
    assert settings["fsdp_version"] == 2
    assert settings["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
    wrapped = settings["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert all(hasattr(modeling_qwen2_5_vl, layer) for layer in wrapped)
    (other,) = re.findall(r"# LLaVA-1.5: (\S+)", file.read_text())
    decoder, encoder = other.split(",")
    assert hasattr(modeling_llama, decoder)
    assert hasattr(modeling_clip, encoder)


@pytest.mark.parametrize("name", ["one_node.sh", "rollout_server.sh", "slurm.sbatch"])
def test_the_shell_is_valid(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
