"""A training run as one typed record, read from one TOML file.

A recipe is complete: two runs of one recipe on one machine give the same weights. Unknown keys are
refused, with the nearest name. With a line ``base = "NAME"``, a file only says in what it differs
from another recipe. The files lie beside this module in ``recipes/``.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from coprs_deploy.curriculum.recipe import PerceptionSettings, SegmentationSettings, TinyModel
from coprs_deploy.specs import Record
from coprs_deploy.training.settings import (
    CheckpointModel,
    ExampleData,
    GrpoSettings,
    SupervisedSettings,
    SyntheticData,
)

RECIPE_FOLDERS = tuple(
    Path(__file__).parents[1] / part / "recipes" for part in ("training", "curriculum")
)


FREE_TABLES = ("lr_multipliers", "gates", "kinds", "initial_question_type_weights")
"""Tables whose keys are not fields of a record."""


_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]+)`")


AnyStage = PerceptionSettings | SegmentationSettings | SupervisedSettings | GrpoSettings


class Recipe(Record, frozen=True):
    """A whole run.

    Attributes:
        description: one line for ``--list``.
        model: what is trained.
        data: what it is trained on.
        phases: name to phase, in the order in which they run.
        seed: of the weights, the data and its order.
        precision: of products: ``bf16``, ``fp32``, or ``auto`` for bf16 where the machine has
            units for it. Without them a CPU multiplies bf16 twenty times slower than fp32.
        store: dtype of the weights in the finished checkpoint.
        processes: that ``coprs-deploy train`` starts on this machine.
        threads: CPU threads of each process.
        workers: further processes of each that prepare its batches, and of the first that draw its
            scenes. With 0 a process prepares a batch before it computes it, which on a CPU costs
            nothing but lets a GPU wait.
        logging_steps: steps between two lines of the log.
        save_steps: steps between two states that a killed run resumes from.
    """

    description: str
    model: TinyModel | CheckpointModel
    data: SyntheticData | ExampleData
    phases: dict[str, AnyStage]
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    store: Literal["float32", "float16", "bfloat16"] = "float16"
    processes: int = 1
    threads: int = 1
    workers: int = 0
    logging_steps: int = 10
    save_steps: int = 200


def recipe_names() -> list[str]:
    """List the recipes of the package."""
    return sorted(path.stem for folder in RECIPE_FOLDERS for path in folder.glob("*.toml"))


def load_recipe(source: str, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change some of its values.

    Args:
        source: the name of a recipe of the package, or the path of a TOML file.
        settings: ``key=value`` pairs; keys are dotted (``phases.reasoning.steps``), values are
            written as in TOML, bare words being text.

    Raises:
        ValueError: the recipe is unknown, or a key or value is not accepted.
    """
    recipe = _convert(_read(source), f"the recipe {source}")
    data = recipe.to_json()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, not {setting!r}")
        _assign(data, key.strip(), _parse_value(text.strip()))
    return _convert(data, f"--set {' '.join(settings)}") if settings else recipe


def changed_keys(one: Recipe, other: Recipe) -> list[str]:
    """Name the keys in which two recipes differ."""
    first, second = dict(_leaves(one.to_json())), dict(_leaves(other.to_json()))
    return sorted(k for k in first.keys() | second.keys() if first.get(k) != second.get(k))


def _read(source: str, readers: tuple[str, ...] = ()) -> dict[str, Any]:
    path = (
        Path(source)
        if source.endswith(".toml")
        else next(
            (f / f"{source}.toml" for f in RECIPE_FOLDERS if (f / f"{source}.toml").is_file()),
            RECIPE_FOLDERS[0] / f"{source}.toml",
        )
    )
    if not path.is_file():
        names = recipe_names()
        nearest = difflib.get_close_matches(source, names, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        reader = f" (the base of {readers[-1]})" if readers else ""
        raise ValueError(
            f"there is no recipe {source!r}{reader}{hint} Known: {', '.join(names)}, or a .toml "
            "file"
        )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ValueError(f"{path}: base is {base!r}; it names another recipe")
    if str(path) in readers:
        raise ValueError(f"{path} is its own base, by way of {', '.join(readers)}")
    if base.endswith(".toml"):
        base = str(path.parent / base)
    return _derive(_read(base, (*readers, str(path))), data)


def _derive(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lay changes over a recipe: tables are merged, unless they become of another kind."""
    derived = dict(base)
    for key, value in changes.items():
        old, derived[key] = base.get(key), value
        if not isinstance(old, dict) or not isinstance(value, dict):
            continue
        if value.get("kind", old.get("kind")) == old.get("kind"):
            derived[key] = _derive(old, value)
    return derived


def _convert(data: object, where: str) -> Recipe:
    try:
        return Recipe.from_json(data)
    except msgspec.ValidationError as error:
        unknown = _UNKNOWN_FIELD.search(str(error))
        hint = _suggestion(unknown[1], _field_names()) if unknown else ""
        raise ValueError(f"{where} is not valid: {error}{hint}") from error


def _assign(data: dict[str, Any], key: str, value: object) -> None:
    """Set one leaf, or a table of free keys (rate factors, gates), in place."""
    *parents, last = key.split(".")
    table: Any = data
    for part in parents:
        table = table.get(part) if isinstance(table, dict) else None
    is_free = bool(parents) and parents[-1] in FREE_TABLES
    if not isinstance(table, dict) or (last not in table and not is_free):
        known = [name for name, _ in _leaves(data)]
        raise ValueError(f"there is no key {key!r} in this recipe{_suggestion(key, known)}")
    table[last] = value


def _parse_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _suggestion(wrong: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _field_names() -> list[str]:
    found: set[str] = set()
    waiting: list[type] = [Record]
    while waiting:
        record = waiting.pop()
        found.update(getattr(record, "__struct_fields__", ()))
        waiting.extend(record.__subclasses__())
    return sorted(found)
