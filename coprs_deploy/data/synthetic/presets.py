"""Difficulty presets of synthetic scenes."""

from __future__ import annotations

from coprs_deploy.data.synthetic import vocabulary
from coprs_deploy.specs import Record

HELD_OUT_SEED = 1_000_000_000
"""First seed of held-out scenes; training uses seeds below it."""

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
"""Types of question; :mod:`coprs_deploy.data.synthetic.questions` has an example of each."""


class Preset(Record, frozen=True):
    """Content of scenes and types of questions.

    Attributes:
        name: name of the preset, part of every random seed.
        image_size: side of the square image in pixels.
        num_objects: minimum and maximum number of objects.
        shapes: names of the shapes.
        textures: names of the textures.
        backgrounds: names of the backgrounds.
        radii: minimum and maximum radius of small, medium and large objects, relative to the image
            side; the radius is that of a circle of the same area.
        texture_period: distance between stripes, relative to the image side.
        attribute_reuse: probability that an object copies attributes of an earlier one.
        overlap_probability: probability that an object touches or covers an earlier one.
        min_visible_share: minimum visible share of each object; 1 forbids overlaps.
        max_rotation: maximum rotation, as the tangent of half its angle; 0 keeps objects upright.
        shading: relative brightness change across an object; 0 is flat.
        clear_distance: minimum difference of positions for expressions such as "leftmost" or "left
            of", relative to the image side.
        question_type_weights: weight of each question type; a missing type has weight 0.
        max_targets: maximum number of targets of a question.
        has_paraphrases: whether instructions are paraphrased; otherwise they are noun phrases.
        shows_comparisons: whether the reasoning marks the candidates that fulfill a relation, and
            states the size of the largest or smallest.
        things: nouns of objects that no scene has, for no-match questions.
    """

    name: str
    image_size: int
    num_objects: tuple[int, int]
    shapes: tuple[str, ...]
    textures: tuple[str, ...]
    backgrounds: tuple[str, ...]
    radii: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    texture_period: float
    attribute_reuse: float
    overlap_probability: float
    min_visible_share: float
    max_rotation: float
    shading: float
    clear_distance: float
    question_type_weights: dict[str, float]
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
            raise ValueError(
                f"num_objects is {self.num_objects}; accepted: 1 <= minimum <= maximum"
            )
        if not 0 < self.min_visible_share <= 1:
            raise ValueError(f"min_visible_share is {self.min_visible_share}; accepted: (0, 1]")
        for field, found, known in (
            ("shapes", self.shapes, vocabulary.FULL_SHAPES),
            ("textures", self.textures, vocabulary.FULL_TEXTURES),
            ("backgrounds", self.backgrounds, vocabulary.FULL_BACKGROUNDS),
            ("question_type_weights", tuple(self.question_type_weights), QUESTION_TYPES),
        ):
            unknown = [name for name in found if name not in known]
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
    attribute_reuse=0.55,
    overlap_probability=0.0,
    min_visible_share=1.0,
    max_rotation=0.0,
    shading=0.0,
    clear_distance=0.11,
    question_type_weights={"attribute": 0.36, "superlative": 0.27, "relation": 0.27, "none": 0.10},
    max_targets=1,
    has_paraphrases=False,
    shows_comparisons=False,
)
"""Few separate shapes on quiet backgrounds, one wording: a tiny model learns it in an hour."""

FULL = Preset(
    name="full",
    image_size=192,
    num_objects=(2, 10),
    shapes=vocabulary.FULL_SHAPES,
    textures=vocabulary.FULL_TEXTURES,
    backgrounds=vocabulary.FULL_BACKGROUNDS,
    radii=((0.054, 0.061), (0.080, 0.090), (0.118, 0.132)),
    texture_period=0.038,
    attribute_reuse=0.6,
    overlap_probability=0.35,
    min_visible_share=0.6,
    max_rotation=0.12,
    shading=0.16,
    clear_distance=0.075,
    question_type_weights={
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
"""Ten shapes, occlusion, and all question types in many wordings."""

PRESETS = {preset.name: preset for preset in (PLAIN, FULL)}
