"""What may change when a run resumes, and the text of what did.

Three kinds of settings: *free* ones change no result (``FREE_KEYS``); *fixed* ones decide which
weights a state holds, so that it could not be loaded; all others change the training, and are
accepted when they are named with ``--allow-change``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from coprs_deploy.data.examples import REPORTED
from coprs_deploy.training.lr_schedule import lr_factor
from coprs_deploy.training.recipe import RunSettings, changed_keys, leaf_keys, nearest_name
from coprs_deploy.training.settings import GrpoSettings, StageSettings

Change: TypeAlias = tuple[object, object]
"""Value before and now."""

Rows: TypeAlias = Sequence[tuple[str, str]]
"""Id and hash of each example."""

FREE_KEYS = (
    *("description", "logging_steps", "save_steps", "save_dtype"),
    *("save_total_limit", "report_to"),
    *("num_threads", "num_workers", "model.gradient_checkpointing", "model.policy", "model.sam"),
    # Compared by content: see RunDirectory.check_inputs.
    *("model.path", "model.init_from", "data.training", "data.held_out", "data.features"),
    *("teacher", "images", "examples", "held_out", "features"),
)
"""Settings that change no result."""

FREE_STAGE_KEYS = (
    *("max_steps", "eval_steps", "num_eval_examples", "thresholds", "num_completions_to_print"),
    *("best_metric", "per_device_train_batch_size", "allow_missing_responses"),
    *("vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"),
    *("vllm_server_host", "vllm_server_port"),
)
"""Settings of a stage that change no result, but ``max_steps``: see :func:`schedule_notes`."""

_FIXED = re.compile(
    r"model\.(kind|freeze_vision_tower|segmentation\..*|policy\..*|image_encoder(\..*)?)"
    r"|stages\.[^.]+\.(kind|mode|lora\.r|train_image_encoder|init_query_head"
    r"|optimizer\.(name|lr_multipliers(\..*)?))"
)
"""Settings that decide which weights a state holds."""

SETTINGS_SHOWN = 5
"""Number of changed settings that an error shows with their values."""


class SettingChanges(NamedTuple):
    """Changed settings by key: those that are accepted, and those that are not."""

    accepted: dict[str, Change]
    refused: dict[str, Change]
    fixed: dict[str, Change]


def sort_changes(
    before: Mapping[str, Any], recipe: RunSettings, allowed: Sequence[str]
) -> SettingChanges:
    """Compare the recipe of a run with the one to resume it with.

    Args:
        before: the recipe of the run, as ``to_json`` gives it.
        recipe: the recipe to resume with.
        allowed: keys that may change, each with all that are below it.

    Raises:
        ValueError: an allowed key is in neither recipe.
    """
    now = recipe.to_json()
    known = {key for data in (before, now) for key in leaf_keys(data)}
    for key in allowed:
        if not any(_covers(key, each) for each in known):
            raise ValueError(
                f"--allow-change is {key!r}, which is no key of this recipe"
                f"{nearest_name(key, sorted(known))}"
            )
    samples = any(isinstance(each, GrpoSettings) for each in recipe.all_stages().values())
    found = SettingChanges({}, {}, {})
    for key, change in changed_keys(before, now).items():
        if _is_fixed(key, change):
            found.fixed[key] = change
        elif (
            _is_free(key)
            or (key == "num_processes" and not samples)  # batches and seeds stay equal
            or any(_covers(each, key) for each in allowed)
        ):
            found.accepted[key] = change
        else:
            found.refused[key] = change
    return found


def is_allowed(key: str, allowed: Sequence[str]) -> bool:
    """Return whether a key may change."""
    return any(_covers(each, key) for each in allowed)


def describe_changes(changes: SettingChanges) -> str:
    """Name the changes that are not accepted, and what can be done."""
    refused = changes.fixed | changes.refused
    shown = [f"{key} (was: {old}; now: {new})" for key, (old, new) in refused.items()]
    hidden = len(shown) - SETTINGS_SHOWN
    names = ", ".join(shown[:SETTINGS_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
    another = "choose another directory with --out, or remove this one"
    if hidden > 0:
        return f"{names}; {another}"
    keep = ""
    if all(value is not None for values in refused.values() for value in values):
        texts = (
            f"{key}={old if isinstance(old, str) else json.dumps(old)}"
            for key, (old, _) in refused.items()
        )
        keep = "to resume it, add " + " ".join(f"--set {shlex.quote(text)}" for text in texts)
        keep += "; "
    if changes.fixed:
        reason = f"a state holds other weights with another {next(iter(changes.fixed))}"
        return f"{names}; {keep}{reason}: to start another run, {another}"
    allow = " ".join(f"--allow-change {key}" for key in changes.refused)
    return (
        f"{names}; {keep}to train on with the new values, which the log records, add {allow}; to "
        f"start another run, {another}"
    )


def describe_rows(before: Rows, now: Rows) -> str:
    """Count and name the examples that were removed, added and changed."""
    old, new = _by_id(before), _by_id(now)
    groups = {
        "removed": [key for key in old if key not in new],
        "added": [key for key in new if key not in old],
        "changed": [key for key in old if key in new and old[key] != new[key]],
    }
    parts = []
    for what, keys in groups.items():
        if keys:
            names = ", ".join(name for name, _ in keys[:REPORTED])
            more = ", ..." if len(keys) > REPORTED else ""
            parts.append(f"{len(keys):,} row{'s' * (len(keys) > 1)} {what} ({names}{more})")
    return ", ".join(parts) or f"the same {len(now):,} rows in another order"


def describe_content(
    key: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    known_rows: Mapping[str, Rows],
    rows: Mapping[str, Rows],
) -> str:
    """Say how the content of an input differs from the recorded one."""
    if key in known_rows and key in rows:
        return describe_rows([(name, digest) for name, digest in known_rows[key]], rows[key])
    return f"was {before.get(key)}, now {now.get(key)}"


def schedule_notes(
    before: Mapping[str, Any], recipe: RunSettings, position: tuple[str, int] | None
) -> list[str]:
    """Say what another number of steps does to the learning rate of the stage that resumes.

    The decay is spread over all steps of a stage. With more steps the rate after a state is higher
    than it was, so the result is that of no uninterrupted run, unless the decay had not begun.
    """
    if position is None:
        return []
    name, step = position
    stage: StageSettings | None = recipe.all_stages().get(name)
    old = before.get("stages", {}).get(name, {}).get("max_steps")
    if stage is None or old is None or old == stage.max_steps or not step:
        return []
    rates = [
        [lr_factor(stage.optimizer, each, steps) for each in range(step)]
        for steps in (old, stage.max_steps)
    ]
    text = f"stages.{name}.max_steps was {old} and is {stage.max_steps}"
    if rates[0] == rates[1]:
        return [f"{text}: the {step} steps so far had the learning rates of the new schedule"]
    was, now = (lr_factor(stage.optimizer, min(step, s), s) for s in (old, stage.max_steps))
    return [
        f"{text}: the learning rate decays over all steps, so from step {step} on it is {now:.3g} "
        f"of its peak instead of {was:.3g}; the {step} steps so far followed the schedule of {old} "
        f"steps, and the result is not that of one run of {stage.max_steps}"
    ]


def _by_id(rows: Rows) -> dict[tuple[str, int], str]:
    """Map the id of each row, with its number among equal ids, to its hash."""
    seen = Counter[str]()
    found = {}
    for name, digest in rows:
        found[name, seen[name]] = digest
        seen[name] += 1
    return found


def _covers(allowed: str, key: str) -> bool:
    return key == allowed or key.startswith(f"{allowed}.")


def _is_fixed(key: str, change: Change) -> bool:
    if key.endswith(".segmentation_loss_weight") and bool(change[0]) != bool(change[1]):
        return True  # without it, the segmentation path is frozen
    return _FIXED.fullmatch(key) is not None and key not in FREE_KEYS


def _is_free(key: str) -> bool:
    parts = key.split(".")
    is_of_stage = parts[0] == "stages" and len(parts) > 2
    return key in FREE_KEYS or (is_of_stage and parts[2] in FREE_STAGE_KEYS)
