"""Training loop: a step, and its line in the log."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from coprs_deploy.training.losses import Mean
from coprs_deploy.training.optim import build_optimizers
from coprs_deploy.training.settings import Optimizer, SupervisedSettings
from coprs_deploy.training.stage import StageOutput
from coprs_deploy.training.trainer import Trainer


class Squares(nn.Module):
    """A loss of one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return StageOutput({"language": Mean.of((self.weight * batch) ** 2)}, {})


def stage_of(**optimizer):
    settings = SupervisedSettings(
        max_steps=1, optimizer=Optimizer(name="adamw", weight_decay=0.0, **optimizer)
    )
    return SimpleNamespace(
        settings=settings, objective=Squares(), loss_coefficients=lambda factor: {"language": 1.0}
    )


@pytest.fixture
def trainer():
    return Trainer(SimpleNamespace(accelerator=Accelerator(cpu=True)), None)


def test_step_without_a_largest_norm_does_not_clip_the_gradient(trainer):
    gradients = {}
    for limit in (0.0, 0.5, 1e6):
        stage = stage_of(max_grad_norm=limit)
        optimizers = build_optimizers(stage.objective, stage.settings.optimizer)
        seen = gradients[limit] = []
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(
                lambda *_, stage=stage, seen=seen: seen.append(stage.objective.weight.grad.clone())
            )
        trainer._step(stage, stage.objective, optimizers, torch.arange(3.0), 1.0)
    assert gradients[0.0][0].equal(gradients[1e6][0])
    assert gradients[0.5][0].norm().item() == pytest.approx(0.5, rel=1e-4)


def test_log_of_a_batch_without_targets_has_no_undefined_number(trainer):
    lines = []
    progress = SimpleNamespace(log=lambda step, line: lines.append(line))
    nothing = Mean(torch.tensor(0.0), torch.tensor(0.0))
    losses = {"language": Mean.of(torch.tensor([1.0, 3.0])), "mask_dice": nothing}
    stage = stage_of()
    stage.loss_coefficients = lambda factor: dict.fromkeys(losses, 1.0)
    trainer._log(stage, progress, 1, 1.0, (StageOutput(losses, {"giou": nothing}), 1.0))
    (line,) = lines
    assert line["loss"] == line["loss/language"] == 2.0
    assert not {"loss/mask_dice", "giou"} & line.keys()
