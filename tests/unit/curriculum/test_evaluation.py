"""The judge: its masks are the runtime's, and its figures are right on answers made by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import PolicyImageLimits
from coprs_deploy.curriculum.evaluation import (
    EvaluatedResponse,
    SceneEvaluator,
    held_out_questions,
    named_places,
    summarize,
)
from coprs_deploy.curriculum.packed_forward import PackedForward
from coprs_deploy.curriculum.packing import QuestionPacker
from coprs_deploy.curriculum.scenes import SceneSource, attribute_sizes, store_scenes
from coprs_deploy.curriculum.state import initialize_segmentation
from coprs_deploy.curriculum.tiny_policy import build_tiny_policy
from coprs_deploy.data.synthetic import HELD_OUT_SEED, PLAIN
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_graph
from coprs_deploy.export import export_checkpoint
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy import Policy
from coprs_deploy.policy.policy import PolicyResult, StopReason
from coprs_deploy.prompts import Response
from coprs_deploy.runtime import CoPRS
from coprs_deploy.training.recipe import load_recipe
from coprs_deploy.training.report import page
from coprs_deploy.training.state import TrainingState


class FixedPolicy(Policy):
    """Answers with given states, so that only the segmentation path is compared."""

    description = "fixed"
    width = 128

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
def workbench():
    recipe = load_recipe("shipped")
    torch.manual_seed(0)
    segmentation = SegmentationModel(recipe.model.segmentation)
    initialize_segmentation(segmentation)
    policy = build_tiny_policy(recipe.model.policy, ["the red circle"], 0)
    return TrainingState(
        policy, segmentation.eval(), nn.Module(), PolicyImageLimits(128**2, 128**2)
    )


def test_masks_are_those_of_the_exported_bundle(workbench, scenes, tmp_path):
    workbench.save_checkpoint(tmp_path / "checkpoint", "float32", {})
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").bundle
    bundle = open_bundle(bundle.path)
    stages = SegmentationGraphs(
        {
            name: open_graph(graph.runtime, bundle.graph_path(name), graph.spec, RunnerOptions())
            for name, graph in bundle.manifest.graphs.items()
        }
    )
    packer = QuestionPacker(workbench.policy.tokenizer, workbench.policy.prompt, 8)
    forward = PackedForward(workbench.policy.model, 128, torch.float32)
    judge = SceneEvaluator(workbench, scenes, forward, packer)
    states = np.random.default_rng(0).standard_normal((2, 128), dtype=np.float32)
    policy = FixedPolicy(states)
    with CoPRS(stages, policy, bundle.manifest.geometry) as coprs:
        for image in scenes.images[:2]:
            answer = coprs.segment(np.asarray(image), "anything", targets=2)
            with torch.no_grad():
                priors, masks = judge._segment(
                    [np.asarray(image)], torch.zeros(2, dtype=torch.int64), torch.from_numpy(states)
                )
            assert np.mean(masks != answer.masks) < 1e-3
            assert np.mean(priors != (answer.priors > 0)) < 1e-3


def test_fed_answers_are_compared_with_the_truth(workbench, scenes):
    packer = QuestionPacker(workbench.policy.tokenizer, workbench.policy.prompt, 8)
    forward = PackedForward(workbench.policy.model, 128, torch.float32)
    judge = SceneEvaluator(workbench, scenes, forward, packer)
    questions = held_out_questions(PLAIN, scenes, 4, 2)
    assert [q.question.kind == "none" for q in questions] == [False] * 4 + [True] * 2
    answers = judge.judge(questions, generates=False)
    assert all(a.is_exact and a.names_targets for a in answers)
    assert [a.num_found for a in answers] == [1] * 4 + [0] * 2
    figures = summarize(answers)
    assert figures["no_match_precision"] == figures["no_match_recall"] == 1
    assert figures["text_right"] == 1


def judged(kind="attribute", num_targets=1, num_found=1, mask_iou=0.0, prior_iou=0.0, right=False):
    return EvaluatedResponse(
        0, kind, "", "", False, right, num_targets, num_found, mask_iou, prior_iou, right
    )


def test_figures_on_answers_made_by_hand():
    figures = summarize(
        [
            judged(mask_iou=0.9, prior_iou=0.8, right=True),
            judged(mask_iou=0.4, prior_iou=0.3),
            judged("relation", num_found=0),
            judged("none", num_targets=0, num_found=0),
            judged("none", num_targets=0, num_found=1),
        ]
    )
    assert figures["mask_iou"] == pytest.approx(1.3 / 3)
    assert figures["precision_at_50"] == pytest.approx(1 / 3)
    assert figures["attribute.mask_iou"] == pytest.approx(0.65)
    assert figures["relation.right_object"] == 0
    assert figures["no_match_recall"] == pytest.approx(1 / 2)
    assert figures["no_match_precision"] == pytest.approx(1 / 2)
    assert figures["pearson_r"] > 0.99


def test_places_are_read_from_the_conclusion_only():
    text = "The red shape candidates are: at row1 col1 x. The target is at row3 col4, the x."
    assert named_places(text) == {"row3 col4"}
    assert named_places("The target is nowhere.") == set()


def test_a_missed_gate_is_shown():
    gates = {"mask_iou": {"wanted": 0.9, "found": 0.5, "passed": False}}
    phases = {"one": {"steps": 3, "seconds": 60.0, "gates": gates}}
    shown = page({"recipe": {"description": "x", "seed": 0}, "minutes": 1.0, "phases": phases})
    assert "| one | 3 | 1.0 | mask_iou | 0.9 | 0.5000 | **missed** |" in shown


def test_processes_share_a_batch_and_epochs_are_shuffled_afresh(scenes):
    source = SceneSource(PLAIN, scenes, seed=1)
    whole = source.indices(3, 4, 0, 1)
    halves = [source.indices(3, 4, rank, 2) for rank in range(2)]
    assert sorted(whole) == sorted(halves[0] + halves[1])
    epochs = [
        [i for step in range(3) for i in source.indices(3 * e + step, 2, 0, 1)] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    assert epochs[0] != epochs[1]
    assert source.questions(0, 5, 3, {}) == source.questions(0, 5, 3, {})


def test_attributes_are_numbered_within_their_sizes(scenes):
    source = SceneSource(PLAIN, scenes, seed=0)
    batch = source.batch(range(6))
    for column, size in enumerate(attribute_sizes(PLAIN)):
        assert batch.attributes[..., column].min() >= 0
        assert batch.attributes[..., column].max() < size
