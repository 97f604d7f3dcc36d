"""Images, examples and a short recipe of a distillation."""

import msgspec
import pytest
from PIL import Image

from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from coprs_deploy.training.distillation.recipe import DistillationRecipe
from coprs_deploy.training.recipe import load_recipe

STUDENT = (
    "model.image_encoder={ family = 'vit', encoder_embed_dim = 24, encoder_depth = 1, "
    "encoder_num_heads = 2, encoder_global_attn_indexes = [], window_size = 8, mlp_ratio = 1.0, "
    "use_rel_pos = false }"
)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with ``images/`` (one wider than high), and two example files."""
    folder = tmp_path_factory.mktemp("distillation")
    (folder / "images").mkdir()
    for number, example in enumerate(SceneExamples(PLAIN, 8)):
        image = Image.fromarray(example.image)
        if number == 0:
            image = image.crop((0, 0, image.width, image.height // 2))
        image.save(folder / f"images/{number}.png")
    write_examples(folder / "examples.jsonl", SceneExamples(PLAIN, 6, 100))
    write_examples(folder / "held_out.jsonl", SceneExamples(PLAIN, 4, 200))
    return folder


@pytest.fixture
def recipe_of(data, tiny_checkpoint):
    """Build a short recipe; further settings are added."""

    def build(*settings, base="distill", **changes):
        both = base == "distill_masks"
        given = [
            *(f"teacher={tiny_checkpoint}", f"images={data}/images", STUDENT),
            *("num_held_out_images=2", "precision=fp32", "save_dtype=float32", "num_workers=0"),
            *("logging_steps=1", "report_to=[]", "stages.embedding.max_steps=4"),
            *("stages.embedding.eval_steps=2", "stages.embedding.global_batch_size=2"),
            *("stages.embedding.num_eval_examples=4", "stages.embedding.optimizer.warmup_steps=0"),
        ]
        if both:
            given += [
                *(f"examples={data}/examples.jsonl", f"held_out={data}/held_out.jsonl"),
                *("stages.decoding.max_steps=2", "stages.decoding.eval_steps=0"),
                *("stages.decoding.global_batch_size=2", "stages.decoding.num_eval_examples=4"),
                "stages.decoding.optimizer.warmup_steps=0",
            ]
        recipe = load_recipe(base, [*given, *settings], DistillationRecipe)
        return msgspec.structs.replace(recipe, **changes) if changes else recipe

    return build
