"""Muon: momentum whose steps are orthogonalized, for matrices between hidden states.

PyTorch's own ``torch.optim.Muon`` takes one matrix after the other, always in bfloat16; on a CPU
without bf16 units that was half of a training step. This one takes all matrices of one shape in one
batched product, in float32.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale
of a step follows Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration: singular values end between 0.7 and 1.2."""

RMS_OF_ADAMW = 0.2
"""Root of the mean square that an AdamW step has in practice, for shared learning rates."""

_SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Moves matrices by orthogonalized Nesterov momentum.

    Args:
        groups: parameter groups; every parameter is a matrix.
        lr: learning rate, on AdamW's scale.
        momentum: decay of the momentum.
        weight_decay: decoupled weight decay.
        num_iterations: Newton-Schulz iterations of a step.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        num_iterations: int = 4,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for weight in group["params"]:
                assert weight.ndim == 2, f"Muon moves matrices, not shape {tuple(weight.shape)}"
        self._num_iterations = num_iterations

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                directions = torch.stack([self._direction(w, group["momentum"]) for w in weights])
                steps = orthogonalize(directions, self._num_iterations)
                scale = group["lr"] * RMS_OF_ADAMW * max(shape) ** 0.5
                for weight, step in zip(weights, steps, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step, alpha=-scale)
        return loss

    def _direction(self, weight: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        assert weight.grad is not None, "only matrices with a gradient are moved"
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)


def orthogonalize(matrices: Tensor, num_iterations: int) -> Tensor:
    """Bring all singular values near 1 by Newton-Schulz iterations.

    Args:
        matrices: (N, R, C) float.
        num_iterations: of the quintic iteration.

    Returns:
        (N, R, C) float32.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.float()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if is_tall else x
    return result
