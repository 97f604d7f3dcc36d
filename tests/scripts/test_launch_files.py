"""The launch files: accelerate reads them, their layers exist, their shell syntax is valid."""

import re
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from coprs_deploy.training.recipe import load_recipe
from tests import ROOT

LAUNCH = ROOT / "training" / "launch"
SHELL_FILES = ["one_node.sh", "rollout_server.sh", "slurm.sbatch"]


@pytest.mark.parametrize(("name", "machines", "processes"), [("1x8", 1, 8), ("2x8", 2, 16)])
def test_accelerate_config_is_fsdp2_with_existing_layers(name, machines, processes):
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


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shell_file_has_valid_syntax(name):
    checked = subprocess.run(["bash", "-n", str(LAUNCH / name)], check=False)
    assert checked.returncode == 0


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shell_file_names_recipes_and_settings_that_exist(name):
    text = (LAUNCH / name).read_text()
    settings = re.findall(r"--set (stages[\w.]+=[\w./]+)", text)
    recipes = re.findall(r"\b(grpo_\w+) ", text)
    for recipe in recipes:
        assert load_recipe(recipe, settings).stages
    assert recipes or not settings
