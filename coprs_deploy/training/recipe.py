"""A training run as one typed record, read from one TOML file.

A recipe is complete: two runs of one recipe on one machine give the same weights. Unknown keys are
refused, with the nearest name. The files lie beside this module in ``recipes/``.
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
from coprs_deploy.training.losses import SegmentationLossWeights

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
    """A whole small CoPRS, built with random weights.

    Attributes:
        segmentation: sizes of the segmentation path.
        policy: sizes of the policy.
    """

    segmentation: SegmentationConfig
    policy: SmallPolicy = SmallPolicy()

    def __post_init__(self) -> None:
        if self.segmentation.policy_width != self.policy.width:
            raise ValueError(
                f"segmentation.policy_width is {self.segmentation.policy_width}, policy.width is "
                f"{self.policy.width}; they must be equal"
            )


class CheckpointModel(Record, frozen=True, tag_field="kind", tag="checkpoint"):
    """A model that starts from a checkpoint directory, as ``coprs-deploy convert`` writes it.

    Attributes:
        path: the checkpoint directory.
        policy: name of the policy's size, as ``coprs-deploy convert --random`` knows it.
        sam: name of SAM's size.
        freeze_vision_tower: whether the policy's vision tower stays as it is.
        gradient_checkpointing: whether activations are computed twice to save memory.
    """

    path: str
    policy: str
    sam: str
    freeze_vision_tower: bool = False
    gradient_checkpointing: bool = True


class SceneData(Record, frozen=True, tag_field="kind", tag="scenes"):
    """Generated scenes; questions are asked afresh each time a scene is shown.

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


class Optimizer(Record, frozen=True):
    """How weights move.

    Attributes:
        rate: learning rate at its peak.
        rate_factors: multiples of the rate by the first part of a parameter's name (``prior``,
            ``prompt_encoder``, ``mask_decoder``, ``image_encoder``, ``policy``).
        muon: whether hidden matrices are moved by Muon, the rest by AdamW.
        weight_decay: decoupled weight decay.
        betas: decay of AdamW's two moments.
        clip: largest norm of the whole gradient.
        warm_up_steps: steps over which the rate rises linearly.
        decay: ``linear`` or ``cosine``.
        decay_share: share of the steps, at the end, over which the rate falls.
        floor: the rate at the end, as a share of its peak.
    """

    rate: float = 2e-3
    rate_factors: dict[str, float] = {}
    muon: bool = True
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    warm_up_steps: int = 60
    decay: Literal["linear", "cosine"] = "linear"
    decay_share: float = 0.6
    floor: float = 0.02


class Phase(Record, frozen=True):
    """What all phases have.

    Attributes:
        steps: updates of the weights.
        batch_images: images an update, over all processes together.
        optimizer: how weights move.
        evaluate_every: steps between two looks at held-out scenes; 0 for the end only.
        evaluation_scenes: held-out scenes of one look.
        gates: what the phase must reach at its end: metric to smallest value.
    """

    steps: int
    batch_images: int = 32
    optimizer: Optimizer = Optimizer()
    evaluate_every: int = 0
    evaluation_scenes: int = 256
    gates: dict[str, float] = {}

    def __post_init__(self) -> None:
        for name in ("steps", "batch_images", "evaluation_scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class WarmUpPhase(Phase, frozen=True, tag_field="kind", tag="warm_up"):
    """The policy learns to see, through heads on its image tokens that are thrown away.

    Attributes:
        language_layers: layers of the language model that take part.
        compile: whether the transformer blocks are compiled.
    """

    language_layers: int = 2
    compile: bool = False


class SegmentationPhase(Phase, frozen=True, tag_field="kind", tag="segmentation"):
    """The segmentation path learns alone, asked by a query that knows the target.

    Attributes:
        targets_per_image: objects of each image that are asked for.
        weights: of the segmentation losses.
        dense_weight: of the heads on the image embedding that are thrown away.
    """

    targets_per_image: int = 3
    weights: SegmentationLossWeights = SegmentationLossWeights()
    dense_weight: float = 0.5


class SupervisedPhase(Phase, frozen=True, tag_field="kind", tag="supervised"):
    """The policy learns to reason, and with segmentation losses the whole model to answer.

    Attributes:
        questions_per_image: questions asked on one image at most.
        kinds: weight of each kind of question; empty takes the tier's own.
        opening_kinds: the same for the first steps, simple ones first.
        opening_share: share of the steps that take ``opening_kinds``.
        packed_length: tokens of one image with its questions behind it; 0 gives each question a
            row of its own and takes the policy's own forward pass.
        reasoning_weight: of the cross-entropy on the response.
        place_weight: how much a token that names a place counts, as a label.
        readout_weight: of a throw-away head that reads the target from ``<REF_POS>``.
        dense_weight: of the warm-up's heads; falls with the learning rate.
        segmentation_weight: of the segmentation losses (lambda_SEG); 0 leaves them out.
        segmented_share: share of the answers that the segmentation losses are computed on.
        weights: of the segmentation losses among themselves.
        join: first solve for the query head that maps the policy's states to the queries that the
            segmentation path was trained with.
        train_image_encoder: whether SAM's image encoder learns too.
        compile: whether the transformer blocks are compiled.
    """

    questions_per_image: int = 4
    kinds: dict[str, float] = {}
    opening_kinds: dict[str, float] = {}
    opening_share: float = 0.0
    packed_length: int = 0
    reasoning_weight: float = 1.0
    place_weight: float = 1.0
    readout_weight: float = 0.0
    dense_weight: float = 0.0
    segmentation_weight: float = 0.0
    segmented_share: float = 1.0
    weights: SegmentationLossWeights = SegmentationLossWeights()
    join: bool = False
    train_image_encoder: bool = False
    compile: bool = False


AnyPhase = WarmUpPhase | SegmentationPhase | SupervisedPhase


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


def _read(source: str) -> dict[str, Any]:
    path = Path(source) if source.endswith(".toml") else RECIPE_FOLDER / f"{source}.toml"
    if not path.is_file():
        names = recipe_names()
        nearest = difflib.get_close_matches(source, names, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(
            f"there is no recipe {source!r}{hint} Known: {', '.join(names)}, or a .toml file"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


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
