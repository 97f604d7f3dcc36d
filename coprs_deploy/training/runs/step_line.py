"""One line on stderr for a logged step or an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from coprs_deploy.console import format_bytes

PARTS_SHOWN = 4
"""Rewards or losses that are shown beside their sum."""


def step_text(line: Mapping[str, float]) -> str:
    """Return the metrics of a step, shortest names first seen in TRL's log."""
    texts = []
    if "reward" in line:
        texts.append(f"reward {line['reward']:.3f}{_rewards(line)}")
        texts.append(f"loss {line['loss']:.4f}")
    else:
        texts.append(f"loss {line['loss']:.4f}{_losses(line)}")
    if line.get("kl") is not None:
        texts.append(f"kl {line['kl']:.2g}")
    if "completions/mean_length" in line:
        cut = line.get("completions/clipped_ratio", 0.0)
        texts.append(f"length {line['completions/mean_length']:.0f}, cut off {cut:.0%}")
    if line.get("grad_norm") is not None:
        texts.append(f"grad_norm {line['grad_norm']:.2g}")
    rate = line.get("learning_rate/policy", line.get("learning_rate"))
    if rate is not None:
        texts.append(f"lr {rate:.1e}")
    return "  ".join(texts)


def evaluation_text(metrics: Mapping[str, float]) -> str:
    """Return the metrics of an evaluation, without those of single question types."""
    shown = (
        f"{name} {value:.3f}"
        for name, value in metrics.items()
        if "." not in name and not name.endswith("_stderr")
    )
    return f"eval: {'  '.join(shown)}"


def progress_text(seconds: float, steps: int, steps_left: int, memory_bytes: int) -> str:
    """Return peak memory, seconds per step and the time that is left."""
    each = seconds / max(1, steps)
    left = f"{duration(each * steps_left)} left" if steps_left else "done"
    return f"{format_bytes(memory_bytes)}  {each:.2g} s/step  {left}"


def duration(seconds: float) -> str:
    """Format a duration with two units: ``3 d 4 h``, ``2 h 05 min``, ``1 min 07 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _rewards(line: Mapping[str, float]) -> str:
    start, end = "rewards/", "/mean"
    parts = [
        f"{key.removeprefix(start).removesuffix(end)} {value:.2f}"
        for key, value in line.items()
        if key.startswith(start) and key.endswith(end)
    ]
    return f" ({', '.join(parts[:PARTS_SHOWN])})" if parts else ""


def _losses(line: Mapping[str, float]) -> str:
    parts = [
        f"{key.removeprefix('loss/')} {value:.3f}"
        for key, value in line.items()
        if key.startswith("loss/") and "." not in key
    ]
    return f" ({', '.join(parts[:PARTS_SHOWN])})" if len(parts) > 1 else ""
