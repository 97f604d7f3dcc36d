"""The two worlds that scenes are drawn from, each described by one record."""

from __future__ import annotations

from coprs_deploy.data.synthetic import vocabulary
from coprs_deploy.specs import Record

HELD_OUT_SEED = 1_000_000_000
"""First seed of the scenes that nothing is trained on; training takes seeds below it."""

QUESTION_TYPES = (
    "attribute",
    "superlative",
    "relation",
    "two_step",
    "nearest",
    "ordinal",
    "several",
    "none",
)
"""Kinds of question: see :mod:`coprs_deploy.data.synthetic.questions` for an example of each."""


class Preset(Record, frozen=True):
    """What scenes hold and what is asked about them.

    Attributes:
        name: part of every seed, so that tiers share no scene.
        image_size: side of the square image in pixels.
        num_objects: fewest and most objects of a scene.
        shapes: names of shapes.
        textures: names of textures.
        backgrounds: kinds of background.
        radii: smallest and largest radius of small, medium and large objects, as shares of the
            image's side; the radius is that of a circle of the same area.
        texture_period: pixels from stripe to stripe, as a share of the image's side.
        kinship: how often an object takes some attributes from an earlier one.
        overlap: how often an object is put beside or over an earlier one.
        min_visible_share: how much of each object stays visible; 1 forbids overlaps.
        max_turn: largest turn, as the tangent of half its angle; 0 keeps every object upright.
        shading: how much lighter and darker an object's far sides are; 0 is flat.
        clear_distance: by how much positions must differ for words such as "leftmost" or "left
            of", as a share of the image's side.
        kinds: weight of each kind of question; a kind that is not named is not asked.
        max_targets: most targets of one question.
        has_paraphrases: whether instructions come in many wordings, or are the bare noun phrase.
        shows_comparisons: whether the reasoning marks the candidates that lie as a relation says,
            and says of what size the largest or smallest is.
        things: nouns outside this world, for questions that nothing matches.
    """

    name: str
    image_size: int
    num_objects: tuple[int, int]
    shapes: tuple[str, ...]
    textures: tuple[str, ...]
    backgrounds: tuple[str, ...]
    radii: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    texture_period: float
    kinship: float
    overlap: float
    min_visible_share: float
    max_turn: float
    shading: float
    clear_distance: float
    kinds: dict[str, float]
    max_targets: int
    has_paraphrases: bool
    shows_comparisons: bool
    things: tuple[str, ...] = vocabulary.THINGS

    def __post_init__(self) -> None:
        if self.image_size < 64 or self.image_size % vocabulary.GRID_SIZE:
            raise ValueError(
                f"image_size is {self.image_size}; accepted: multiples of "
                f"{vocabulary.GRID_SIZE} from 64"
            )
        if not 1 <= self.num_objects[0] <= self.num_objects[1]:
            raise ValueError(f"num_objects is {self.num_objects}; accepted: 1 <= fewest <= most")
        if not 0 < self.min_visible_share <= 1:
            raise ValueError(f"min_visible_share is {self.min_visible_share}; accepted: (0, 1]")
        for field, found, known in (
            ("shapes", self.shapes, vocabulary.FULL_SHAPES),
            ("textures", self.textures, vocabulary.FULL_TEXTURES),
            ("backgrounds", self.backgrounds, vocabulary.FULL_BACKGROUNDS),
            ("kinds", tuple(self.kinds), QUESTION_TYPES),
        ):
            unknown = [word for word in found if word not in known]
            if unknown or not found:
                raise ValueError(f"{field} is {found}; accepted: some of {', '.join(known)}")


PLAIN = Preset(
    name="plain",
    image_size=128,
    num_objects=(1, 6),
    shapes=vocabulary.PLAIN_SHAPES,
    textures=vocabulary.PLAIN_TEXTURES,
    backgrounds=vocabulary.PLAIN_BACKGROUNDS,
    radii=((0.072, 0.080), (0.105, 0.116), (0.152, 0.166)),
    texture_period=0.047,
    kinship=0.55,
    overlap=0.0,
    min_visible_share=1.0,
    max_turn=0.0,
    shading=0.0,
    clear_distance=0.11,
    kinds={"attribute": 0.36, "superlative": 0.27, "relation": 0.27, "none": 0.10},
    max_targets=1,
    has_paraphrases=False,
    shows_comparisons=False,
)
"""Few separate shapes on quiet backgrounds, one wording: what a small model masters in an hour."""

FULL = Preset(
    name="full",
    image_size=192,
    num_objects=(2, 10),
    shapes=vocabulary.FULL_SHAPES,
    textures=vocabulary.FULL_TEXTURES,
    backgrounds=vocabulary.FULL_BACKGROUNDS,
    radii=((0.054, 0.061), (0.080, 0.090), (0.118, 0.132)),
    texture_period=0.038,
    kinship=0.6,
    overlap=0.35,
    min_visible_share=0.6,
    max_turn=0.12,
    shading=0.16,
    clear_distance=0.075,
    kinds={
        "attribute": 0.20,
        "superlative": 0.15,
        "relation": 0.15,
        "two_step": 0.10,
        "nearest": 0.06,
        "ordinal": 0.10,
        "several": 0.12,
        "none": 0.12,
    },
    max_targets=4,
    has_paraphrases=True,
    shows_comparisons=True,
)
"""Many shapes that hide one another, ten shapes, every kind of question in many wordings."""

PRESETS = {tier.name: tier for tier in (PLAIN, FULL)}
