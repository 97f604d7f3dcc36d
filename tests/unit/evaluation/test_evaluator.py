"""Examples against answers made by hand, and what an evaluation leaves behind."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.sources import choose_examples
from coprs_deploy.data.synthetic import HELD_OUT_SEED, PRESETS, SceneExamples
from coprs_deploy.evaluation.evaluator import score_examples
from coprs_deploy.evaluation.metrics import summarize
from coprs_deploy.evaluation.report import write_evaluation


def perfect(examples):
    """Answer with the truth; the prior is the mask without its first row."""
    by_instruction = {example.instruction: example for example in examples}

    def answer(image, instruction, max_targets):
        masks = by_instruction[instruction].masks
        assert len(masks) <= max_targets
        prior_logits = np.where(masks, 3.0, -3.0).astype(np.float32)
        return SimpleNamespace(masks=masks, prior_logits=prior_logits, response="said")

    return answer


@pytest.fixture(scope="module")
def chosen():
    return choose_examples(None, "full", 6, 2)


def test_held_out_scenes_ask_with_and_without_an_answer(chosen):
    counts = [len(example.masks) for example in chosen.examples]
    assert all(counts[:6])
    assert counts[6:] == [0, 0]
    assert chosen.max_targets == PRESETS["full"].max_targets
    assert chosen.examples[0].id == f"full-{HELD_OUT_SEED}"
    assert "6 held-out full scenes" in chosen.description


def test_other_held_out_scenes_are_taken_by_their_seed(chosen):
    others = choose_examples(None, "full", 2, 1, first_seed=5)
    assert [e.id for e in others.examples] == [f"full-{HELD_OUT_SEED + n}" for n in (5, 6, 7)]
    assert others.examples[0].instruction == chosen.examples[5].instruction
    assert others.description.endswith("from seed 5 on")


def test_a_perfect_answer_has_perfect_figures(chosen, tmp_path):
    scored = list(score_examples(perfect(chosen.examples), chosen.examples, chosen.max_targets))
    figures = summarize([answer.score for answer in scored])
    assert figures["mask_iou"] == figures["prior_iou"] == figures["ciou"] == 1
    assert figures["no_match_recall"] == figures["no_match_precision"] == 1
    write_evaluation(tmp_path, chosen.description, scored)
    page = (tmp_path / "report.md").read_text()
    assert "| mask iou | 1.0000 |" in page
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert json.loads(lines[0])["mask_iou"] == 1
    assert (tmp_path / "prior_against_mask.png").is_file()


def test_a_file_of_examples_is_taken_whole_or_in_part(tmp_path):
    path = tmp_path / "some.jsonl"
    write_examples(path, SceneExamples(PRESETS["plain"], 4))
    assert len(choose_examples(path, "plain", None, 9).examples) == 4
    assert len(choose_examples(path, "plain", 3, 9).examples) == 3


@pytest.mark.parametrize(
    ("tier", "count", "absent", "first_seed", "message"),
    [
        ("plane", 4, 0, 0, "accepted: plain, full"),
        ("plain", 0, 0, 0, "--count is 0"),
        ("plain", 4, -1, 0, "--absent is -1"),
        ("plain", 4, 0, -1, "--first-seed is -1"),
    ],
)
def test_wrong_choices_are_refused(tier, count, absent, first_seed, message):
    with pytest.raises(ValueError, match=message):
        choose_examples(None, tier, count, absent, first_seed)
