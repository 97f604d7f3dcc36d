"""Tasks of test_distribution, run by one or two processes that torchrun starts."""

import json
import sys
import types
from pathlib import Path

import msgspec
import torch
from torch import distributed

from coprs_deploy.training.grpo.attachment import ATTRIBUTE
from coprs_deploy.training.grpo.batch import GroundTruth
from coprs_deploy.training.grpo.distribution import average_gradients
from coprs_deploy.training.grpo.scores import DecodedMasks, row_losses
from coprs_deploy.training.grpo.trainer import GROUND_TRUTH_KEYS, JointTrainer
from coprs_deploy.training.settings import PAPER_OPTIMIZER
from tests.unit.training.grpo.conftest import build_setup


class Scripted(JointTrainer):
    """Trainer with fixed completions, independent of the process that a prompt falls to."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **_):
        tokenizer, group = self.parts.processor.tokenizer, self.num_generations
        responses = []
        for row, item in enumerate(self.rollout.items):
            text = item.example.response
            if row % group:
                # Another location, and text before the reasoning: with nearly equal rewards, the
                # rounding of a mask would become a share of the advantage.
                text = "is " + text.replace("row", "col", 1).replace("is at", "at", 1)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            responses.append([*ids, tokenizer.eos_token_id])
        return responses, None


def train(out, processes):
    optimizer = msgspec.structs.replace(PAPER_OPTIMIZER, learning_rate=1e-4)
    setup = build_setup(
        out.parent, trainer=Scripted, processes=processes, max_steps=3, optimizer=optimizer
    )
    setup.trainer.train()
    if setup.trainer.accelerator.is_main_process:
        lines = [
            {k: v for k, v in line.items() if isinstance(v, float) and "time" not in k}
            for line in setup.lines
        ]
        sums = {
            n: float(p.detach().double().sum())
            for n, p in setup.state.policy.model.named_parameters()
        }
        out.write_text(json.dumps({"lines": lines, "sums": sums}))


def joint_loss(model, setup, inputs, row):
    """Compute the joint loss of one row from log-probabilities and masks of one forward pass."""
    gt = GroundTruth(*(inputs[key][row : row + 1] for key in GROUND_TRUTH_KEYS))
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[row : row + 1]
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[row : row + 1]
    width = inputs["prompt_ids"].shape[1]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :width] = -100
    patches = int(inputs["image_grid_thw"][0].prod())
    output = model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=inputs["pixel_values"][row * patches : (row + 1) * patches],
        image_grid_thw=inputs["image_grid_thw"][row : row + 1],
        mm_token_type_ids=inputs["mm_token_type_ids"][row : row + 1],
        labels=labels,
        fused_lm_head=True,
        segmentation=gt.request(width),
    )
    decoded = DecodedMasks(output.prior_logits, output.mask_logits, output.is_found)
    weights = setup.trainer.parts.settings.loss_weights_at(0)
    parts = row_losses(decoded, gt, weights)
    masks = sum(getattr(weights, name) * loss for name, loss in parts.items())
    return -output.log_probs.sum() / (labels >= 0).sum() + 0.3 * masks


def shard(out):
    """Compare the gradient under accelerate's FSDP2 wrapping with that of the whole model."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.tensor import DTensor

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    setups = [build_setup(out.parent, trainer=Scripted, processes=1) for _ in range(2)]
    whole = setups[0]
    trainer = whole.trainer
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    same = [trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))]
    distributed.broadcast_object_list(same, 0)  # each process has other prompts
    inputs = same[0]
    losses = [joint_loss(trainer.model, whole, inputs, row) for row in (0, 2)]
    (sum(losses) / 2).backward()
    expected = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}

    model = setups[1].trainer.model.train()
    head = getattr(model, ATTRIBUTE)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"],
        cpu_ram_efficient_loading=False,
        ignored_modules=[head],
    )
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=rank == 0,
        torch_device_mesh=None,
    )
    model = fsdp2_prepare_model(accelerator, model)
    sharded = [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
    plain = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
    joint_loss(model, setups[1], inputs, 2 * rank).backward()
    average_gradients(head)
    squares = total = 0.0
    for name, weight in model.named_parameters():
        if weight.grad is None:
            continue
        grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
        reference = expected.get(name, torch.zeros_like(grad))
        squares += float((grad - reference).pow(2).sum())
        total += float(reference.pow(2).sum())
    found = {
        "distance": (squares / total) ** 0.5,
        "sharded": sharded,
        "plain": plain,
    }
    if rank == 0:
        out.write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, target = sys.argv[1], Path(sys.argv[2])
    if task == "shard":
        shard(target)
    else:
        train(target, int(task))
