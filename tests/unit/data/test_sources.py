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


def test_source_counts_question_types_and_no_match_examples(tmp_path, dataset):
    assert len(dataset.question_types) == 6 and "none" not in dataset.question_types
    assert dataset.num_no_match == 2
    path = tmp_path / "some.parquet"
    write_examples(path, dataset.examples)
    file = open_examples(path)
    assert (file.question_types, file.num_no_match) == (dataset.question_types, 2)
    assert file.max_targets == max(len(example.masks) for example in dataset.examples)
    assert "skipped_rows" not in dataset.to_json()
    assert file.to_json()["skipped_rows"] == []


def test_file_source_names_the_number_of_skipped_rows(tmp_path):
    path = tmp_path / "some.jsonl"
    write_examples(path, SceneExamples(PRESETS["plain"], 2))
    path.write_text("{}\n" + path.read_text())
    with pytest.warns(UserWarning, match="row 1, column id"):
        file = open_examples(path)
    assert file.description == "2 examples of some.jsonl, 1 skipped"


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
