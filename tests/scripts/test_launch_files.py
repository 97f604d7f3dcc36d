"""The launch files: read by accelerate itself, their layers exist, their shell is valid."""

import re
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from coprs_deploy.training.recipe import load_recipe
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


def test_the_page_names_recipes_and_settings_that_exist():
    page = (ROOT / "docs" / "training.md").read_text()
    recipe = load_recipe("grpo_qwen2_5_vl_7b")
    for name in set(re.findall(r"`(grpo_\w+?)`", page)):
        load_recipe(name)
    for setting in re.findall(r"--set ([a-z][\w.]+=[\w./]+)", page):
        load_recipe("grpo_qwen2_5_vl_7b", [setting])
    fields = type(recipe.phases["grpo"]).__struct_fields__
    table = page.partition("| setting of")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    named = {field for row in rows for field in re.findall(r"`(\w+)(?: = \{[^`]*)?`", row)}
    assert {"mode", "num_generations", "rollout", "lora", "reward"} <= named <= set(fields)
