"""The scene evaluator: its masks are those of the runtime, its metrics those of evaluation."""

import numpy as np
import pytest
import torch
from torch import nn

from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import PolicyImageLimits
from coprs_deploy.curriculum.evaluation import (
    SceneEvaluator,
    held_out_questions,
    named_locations,
)
from coprs_deploy.curriculum.packed_forward import PackedForward
from coprs_deploy.curriculum.packing import QuestionPacker
from coprs_deploy.curriculum.recipe import CurriculumRecipe
from coprs_deploy.curriculum.scenes import store_scenes
from coprs_deploy.curriculum.state import initialize_segmentation
from coprs_deploy.curriculum.tiny_policy import END_TOKEN, build_tiny_policy
from coprs_deploy.data.synthetic import HELD_OUT_SEED, PLAIN
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_graph
from coprs_deploy.evaluation.summary import summarize
from coprs_deploy.export import export_checkpoint
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy import Policy
from coprs_deploy.policy.policy import PolicyResult, StopReason
from coprs_deploy.prompts import Response
from coprs_deploy.runtime import CoPRS
from coprs_deploy.training.recipe import load_recipe
from coprs_deploy.training.state import TrainingState


class FixedPolicy(Policy):
    """Policy with fixed hidden states, so that only the segmentation path is compared."""

    description = "fixed"
    hidden_size = 128

    def __init__(self, states):
        self.states = states

    def stream(self, request):
        yield PolicyResult(
            Response("", "", tuple(range(len(self.states))), ()),
            self.states,
            StopReason.TARGETS_REACHED,
            (),
            0,
            0.0,
            0.0,
        )

    def close(self):
        pass


@pytest.fixture(scope="module")
def scenes(scenes_dir):
    return store_scenes(PLAIN, HELD_OUT_SEED, 6, scenes_dir)


@pytest.fixture(scope="module")
def state():
    recipe = load_recipe("demo", recipe_type=CurriculumRecipe)
    torch.manual_seed(0)
    segmentation = SegmentationModel(recipe.model.segmentation)
    initialize_segmentation(segmentation)
    policy = build_tiny_policy(recipe.model.policy, ["the red circle"], 0)
    return TrainingState(
        policy, segmentation.eval(), nn.Module(), PolicyImageLimits(128**2, 128**2)
    )


@pytest.mark.slow
def test_scene_evaluator_masks_are_those_of_the_exported_bundle(state, scenes, tmp_path):
    state.save_checkpoint(tmp_path / "checkpoint", "float32", {})
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle
    bundle = open_bundle(bundle.path)
    graphs = SegmentationGraphs(
        {
            name: open_graph(graph.runtime, bundle.graph_path(name), graph.spec, RunnerOptions())
            for name, graph in bundle.manifest.graphs.items()
        }
    )
    packer = QuestionPacker(state.policy.tokenizer, state.policy.prompt, 8)
    forward = PackedForward(state.policy.model, 128, torch.float32)
    evaluator = SceneEvaluator(state, forward, packer)
    states = np.random.default_rng(0).standard_normal((2, 128), dtype=np.float32)
    policy = FixedPolicy(states)
    with CoPRS(graphs, policy, bundle.manifest.geometry) as coprs:
        for image in scenes.images[:2]:
            result = coprs.segment(np.asarray(image), "anything", max_targets=2)
            with torch.no_grad():
                priors, masks = evaluator._segment(
                    [np.asarray(image)], torch.zeros(2, dtype=torch.int64), torch.from_numpy(states)
                )
            assert np.mean(masks != result.masks) < 1e-3
            assert np.mean(priors != (result.prior_logits > 0)) < 1e-3


def test_teacher_forced_evaluation_scores_the_target_responses(state, scenes):
    packer = QuestionPacker(state.policy.tokenizer, state.policy.prompt, 8)
    forward = PackedForward(state.policy.model, 128, torch.float32)
    evaluator = SceneEvaluator(state, forward, packer)
    questions = held_out_questions(PLAIN, scenes, 4, 2)
    assert [q.question_type == "none" for q in questions] == [False] * 4 + [True] * 2
    assert [q.id for q in questions] == [f"plain-held-out-{i}" for i in (0, 1, 2, 3, 5, 4)]
    scores = evaluator.evaluate(questions, evaluator.target_responses(questions))
    for score in scores:
        assert score.extra["exact_match"] == score.extra["location_accuracy"] == 1
    assert [score.num_found for score in scores] == [1] * 4 + [0] * 2
    assert [score.extra["object_accuracy"] for score in scores[4:]] == [0, 0]
    metrics = summarize(scores)
    assert metrics["no_match_precision"] == metrics["no_match_recall"] == 1
    assert metrics["location_accuracy"] == metrics["exact_match"] == 1


def test_truncated_responses_have_forced_answers(state, scenes):
    tokenizer = state.policy.tokenizer
    packer = QuestionPacker(tokenizer, state.policy.prompt, 8)
    evaluator = SceneEvaluator(state, PackedForward(state.policy.model, 128, torch.float32), packer)
    questions = held_out_questions(PLAIN, scenes, 2, 1)
    *targets, no_match = evaluator.target_responses(questions)
    for response in targets:
        whole = len(packer.reasoning_columns(response))
        text = tokenizer.decode(evaluator.truncate(response, 4))
        start, _, end = text.partition("</think>")
        assert questions[targets.index(response)].response.startswith(start)
        assert end == f" <REF_POS>{END_TOKEN}"
        assert evaluator.truncate(response, whole) == response
        assert len(evaluator.truncate(response, 4)) == len(response) - whole + 4
    assert tokenizer.decode(evaluator.truncate(no_match, 100)).endswith(
        f"</think> <REF_POS>{END_TOKEN}"
    )
    assert tokenizer.decode(evaluator.truncate([], 0)) == f"<think></think> <REF_POS>{END_TOKEN}"
    truncated = [evaluator.truncate(response, 4) for response in targets]
    scores = evaluator.evaluate(questions[:2], truncated)
    assert [score.num_found for score in scores] == [1, 1]
    assert [score.extra["exact_match"] for score in scores] == [0, 0]


def test_prediction_of_a_target_mask_selects_its_object(state, scenes):
    packer = QuestionPacker(state.policy.tokenizer, state.policy.prompt, 8)
    evaluator = SceneEvaluator(state, None, packer)
    question = held_out_questions(PLAIN, scenes, 1, 0)[0]
    ids = state.policy.tokenizer(question.response)["input_ids"]
    right = evaluator._prediction(question, ids, ids, question.masks, question.masks)
    assert right.extra["object_accuracy"] == 1
    empty = np.zeros_like(question.masks)
    missed = evaluator._prediction(question, ids, ids[:-1], empty, empty)
    assert missed.extra["object_accuracy"] == missed.extra["exact_match"] == 0


def test_named_locations_reads_the_conclusion_only():
    text = "The red shape candidates are: at row1 col1 x. The target is at row3 col4, the x."
    assert named_locations(text) == {"row3 col4"}
    assert named_locations("The target is nowhere.") == set()
