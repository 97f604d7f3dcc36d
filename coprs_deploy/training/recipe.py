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

from coprs_deploy.architecture import SegmentationConfig
from coprs_deploy.specs import Record
from coprs_deploy.training.grpo.settings import GrpoPhase
from coprs_deploy.training.phase_settings import (
    SegmentationPhase,
    SupervisedPhase,
    WarmUpPhase,
)

RECIPE_FOLDER = Path(__file__).parent / "recipes"

FREE_TABLES = ("rate_factors", "gates", "kinds", "opening_kinds")
"""Tables whose keys are not fields of a record."""

_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]+)`")


class SmallPolicy(Record, frozen=True):
    """Sizes of a Qwen2.5-VL policy that is trained from nothing.

    Attributes:
        image_size: side in pixels of the square image that it sees.
        patch_size: side of a patch in pixels; 2 x 2 patches make one image token.
        width: D, the width of the language model.
        depth: its layers.
        heads: its attention heads.
        mlp_width: hidden width of its MLPs.
        vision_width: width of the vision tower.
        vision_depth: its blocks, all with attention over the whole image.
        vision_heads: its attention heads; vLLM wants heads at least 32 wide.
        vision_mlp_width: hidden width of its MLPs.
        rope_theta: base of the rotary frequencies. The usual 1e6 turns an axis of a small grid by
            next to nothing.
        mrope_section: rotary frequencies for time, row and column; they add up to half a head.
        initializer_range: standard deviation of the starting weights.
        vocabulary_size: largest number of tokens.
        max_response_tokens: longest response.
        instruction: what stands around an instruction in the prompt.
    """

    image_size: int = 128
    patch_size: int = 8
    width: int = 128
    depth: int = 5
    heads: int = 4
    mlp_width: int = 352
    vision_width: int = 96
    vision_depth: int = 4
    vision_heads: int = 3
    vision_mlp_width: int = 256
    rope_theta: float = 500.0
    mrope_section: tuple[int, int, int] = (2, 3, 11)
    initializer_range: float = 0.06
    vocabulary_size: int = 1024
    max_response_tokens: int = 128
    instruction: str = "{instruction}"

    def __post_init__(self) -> None:
        for name, value, divisor in (
            ("image_size", self.image_size, 2 * self.patch_size),
            ("width", self.width, 2 * self.heads),
            ("vision_width", self.vision_width, 4 * self.vision_heads),
        ):
            if value % divisor:
                raise ValueError(f"{name} is {value}; it must be a multiple of {divisor}")
        if sum(self.mrope_section) != self.width // self.heads // 2:
            raise ValueError(
                f"mrope_section is {self.mrope_section}; it must add up to half the width of a "
                f"head, {self.width // self.heads // 2}"
            )

    @property
    def grid_size(self) -> int:
        """Image tokens along one side."""
        return self.image_size // (2 * self.patch_size)


class SmallModel(Record, frozen=True, tag_field="kind", tag="small"):
    """A whole small CoPRS that is asked many questions on each scene.

    Attributes:
        segmentation: sizes of the segmentation path.
        policy: sizes of the policy.
        start: checkpoint directory of a model of these sizes that is trained further; its
            tokenizer is kept. Empty starts from random weights.
    """

    segmentation: SegmentationConfig
    policy: SmallPolicy = SmallPolicy()
    start: str = ""

    def __post_init__(self) -> None:
        if self.segmentation.policy_width != self.policy.width:
            raise ValueError(
                f"segmentation.policy_width is {self.segmentation.policy_width}, policy.width is "
                f"{self.policy.width}; they must be equal"
            )


class CheckpointModel(Record, frozen=True, tag_field="kind", tag="checkpoint"):
    """A model that starts from a checkpoint directory, as ``coprs-deploy convert`` writes it.

    Attributes:
        path: the checkpoint directory; empty takes the model that comes with the package.
        policy: name of the policy's size, as ``coprs-deploy convert --random`` knows it; empty
            where only the checkpoint knows.
        sam: name of SAM's size; empty likewise.
        freeze_vision_tower: whether the policy's vision tower stays as it is.
        gradient_checkpointing: whether activations are computed twice to save memory.
    """

    path: str = ""
    policy: str = ""
    sam: str = ""
    freeze_vision_tower: bool = False
    gradient_checkpointing: bool = True


class SceneData(Record, frozen=True, tag_field="kind", tag="scenes"):
    """Generated scenes; a small model is asked afresh each time a scene is shown.

    A model that starts from a checkpoint is asked one question a scene.

    Attributes:
        tier: which world the scenes come from.
        training_scenes: how many different scenes are trained on.
        held_out_scenes: how many others the finished model is judged on, one question each.
        no_match_scenes: how many more it is asked about something that is not there.
    """

    tier: Literal["plain", "full"] = "plain"
    training_scenes: int = 36_000
    held_out_scenes: int = 1024
    no_match_scenes: int = 256


class ExampleData(Record, frozen=True, tag_field="kind", tag="examples"):
    """Examples in files (image, instruction, masks, reasoning).

    Attributes:
        training: file to train on.
        held_out: file to judge the model on.
        features: folder of image embeddings, as ``coprs-deploy features`` writes it; empty
            computes them in every step.
    """

    training: str
    held_out: str
    features: str = ""


AnyPhase = WarmUpPhase | SegmentationPhase | SupervisedPhase | GrpoPhase


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
        log_every: steps between two lines of the log.
        save_every: steps between two states that a killed run resumes from.
    """

    description: str
    model: SmallModel | CheckpointModel
    data: SceneData | ExampleData
    phases: dict[str, AnyPhase]
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    store: Literal["float32", "float16", "bfloat16"] = "float16"
    processes: int = 1
    threads: int = 1
    workers: int = 0
    log_every: int = 10
    save_every: int = 200


def recipe_names() -> list[str]:
    """List the recipes of the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.toml"))


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
    path = Path(source) if source.endswith(".toml") else RECIPE_FOLDER / f"{source}.toml"
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
