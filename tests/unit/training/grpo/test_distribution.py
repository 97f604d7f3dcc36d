"""Several processes on a CPU: equal losses and gradients, weights of states and rollout engines."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForImageTextToText

from coprs_deploy.errors import ArtifactError
from coprs_deploy.training.grpo.attachment import ATTRIBUTE
from coprs_deploy.training.grpo.distribution import (
    check_sharding_settings,
    exclude_segmentation,
    load_trainable_weights,
    policy_weights,
    save_trainable_weights,
    trainable_weights,
)
from coprs_deploy.training.settings import PAPER_OPTIMIZER, GrpoSettings, Lora
from tests import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

WORKER = Path(__file__).parent / "worker.py"

SAME_BATCH_TOLERANCE = 1e-4
"""Relative difference of metrics if a batch is summed in another order, over three steps."""

CANCELLED = 1e-5
"""Absolute difference if advantages of about 1 cancel: the policy loss of the first step."""

SHARDED_TOLERANCE = 1e-4
"""Relative difference of whole gradients, float32."""


def run_task(task, out, processes):
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), task, str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.extended
def test_joint_trainer_in_two_processes_logs_the_metrics_of_one(tmp_path):
    one, two = (run_task(str(n), tmp_path / f"{n}.json", n) for n in (1, 2))
    assert len(one["lines"]) == len(two["lines"]) == 3
    for ours, theirs in zip(one["lines"], two["lines"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            expected = pytest.approx(value, rel=SAME_BATCH_TOLERANCE, abs=CANCELLED)
            assert theirs[name] == expected, name
    assert one["lines"][-1]["kl"] > 1e-3, "the weights did not change, so nothing is compared"
    for name, value in one["sums"].items():
        assert two["sums"][name] == pytest.approx(value, abs=1e-2), name


@pytest.mark.slow
def test_sharded_gradient_equals_the_whole_gradient(tmp_path):
    """FSDP2 wrapping by accelerate on two ranks; the segmentation head is replicated."""
    found = run_task("shard", tmp_path / "shard.json", 2)
    assert found["distance"] < SHARDED_TOLERANCE
    assert all(name.startswith(f"{ATTRIBUTE}.") for name in found["plain"])
    assert found["plain"]
    assert not any(name.startswith(f"{ATTRIBUTE}.") for name in found["sharded"])
    assert any("language_model.layers.0" in name for name in found["sharded"])


def engine_of(model):
    """Weight synchronization by TRL, with an engine that only records the weights."""
    from accelerate import Accelerator
    from trl.distributed import DistributedBackend
    from trl.generation.vllm_generation import VLLMGeneration

    engine = VLLMGeneration.__new__(VLLMGeneration)
    accelerator = Accelerator(cpu=True)
    received = {}
    loading = types.SimpleNamespace(
        load_weights=lambda pairs: received.update({n: t.clone() for n, t in pairs})
    )
    runner = types.SimpleNamespace(model=loading)
    worker = types.SimpleNamespace(model_runner=runner)
    executor = types.SimpleNamespace(driver_worker=worker)
    engine.llm = types.SimpleNamespace(
        reset_prefix_cache=lambda: None,
        llm_engine=types.SimpleNamespace(model_executor=executor),
    )
    engine.model, engine.accelerator, engine.mode = model, accelerator, "colocate"
    engine._dist, engine.enable_sleep_mode = DistributedBackend(accelerator), False
    return engine, received


@pytest.mark.parametrize("rank", [0, 4])
def test_exclude_segmentation_syncs_the_policy_weights_only(make_setup, rank):
    setup = make_setup(lora=Lora(r=rank))
    engine, received = engine_of(setup.trainer.model)
    engine.sync_weights()
    assert any(name.startswith(f"{ATTRIBUTE}.") for name in received), "nothing to exclude"
    received.clear()
    exclude_segmentation(engine)
    engine.sync_weights()
    assert not any(ATTRIBUTE in name or "lora" in name for name in received)
    plain = AutoModelForImageTextToText.from_pretrained(
        setup.state.policy.model.config.name_or_path, dtype=torch.float32
    )
    expected = dict(plain.named_parameters())
    assert received.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(received[name], weight), name


@pytest.mark.parametrize("rank", [0, 4])
def test_policy_weights_are_those_of_the_merged_policy(make_setup, rank):
    setup = make_setup(lora=Lora(r=rank))
    trainer = setup.trainer
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    kept = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    found = policy_weights(trainer)
    assert all(torch.equal(weight, kept[n]) for n, weight in trainer.model.state_dict().items())
    if rank:
        trainer.model.merge_and_unload()
    setup.attachment.detach()
    expected = setup.state.policy.model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name


def test_load_trainable_weights_requires_the_same_names(make_setup, tmp_path):
    model = make_setup().trainer.model
    state = tmp_path / "state"
    save_trainable_weights(state, model)
    name, weight = next(iter(trainable_weights(model).items()))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    load_trainable_weights(state, model)
    assert torch.equal(weight, kept)
    weight.requires_grad_(False)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        load_trainable_weights(state, model)


def test_check_sharding_settings_refuses_adapters_and_no_clipping():
    with pytest.raises(ValueError, match=r"lora\.r is 4"):
        check_sharding_settings(GrpoSettings(max_steps=1, lora=Lora(r=4)))
    unclipped = msgspec.structs.replace(PAPER_OPTIMIZER, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=r"optimizer\.max_grad_norm is 0"):
        check_sharding_settings(GrpoSettings(max_steps=1, optimizer=unclipped))
    assert check_sharding_settings(GrpoSettings(max_steps=1)) is None


def test_split_batch_refuses_batches_that_are_not_divisible():
    paper = GrpoSettings(max_steps=1, global_batch_size=16, per_device_train_batch_size=2)
    assert paper.split_batch(8) == (2, 8)
    assert GrpoSettings(max_steps=1, global_batch_size=16).split_batch(8) == (16, 1)
    with pytest.raises(ValueError, match="divisible by 6 processes; accepted: multiples of 3"):
        paper.split_batch(6)
    with pytest.raises(ValueError, match="accepted: divisors of 16"):
        GrpoSettings(max_steps=1, global_batch_size=16, per_device_train_batch_size=3).split_batch(
            8
        )
