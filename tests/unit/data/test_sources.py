"""Sources of examples for evaluation."""

import pytest

from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.sources import open_examples
from coprs_deploy.data.synthetic import HELD_OUT_SEED, PRESETS, SceneExamples


@pytest.fixture(scope="module")
def dataset():
    return open_examples("synthetic:full", 6, 2)


def test_synthetic_source_has_examples_with_a_target_then_no_match_examples(dataset):
    counts = [len(example.masks) for example in dataset.examples]
    assert all(counts[:6])
    assert counts[6:] == [0, 0]
    assert dataset.max_targets == PRESETS["full"].max_targets
    assert dataset.examples[0].id == f"full-{HELD_OUT_SEED}"
    assert dataset.description == "6 held-out full scenes and 2 no-match scenes"


def test_synthetic_source_with_first_seed_starts_there(dataset):
    others = open_examples("synthetic:full", 2, 1, first_seed=5)
    assert [e.id for e in others.examples] == [f"full-{HELD_OUT_SEED + n}" for n in (5, 6, 7)]
    assert others.examples[0].instruction == dataset.examples[5].instruction
    assert others.description.endswith("first seed 5")


def test_file_source_is_opened_whole_or_in_part(tmp_path):
    path = tmp_path / "some.jsonl"
    write_examples(path, SceneExamples(PRESETS["plain"], 4))
    assert len(open_examples(path).examples) == 4
    part = open_examples(str(path), 3)
    assert len(part.examples) == 3
    assert part.description == "3 examples of some.jsonl"


def test_file_source_without_valid_examples_is_refused(tmp_path):
    path = tmp_path / "none.jsonl"
    write_examples(path, [])
    with pytest.raises(ValueError, match="has no valid example"):
        open_examples(path)


@pytest.mark.parametrize(
    ("source", "num_examples", "num_no_match", "first_seed", "message"),
    [
        ("synthetic:plane", 4, 0, 0, "preset is 'plane'; accepted: plain, full"),
        ("synthetic:plain", 0, 0, 0, "num_examples is 0"),
        ("synthetic:plain", 4, -1, 0, "num_no_match is -1"),
        ("synthetic:plain", 4, 0, -1, "first_seed is -1"),
    ],
)
def test_invalid_source_options_are_refused(
    source, num_examples, num_no_match, first_seed, message
):
    with pytest.raises(ValueError, match=message):
        open_examples(source, num_examples, num_no_match, first_seed)
