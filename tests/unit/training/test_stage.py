"""Metrics of an objective in several processes."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from coprs_deploy.training.losses import Mean
from coprs_deploy.training.stage import StageOutput, mean_metrics


class Doubles(nn.Module):
    """Measure the double of each index; counts its calls."""

    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def forward(self, batch):
        self.num_calls += 1
        return StageOutput({}, {"double": Mean.of(2 * batch)})


@pytest.mark.parametrize("num_examples", [1, 4, 9, 16])
def test_mean_metrics_of_any_number_of_examples_takes_as_many_calls_in_each_process(num_examples):
    """Sharded weights are gathered in every call, and metrics are added in one of all processes."""
    objectives, reduced = [Doubles() for _ in range(4)], []
    for rank, objective in enumerate(objectives):
        accelerator = SimpleNamespace(
            process_index=rank,
            num_processes=len(objectives),
            device="cpu",
            autocast=nullcontext,
            reduce=lambda parts, how: reduced.append(parts) or parts,
        )
        mean_metrics(
            accelerator,
            objective,
            lambda indices: torch.tensor(indices, dtype=torch.float32),
            num_examples,
            batch_size=2,
        )
    assert len({objective.num_calls for objective in objectives}) == 1
    total, weight = torch.stack(reduced).sum(0)[0].tolist()
    assert (total, weight) == (sum(2 * n for n in range(num_examples)), num_examples)
