"""Truncated reasoning: where it is, what is kept, and what is forced."""

import pytest

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.training.state import state_from_checkpoint
from coprs_deploy.training.truncation import ReasoningTruncator, truncation_generator

RESPONSE = "<think>The star is at row2 col3.</think> <REF_POS>"


class LetterTokenizer:
    """A tokenizer with a token per pair of letters, so that the marks have no tokens of their own.

    Token 0 is the end of a text, token 1 is ``<REF_POS>``.
    """

    eos_token_id = 0

    def __init__(self):
        self.pieces = ["<end>", "<REF_POS>"]

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        ids = []
        for part in text.replace("<REF_POS>", "\0<REF_POS>\0").split("\0"):
            size = len(part) if part == "<REF_POS>" else 2
            ids += [self._number(part[i : i + size]) for i in range(0, len(part), size or 1)]
        return {"input_ids": ids}

    def _number(self, piece):
        if piece not in self.pieces:
            self.pieces.append(piece)
        return self.pieces.index(piece)

    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens
        return "".join(self.pieces[token] for token in ids)


@pytest.fixture(scope="module")
def template():
    return read_checkpoint(CHECKPOINT).config.prompt


@pytest.fixture
def letters(template):
    tokenizer = LetterTokenizer()
    return tokenizer, ReasoningTruncator(tokenizer, template)


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("<think>abcd</think> <REF_POS>", "bc"),  # tokens <t hi nk >a bc d< /t hi nk
        (" <think>abcde</think><REF_POS>", "abcd"),
        ("<think></think> <REF_POS>", ""),
        ("no reasoning <REF_POS>", ""),
        ("<think>without an end", "ithout an end"),
    ],
)
def test_columns_of_marks_that_are_split_into_tokens(letters, text, reasoning):
    tokenizer, truncator = letters
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    columns = truncator.columns(ids)
    found = tokenizer.decode(ids[columns.start : columns.stop], skip_special_tokens=False)
    assert found == reasoning, "a token with a part of a mark belongs to the mark"
    assert truncator.columns([*ids, tokenizer.eos_token_id]) == columns
    assert truncator.columns([]) == range(0)


def test_truncate_keeps_a_beginning_and_forces_the_tail(template):
    tokenizer = state_from_checkpoint(read_checkpoint(CHECKPOINT)).policy.tokenizer
    truncator = ReasoningTruncator(tokenizer, template)
    ids = [*tokenizer(RESPONSE)["input_ids"], tokenizer.eos_token_id]
    whole = len(truncator.columns(ids))
    assert truncator.truncate(ids, whole, 1) == (ids, len(ids))
    cut = truncator.truncate(ids, 3, 1)
    assert tokenizer.decode(cut.ids) == "<think>The star is</think> <REF_POS><|im_end|>"
    assert cut.ids[: cut.num_kept] == ids[: cut.num_kept]
    assert tokenizer.decode(cut.ids[cut.num_kept :]) == "</think> <REF_POS><|im_end|>"
    two = truncator.truncate(ids[:6], 0, 2)
    assert tokenizer.decode(two.ids) == "<think></think> <REF_POS> <REF_POS><|im_end|>"


def test_truncation_generator_depends_on_the_seed_alone():
    drawn = [truncation_generator(0.5, 3, n) for n in range(400)]
    assert 150 < sum(each is not None for each in drawn) < 250
    again = [truncation_generator(0.5, 3, n) for n in range(400)]
    assert [g and g.random() for g in drawn] == [g and g.random() for g in again]
    assert truncation_generator(0.0, 3, 0) is None
    assert all(truncation_generator(1.0, 3, n) is not None for n in range(20))
