"""Recipes: one training run as one typed record, read from one TOML file.

A recipe is complete: two runs of one recipe on one machine give the same weights. Unknown keys are
refused with the nearest name. With a line ``base = "NAME"``, a file lists only its differences from
another recipe. The package's recipes are in ``training/recipes/`` and ``curriculum/recipes/``.

This module holds what all recipes share, the loader, and :class:`Recipe` for models that start from
a checkpoint; recipes of the tiny model are
:class:`~coprs_deploy.curriculum.recipe.CurriculumRecipe`. It imports neither torch nor TRL.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import msgspec

from coprs_deploy.specs import Record
from coprs_deploy.training.settings import (
    CheckpointModel,
    Count,
    ExampleData,
    GrpoSettings,
    Positive,
    StageSettings,
    SupervisedSettings,
    SyntheticData,
)

RECIPE_FOLDERS = tuple(
    Path(__file__).parents[1] / part / "recipes" for part in ("training", "curriculum")
)

FREE_TABLES = (
    "lr_multipliers",
    "thresholds",
    "question_type_weights",
    "initial_question_type_weights",
)
"""Tables whose keys are not fields of a record."""

TAGS = ("kind", "family")
"""Keys that decide the type of a table."""

SYNONYMS = {
    "lr": "learning_rate",
    "batch_size": "global_batch_size",
    "epochs": "max_steps",
    "iterations": "max_steps",
    "steps": "max_steps",
    "group_size": "num_generations",
    "warmup": "warmup_steps",
    "gpus": "num_processes",
    "workers": "num_workers",
    "threads": "num_threads",
    "checkpoint": "path",
    "train": "training",
    "val": "held_out",
    "validation": "held_out",
}
"""Names of other trainers for settings of recipes."""

MIN_LIKENESS = 0.6
"""Smallest likeness of a name that an error suggests."""

_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]+)`")


class RunSettings(Record, frozen=True, kw_only=True):
    """Settings of every run.

    Attributes:
        description: one line for ``--list``.
        seed: seed of the weights, the data and its order.
        precision: precision of matrix products: ``bf16``, ``fp32``, or ``auto`` for bf16 where the
            machine has bf16 units. Without them a CPU multiplies bf16 twenty times slower than
            fp32.
        save_dtype: dtype of the weights in the finished checkpoint.
        num_processes: processes that ``coprs-deploy train`` starts on this machine.
        num_threads: CPU threads per process.
        num_workers: worker processes that prepare the batches of each process; those of the first
            also render its scenes. With 0 a process prepares its own batches, which costs nothing
            on a CPU but leaves a GPU idle meanwhile.
        logging_steps: steps between two lines of the log.
        save_steps: steps between two states that a run can resume from, each with a checkpoint.
        save_total_limit: number of states, and of checkpoints besides the best, that are kept.
        report_to: where the curves are written: ``tensorboard``, ``wandb``, ``trackio``.
    """

    description: str
    seed: Count = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    num_processes: Positive = 1
    num_threads: Positive = 1
    num_workers: Count = 0
    logging_steps: Positive = 10
    save_steps: Positive = 200
    save_total_limit: Positive = 2
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)

    def all_stages(self) -> Mapping[str, StageSettings]:
        """Return the stages by name, in the order in which they run."""
        stages: Mapping[str, StageSettings] = self.stages  # type: ignore[attr-defined]
        return stages


class Recipe(RunSettings, frozen=True, kw_only=True):
    """Recipe of a model that starts from a checkpoint.

    Attributes:
        model: checkpoint to start from.
        data: training and held-out data.
        stages: name to stage, in the order in which they run.
    """

    model: CheckpointModel
    data: SyntheticData | ExampleData
    stages: dict[str, SupervisedSettings | GrpoSettings]


R = TypeVar("R", bound=RunSettings)


def recipe_names() -> list[str]:
    """List the recipes of the package."""
    return sorted(path.stem for folder in RECIPE_FOLDERS for path in folder.glob("*.toml"))


def model_kind(source: str) -> str:
    """Read ``model.kind`` of a recipe, which decides its type.

    Args:
        source: the name of a recipe of the package, or the path of a TOML file.

    Raises:
        ValueError: the recipe is unknown, or names no kind.
    """
    model = _read(source).get("model")
    kind = model.get("kind") if isinstance(model, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"the recipe {source} has no model.kind; accepted: checkpoint, tiny")
    return kind


def load_recipe(source: str, settings: Sequence[str] = (), recipe_type: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """Read a recipe and change some of its values.

    Args:
        source: the name of a recipe of the package, or the path of a TOML file.
        settings: ``key=value`` pairs; keys are dotted (``stages.reasoning.max_steps``), values are
            written as in TOML, bare words being text.
        recipe_type: type of the recipe.

    Raises:
        ValueError: the recipe is unknown, or a key or value is not accepted.
    """
    recipe = _convert(_read(source), f"the recipe {source}", recipe_type)
    data = recipe.to_json()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, not {setting!r}")
        _assign(data, key.strip(), _parse_value(text.strip()))
    return _convert(data, f"--set {' '.join(settings)}", recipe_type) if settings else recipe


def changed_keys(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """Compare two recipes, both as ``to_json`` gives them.

    Returns:
        Dotted key to both values, sorted; None where a recipe has no such key.
    """
    first, second = dict(_leaves(one)), dict(_leaves(other))
    keys = sorted(first.keys() | second.keys())
    return {k: (first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k)}


def _read(source: str, readers: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a file over its bases."""
    path = _find(source, readers)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ValueError(f"{path}: base is {base!r}; it must be the name or path of a recipe")
    if str(path) in readers:
        raise ValueError(f"{path} is its own base, by way of {', '.join(readers)}")
    if base.endswith(".toml"):
        base = str(path.parent / base)
    return _derive(_read(base, (*readers, str(path))), data)


def _find(source: str, readers: tuple[str, ...]) -> Path:
    packaged = [folder / f"{source}.toml" for folder in RECIPE_FOLDERS]
    paths = [Path(source)] if source.endswith(".toml") else packaged
    if found := next(filter(Path.is_file, paths), None):
        return found
    names = recipe_names()
    reader = f" (the base of {readers[-1]})" if readers else ""
    if source.endswith(".toml"):
        raise ValueError(f"the recipe file {source}{reader} does not exist")
    if Path(f"{source}.toml").is_file():
        names.append(f"{source}.toml")
    raise ValueError(
        f"there is no recipe {source!r}{reader}; accepted: {', '.join(names)}, or a .toml file"
        f"{_nearest_recipe(source, names)}"
    )


def _nearest_recipe(source: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(source, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _derive(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Apply changes to a recipe: tables are merged, unless their type changes."""
    derived = dict(base)
    for key, value in changes.items():
        old, derived[key] = base.get(key), value
        if not isinstance(old, dict) or not isinstance(value, dict):
            continue
        if all(value.get(tag, old.get(tag)) == old.get(tag) for tag in TAGS):
            derived[key] = _derive(old, value)
    return derived


def _convert(data: object, where: str, recipe_type: type[R]) -> R:
    try:
        recipe = recipe_type.from_json(data)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at ")
        records = _records_at(recipe_type, path.strip("`$").replace("[...]", "").split(".")[1:])
        hint = ""
        if unknown := _UNKNOWN_FIELD.search(reason):
            fields = sorted({name for record in records for name in record.__struct_fields__})
            hint = nearest_name(unknown[1], fields) or f"; accepted: {', '.join(fields)}"
        elif path.endswith(".kind`"):
            hint = f"; accepted: {', '.join(record.__struct_config__.tag for record in records)}"
        raise ValueError(f"{where} is not valid: {error}{hint}") from error
    for key, value in _leaves(recipe.to_json()):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} is not valid: {key} is {value}; accepted: a finite number")
    return recipe


def _records_at(recipe_type: type[RunSettings], path: Sequence[str]) -> list[Any]:
    """List the types of the records that a recipe may have at a path, ``kind`` left out."""
    records: list[Any] = [recipe_type]
    for name in path:
        hints = (get_type_hints(record).get(name) for record in records)
        found = [each for hint in hints for each in (get_args(hint) or (hint,))]
        found = [inner for each in found for inner in (get_args(each) or (each,))]
        if name != "kind":
            records = [each for each in found if hasattr(each, "__struct_fields__")]
    return records


def _assign(data: dict[str, Any], key: str, value: object) -> None:
    """Set one leaf, or one key of a free table (multipliers, thresholds), in place."""
    *parents, last = key.split(".")
    table: Any = data
    for part in parents:
        table = table.get(part) if isinstance(table, dict) else None
    is_free = bool(parents) and parents[-1] in FREE_TABLES
    if not isinstance(table, dict) or (last not in table and not is_free):
        known = [name for name, _ in _leaves(data)]
        raise ValueError(f"there is no key {key!r} in this recipe{nearest_name(key, known)}")
    table[last] = value


def _parse_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def nearest_name(wrong: str, known: Sequence[str]) -> str:
    """Return a hint at the known name that is meant, with a semicolon in front; or nothing.

    Of dotted names the last part counts most. A name with the same word (``steps`` of
    ``max_steps``), or one of ``SYNONYMS``, is nearer than one with similar letters.
    """
    *parents, last = wrong.lower().replace("-", "_").split(".")
    last = SYNONYMS.get(last, last)

    def likeness(name: str) -> tuple[float, float]:
        *others, field = name.lower().split(".")
        words, own = set(last.split("_")), set(field.split("_"))
        shared = len(words & own) / len(words | own)
        letters = difflib.SequenceMatcher(None, last, field).ratio()
        place = difflib.SequenceMatcher(None, ".".join(parents), ".".join(others)).ratio()
        return max(letters, 0.6 + 0.4 * shared if words <= own else 0.0), place

    if not known:
        return ""
    best = max(known, key=likeness)
    return f"; did you mean {best}?" if likeness(best)[0] >= MIN_LIKENESS else ""


def leaf_keys(data: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of a recipe, as ``to_json`` gives it."""
    return [name for name, _ in _leaves(data)]


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value
