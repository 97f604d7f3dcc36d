"""Learning-rate schedule. Never imports torch."""

from __future__ import annotations

import math

from coprs_deploy.training.settings import Optimizer


def lr_factor(settings: Optimizer, step: int, max_steps: int) -> float:
    """Return the learning rate of a step, counted from 0, as a share of its peak."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    left = 1 - step / max_steps
    decay = min(1.0, left / settings.lr_decay_ratio) if settings.lr_decay_ratio else 1.0
    if settings.lr_decay_type == "cosine":
        decay = 0.5 - 0.5 * math.cos(math.pi * decay)
        return warmup * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * decay)
    return max(settings.min_lr_ratio, warmup * decay)
