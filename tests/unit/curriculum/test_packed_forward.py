"""Packed forward pass against transformers' own, and the tiny policy in the runtime."""

import numpy as np
import pytest
import torch

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.curriculum.packed_forward import PackedForward
from coprs_deploy.curriculum.packing import COMPLETE, PackedRows, QuestionPacker, attention_bias
from coprs_deploy.curriculum.reasoning_stage import dropped_questions
from coprs_deploy.curriculum.recipe import CurriculumRecipe, TinyPolicy
from coprs_deploy.curriculum.scenes import policy_pixels, segmentation_pixels
from coprs_deploy.curriculum.tiny_policy import END_TOKEN, build_tiny_policy
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.policy.transformers_policy import TransformersPolicy
from coprs_deploy.prompts import REFERENCE_TOKEN

SIZES = TinyPolicy(num_hidden_layers=3, vision_depth=2)
CORPUS = ["the red circle <think>The target is at row2 col5.</think> <REF_POS>"] * 5
QUESTIONS = [
    [
        ("the red circle", f"<think>The target</think> <REF_POS>{END_TOKEN}"),
        ("a blue one", f"<think>row2 col5</think> <REF_POS>{END_TOKEN}"),
    ],
    [("x y z", f"<think>none</think>{END_TOKEN}")],
]


@pytest.fixture(scope="module")
def parts():
    built = build_tiny_policy(SIZES, CORPUS, seed=0)
    built.model.eval()
    return built


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)


def test_packed_forward_gives_the_states_of_transformers(parts, images):
    """Float32 on one machine: largest difference 3e-6 over states of size 1."""
    packer = QuestionPacker(parts.tokenizer, parts.prompt, SIZES.grid_size)
    rows = packer.pack(QUESTIONS, length=192)
    forward = PackedForward(parts.model, SIZES.image_size, torch.float32)
    processed = parts.image_processor(images=list(images), return_tensors="pt")
    patches = processed["pixel_values"].reshape(2, -1, processed["pixel_values"].shape[-1])
    with torch.no_grad():
        pixels = policy_pixels(torch.from_numpy(images), parts.image_processor)
        packed = forward(pixels, rows, packer.image_start, 2).hidden
        for image, pairs in enumerate(QUESTIONS):
            for number, (instruction, response) in enumerate(pairs):
                prompt = packer.encode_prompt(instruction)
                ids = torch.tensor([prompt + parts.tokenizer(response)["input_ids"]])
                own = parts.model.model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=patches[image],
                    image_grid_thw=processed["image_grid_thw"][image : image + 1],
                    mm_token_type_ids=(ids == parts.model.config.image_token_id).int(),
                ).last_hidden_state[0]
                start = len(packer.prefix)
                found = packed[image][rows.blocks[image] == number + 1]
                assert torch.allclose(found, own[start:], atol=3e-5)
                assert torch.allclose(packed[image][:start], own[:start], atol=3e-5)


def test_packed_forward_with_early_stop_gives_the_middle_states(parts, images):
    packer = QuestionPacker(parts.tokenizer, parts.prompt, SIZES.grid_size)
    forward = PackedForward(parts.model, SIZES.image_size, torch.float32)
    pixels = policy_pixels(torch.from_numpy(images), parts.image_processor)
    with torch.no_grad():
        whole = forward(pixels, packer.prefix_rows(2), packer.image_start, 2)
        stopped = forward(pixels, packer.prefix_rows(2), packer.image_start, 2, stop=True)
    assert stopped.hidden is None
    assert torch.equal(stopped.middle, whole.middle)


def test_pack_labels_the_response_and_its_end(parts):
    packer = QuestionPacker(parts.tokenizer, parts.prompt, SIZES.grid_size)
    rows = packer.pack(QUESTIONS)
    learned = rows.labels[0][rows.labels[0] >= 0]
    text = parts.tokenizer.decode(learned)
    assert text == QUESTIONS[0][0][1] + QUESTIONS[0][1][1]
    at = rows.references
    assert (rows.input_ids[at[:, 0], at[:, 1]] == packer.reference_id).all()
    assert rows.sources.tolist() == [[0, 0, 0], [0, 1, 0]]


def test_pack_drops_a_question_that_does_not_fit(parts):
    packer = QuestionPacker(parts.tokenizer, parts.prompt, SIZES.grid_size)
    rows = packer.pack(QUESTIONS, length=len(packer.prefix) + 24)
    assert rows.sources.tolist() == [[0, 0, 0]]
    assert rows.input_ids.shape == (2, len(packer.prefix) + 24)
    counts = [len(pairs) for pairs in QUESTIONS]
    assert dropped_questions(rows, counts).sum() == 1
    assert dropped_questions(rows, counts).tolist()[:2] == [False, True]
    assert not dropped_questions(packer.pack(QUESTIONS), counts).any()
    assert dropped_questions(packer.prefix_rows(2), [0, 3]).tolist() == [True] * 3


def test_attention_bias_separates_questions_and_truncations():
    """The prefix, a question of three tokens, two truncations before its third, one of another."""
    blocks = torch.tensor([[0, 1, 1, 1, 1, 1, 2, -1]])
    positions = torch.tensor([0, 1, 2, 3, 2, 3, 1, 0]).expand(3, 1, -1)
    truncations = torch.tensor([[0, 0, 0, 0, 2, 3, 0, 0]])
    nothing = torch.zeros(0)
    rows = PackedRows(blocks, positions, blocks, truncations, nothing, nothing, nothing)
    assert (attention_bias(rows, torch.float32)[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 0, 0, 1],
    ]


def test_packed_truncations_have_the_states_of_truncated_responses(parts, images):
    packer = QuestionPacker(parts.tokenizer, parts.prompt, SIZES.grid_size)
    num_tokens = len(parts.tokenizer("row2 col5")["input_ids"])
    assert num_tokens >= 3
    rows = packer.pack(QUESTIONS, truncations=[[[0], [2, 0, num_tokens - 1]], [[]]])
    forward = PackedForward(parts.model, SIZES.image_size, torch.float32)
    pixels = policy_pixels(torch.from_numpy(images), parts.image_processor)
    first = packer.image_start + packer.grid_size
    with torch.no_grad():
        hidden = forward(pixels, rows, packer.image_start, 2).hidden
        for question, (instruction, response) in enumerate(QUESTIONS[0]):
            ids = parts.tokenizer(response)["input_ids"]
            reasoning = packer.reasoning_columns(ids)
            assert parts.tokenizer.decode(ids[reasoning.start : reasoning.stop]) in response
            for number in [[0], [0, 2, num_tokens - 1]][question]:
                cut = [ids[0], *ids[1:][:number], *ids[reasoning.stop :]]
                own = packer.pack([[(instruction, cut)]])
                states = forward(pixels[:1], own, packer.image_start, 2).hidden[0]
                expected = states[own.references[0, 1]]
                prompt = packer.encode_prompt(instruction)[len(packer.prefix) :]
                position = first + len(prompt) + 1 + number
                (at,) = torch.nonzero(
                    (rows.sources[:, 1] == question) & (rows.sources[:, 2] == position)
                )[0]
                found = hidden[0][rows.references[at, 1]]
                assert torch.allclose(found, expected, atol=3e-5)
    assert rows.sources[:, 1].tolist() == [0, 0, 1, 1, 1, 1]


def test_pack_labels_no_end_of_the_reasoning_in_truncations(parts):
    packer = QuestionPacker(parts.tokenizer, parts.prompt, SIZES.grid_size)
    rows = packer.pack(QUESTIONS, truncations=[[[0, 1], [1]], [[]]])
    of_truncations = rows.truncations[0] != COMPLETE
    labels = rows.labels[0][of_truncations]
    assert parts.tokenizer.decode(labels) == f" <REF_POS>{END_TOKEN}" * 3
    assert parts.tokenizer.decode(rows.input_ids[0][of_truncations]) == "</think> <REF_POS>" * 3
    assert packer.reasoning_columns(parts.tokenizer("<REF_POS>")["input_ids"]) == range(0)


def test_tokenizer_has_one_reference_token_and_whole_words(parts):
    tokenizer = parts.tokenizer
    assert REFERENCE_TOKEN in tokenizer.all_special_tokens
    assert "<think>" not in tokenizer.all_special_tokens
    tokens = tokenizer.tokenize("<think>The target is at row2 col5.</think> <REF_POS>")
    words = ["The", " target", " is", " at", " row2", " col5", "."]
    spelled = [word.replace(" ", "Ġ") for word in words]
    assert tokens == ["<think>", *spelled, "</think>", "Ġ", REFERENCE_TOKEN]


def test_image_processor_gives_a_square_image_the_tokens_of_the_grid(parts, images):
    grid = parts.image_processor(images=[images[0]], return_tensors="pt")["image_grid_thw"]
    assert grid.prod().item() // 4 == SIZES.grid_size**2 == 64


def test_transformers_policy_generates_the_same_tokens(parts, images, tiny_checkpoint):
    checkpoint, evaluator = tiny_checkpoint
    limits = checkpoint.config.policy_image
    instruction = "the red circle"
    written = evaluator.generate(list(images), [instruction, instruction])
    policy = TransformersPolicy(
        checkpoint.policy_path, checkpoint.config.prompt, limits.min_pixels, limits.max_pixels
    )
    with policy:
        for image, ids in zip(images, written, strict=True):
            *_, result = policy.stream(PolicyRequest(image, instruction, max_targets=9))
            assert list(result.token_ids) == ids


def test_segmentation_pixels_are_those_of_the_runtime(images, tiny_checkpoint):
    from coprs_deploy.images import prepare_image

    geometry = tiny_checkpoint[0].config.model.geometry
    ours = segmentation_pixels(torch.from_numpy(images), geometry)
    theirs = np.concatenate([prepare_image(image, geometry).image for image in images])
    assert np.allclose(ours.numpy(), theirs, atol=1e-5)


@pytest.fixture(scope="module")
def tiny_checkpoint(parts, tmp_path_factory, write_recipe):
    """Return a checkpoint of random weights in float32, and an evaluator with the same weights."""
    from torch import nn

    from coprs_deploy.checkpoint import PolicyImageLimits
    from coprs_deploy.curriculum.evaluation import SceneEvaluator
    from coprs_deploy.models import SegmentationModel
    from coprs_deploy.training.recipe import load_recipe
    from coprs_deploy.training.state import TrainingState

    recipe = load_recipe("demo", recipe_type=CurriculumRecipe)
    area = SIZES.image_size**2
    state = TrainingState(
        parts,
        SegmentationModel(recipe.model.segmentation),
        nn.Module(),
        PolicyImageLimits(area, area),
    )
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
    state.save_checkpoint(path, "float32", {})
    packer = QuestionPacker(parts.tokenizer, parts.prompt, SIZES.grid_size)
    forward = PackedForward(parts.model, SIZES.image_size, torch.float32)
    return read_checkpoint(path), SceneEvaluator(state, forward, packer)
