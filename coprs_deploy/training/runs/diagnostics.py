"""Warnings about a training that will not get where it should, from the lines of its log."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from coprs_deploy.training.settings import GrpoSettings, StageSettings

WINDOW = 5
"""Log lines that a mean is taken over."""

LEAST_LINES = 3
"""Log lines from which a mean is taken at all: a single step says little."""

MAX_CLIPPED_RATIO = 0.5
"""Share of completions that were cut off."""

MAX_ZERO_STD = 0.5
"""Share of groups whose rewards are all equal."""

MAX_KL_COST = 0.1
"""``beta * kl``, in units of the largest reward, 1: above it the divergence outweighs what a
typical update gains."""


class Check(NamedTuple):
    """A metric whose mean should not exceed a limit, and what to say about it."""

    key: str
    limit: float
    text: str


class Diagnostics:
    """Check the lines of a stage one after the other; a condition is named when it begins."""

    def __init__(self, name: str, settings: StageSettings) -> None:
        self._checks = _checks(name, settings) if isinstance(settings, GrpoSettings) else []
        self._values = {check.key: deque[float](maxlen=WINDOW) for check in self._checks}
        self._active = set[str]()

    def add(self, line: Mapping[str, Any]) -> list[str]:
        """Add the metrics of a step; return the warnings that begin with it."""
        found = {}
        for key in ("loss", "grad_norm"):
            if not math.isfinite(line.get(key) or 0.0):
                found[key] = (
                    f"{key} is {line[key]}; the training has diverged: stop it, and start again "
                    "with a smaller learning_rate"
                )
        for check in self._checks:
            values = self._values[check.key]
            if (value := line.get(check.key)) is not None:
                values.append(value)
            mean = sum(values) / max(1, len(values))
            if len(values) >= LEAST_LINES and mean > check.limit:
                found[check.key] = check.text.format(mean=mean, count=len(values))
        begun = [text for key, text in found.items() if key not in self._active]
        self._active = set(found)
        return begun


def warnings_of(
    name: str, settings: StageSettings, lines: Iterable[Mapping[str, Any]]
) -> list[str]:
    """Return the warnings of a stage, each with its step, from the lines of its log."""
    diagnostics = Diagnostics(name, settings)
    return [
        f"Step {line['step']}: {text}."
        for line in lines
        if line["stage"] == name and "loss" in line
        for text in diagnostics.add(line)
    ]


def _checks(name: str, settings: GrpoSettings) -> list[Check]:
    stage = f"stages.{name}"
    checks = [
        Check(
            "completions/clipped_ratio",
            MAX_CLIPPED_RATIO,
            "{mean:.0%} of the completions in the last {count} lines were cut off before their "
            f"end; raise {stage}.max_completion_length, or teach shorter responses by a "
            "supervised start",
        ),
        Check(
            "frac_reward_zero_std",
            MAX_ZERO_STD,
            "in {mean:.0%} of the groups of the last {count} lines all completions got the same "
            f"reward, so they teach nothing; raise {stage}.temperature or num_generations, or "
            "train on examples that are neither solved nor hopeless",
        ),
    ]
    if settings.beta:
        text = (
            "the KL divergence is {mean:.3g} in the last {count} lines; "
            f"times beta ({settings.beta:g}) that is above {MAX_KL_COST} of the largest reward: "
            f"the policy leaves its reference; lower {stage}.optimizer.learning_rate, or raise beta"
        )
        checks.append(Check("kl", MAX_KL_COST / settings.beta, text))
    return checks
