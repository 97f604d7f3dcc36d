"""Which GRPO runs on the shipped model are compared, and with what."""

from __future__ import annotations

from coprs_deploy.specs import Record

DAMAGE = 0.44
"""Standard deviation of the noise on each matrix, as a share of the matrix's own."""

RECIPE = "grpo_shipped"

RESPONSES = 32
"""Responses of a step, whatever the size of the groups."""


class Experiment(Record, frozen=True):
    """One run.

    Attributes:
        name: of its folder.
        start: ``damaged`` or ``mature``.
        label: what is compared.
        seed: of the run.
        settings: changes of the recipe.
    """

    name: str
    start: str
    label: str
    seed: int
    settings: tuple[str, ...] = ()


def experiments() -> list[Experiment]:
    """List every run; the ones that matter most come first."""
    modes = {mode: (f"phases.grpo.mode={mode}",) for mode in ("joint", "rl", "segmentation")}
    longer = {
        f"{mode}, 50 steps": (*modes[mode], "phases.grpo.steps=50", "phases.grpo.eval_steps=25")
        for mode in ("joint", "rl")
    }
    groups = {
        f"joint, groups of {n}": (
            f"phases.grpo.num_generations={n}",
            f"phases.grpo.global_batch_size={RESPONSES // n}",
        )
        for n in (4, 2)
    }
    seeds = (0, 1)
    planned: list[tuple[str, str, int, tuple[str, ...]]] = []
    planned += [("damaged", mode, seed, change) for mode, change in modes.items() for seed in seeds]
    planned += [("mature", "joint", seed, modes["joint"]) for seed in seeds]
    planned += [
        ("damaged", size, seed, change) for size, change in groups.items() for seed in seeds
    ]
    planned += [("damaged", label, 0, change) for label, change in longer.items()]
    return [
        Experiment(f"{start}-{_folder_name(label)}-{seed}", start, label, seed, tuple(changes))
        for start, label, seed, changes in planned
    ]


def _folder_name(label: str) -> str:
    return label.replace(",", "").replace(" steps", "").replace("groups of ", "").replace(" ", "-")
