"""What a CPU can prove about many processes: the same losses, the same gradients, whose weights."""

import json
import subprocess
import sys
import types
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForImageTextToText

from coprs_deploy.errors import ArtifactError
from coprs_deploy.training.grpo.arguments import rows_of_a_pass
from coprs_deploy.training.grpo.attachment import ATTRIBUTE
from coprs_deploy.training.grpo.distribution import (
    keep_segmentation_out,
    load_moving_weights,
    moving_weights,
    require_sharding_settings,
    save_moving_weights,
)
from coprs_deploy.training.settings import PAPER_OPTIMIZER, GrpoSettings, Lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

WORKER = Path(__file__).parent / "worker.py"

SAME_BATCH_TOLERANCE = 1e-4
"""Relative difference of figures when one batch is summed in another order, over three steps."""

CANCELLED = 1e-5
"""Absolute difference where advantages of about 1 cancel: the policy's loss at the first step."""

SHARDED_TOLERANCE = 1e-4
"""Relative difference of whole gradients, float32."""


def work(task, out, processes):
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), task, str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_processes_have_the_figures_of_one(tmp_path):
    one, two = (work(str(n), tmp_path / f"{n}.json", n) for n in (1, 2))
    assert len(one["lines"]) == len(two["lines"]) == 3
    for ours, theirs in zip(one["lines"], two["lines"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            wanted = pytest.approx(value, rel=SAME_BATCH_TOLERANCE, abs=CANCELLED)
            assert theirs[name] == wanted, name
    assert one["lines"][-1]["kl"] > 1e-3, "nothing was learned, so nothing is compared"
    for name, value in one["sums"].items():
        assert two["sums"][name] == pytest.approx(value, abs=1e-2), name


@pytest.mark.slow
def test_the_sharded_gradient_is_the_whole_one(tmp_path):
    """Accelerate's own FSDP2 wrapping on two ranks; the segmentation head is whole on both."""
    found = work("shard", tmp_path / "shard.json", 2)
    assert found["distance"] < SHARDED_TOLERANCE
    assert all(name.startswith(f"{ATTRIBUTE}.") for name in found["plain"])
    assert found["plain"]
    assert not any(name.startswith(f"{ATTRIBUTE}.") for name in found["sharded"])
    assert any("language_model.layers.0" in name for name in found["sharded"])


def engine_of(model):
    """TRL's own way of handing weights over, with an engine that only writes names down."""
    from accelerate import Accelerator
    from trl.distributed import DistributedBackend
    from trl.generation.vllm_generation import VLLMGeneration

    engine = VLLMGeneration.__new__(VLLMGeneration)
    accelerator = Accelerator(cpu=True)
    taken = {}
    loading = types.SimpleNamespace(
        load_weights=lambda pairs: taken.update({n: t.clone() for n, t in pairs})
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
    return engine, taken


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rollout_engine_gets_the_policy_and_nothing_else(make_bench, rank):
    bench = make_bench(lora=Lora(rank=rank))
    engine, taken = engine_of(bench.trainer.model)
    engine.sync_weights()
    assert any(name.startswith(f"{ATTRIBUTE}.") for name in taken), "the filter has nothing to do"
    taken.clear()
    keep_segmentation_out(engine)
    engine.sync_weights()
    assert not any(ATTRIBUTE in name or "lora" in name for name in taken)
    plain = AutoModelForImageTextToText.from_pretrained(
        bench.workbench.policy.model.config.name_or_path, dtype=torch.float32
    )
    wanted = dict(plain.named_parameters())
    assert taken.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(taken[name], weight), name


def test_states_are_read_back_strictly(make_bench, tmp_path):
    model = make_bench().trainer.model
    state = tmp_path / "state"
    save_moving_weights(state, model)
    name, weight = next(iter(moving_weights(model).items()))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    load_moving_weights(state, model)
    assert torch.equal(weight, kept)
    weight.requires_grad_(False)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        load_moving_weights(state, model)


def test_what_sharding_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"lora\.rank is set"):
        require_sharding_settings(GrpoSettings(steps=1, lora=Lora(rank=4)))
    unclipped = msgspec.structs.replace(PAPER_OPTIMIZER, clip=0.0)
    with pytest.raises(ValueError, match=r"optimizer\.clip is 0"):
        require_sharding_settings(GrpoSettings(steps=1, optimizer=unclipped))
    require_sharding_settings(GrpoSettings(steps=1))


def test_a_step_is_divided_evenly_or_refused():
    paper = GrpoSettings(steps=1, global_batch_size=16, per_device_train_batch_size=2)
    assert rows_of_a_pass(paper, 8) == (2, 8)
    assert rows_of_a_pass(GrpoSettings(steps=1, global_batch_size=16), 8) == (16, 1)
    with pytest.raises(ValueError, match="6 processes cannot share"):
        rows_of_a_pass(paper, 6)
    with pytest.raises(ValueError, match="must divide the 16 responses"):
        rows_of_a_pass(
            GrpoSettings(steps=1, global_batch_size=16, per_device_train_batch_size=3), 8
        )
