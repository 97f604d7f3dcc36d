"""Packing: several questions in one row of tokens, behind one image.

The prefix up to the image is computed once. Each question with its response attends to the prefix
and to itself, but to no other question, and its positions continue from the image, so that every
token has the hidden state of an unpacked row.

A question may have truncations: what follows the reasoning, once more, behind the reasoning's first
tokens alone. Their few tokens stand behind the response and attend to its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from coprs_deploy.prompts import REFERENCE_TOKEN, PromptTemplate, encode_prompt
from coprs_deploy.training.losses import IGNORED_LABEL
from coprs_deploy.training.truncation import ReasoningTruncator

InstructionResponse: TypeAlias = tuple[str, str | Sequence[int]]
"""An instruction, and its response as text or as token ids."""

PREFIX_BLOCK = 0
"""Block number of the tokens up to the image; questions are numbered from 1."""

PADDING_BLOCK = -1
"""Block number of padding."""

COMPLETE = 0
"""Truncation of tokens that belong to the prefix, or to a question with its complete response."""


class PackedRows(NamedTuple):
    """Rows of packed tokens, one row per image.

    Attributes:
        input_ids: int64 (B, L).
        positions: int64 (3, B, L), time, row and column for the rotary embedding.
        blocks: int64 (B, L), block number of each token.
        truncations: int64 (B, L), position of the first token of the truncation that a token
            belongs to, which no other truncation of its question has; ``COMPLETE`` for none.
        labels: int64 (B, L), next token, or ``IGNORED_LABEL``.
        references: int64 (N, 2), row and column of each ``<REF_POS>``.
        sources: int64 (N, 3), row, question and truncation of each ``<REF_POS>``.
    """

    input_ids: Tensor
    positions: Tensor
    blocks: Tensor
    truncations: Tensor
    labels: Tensor
    references: Tensor
    sources: Tensor


class _Question(NamedTuple):
    """Tokens of a question that fits, and columns in them.

    Attributes:
        block: block number.
        tokens: token ids of the prompt behind the image and of the response.
        start: column of the first token of the response.
        tail: column of the end of the reasoning.
        cuts: columns at which the reasoning is truncated.
    """

    block: int
    tokens: list[int]
    start: int
    tail: int
    cuts: list[int]

    @property
    def length(self) -> int:
        """Number of tokens, those of the truncations included."""
        return len(self.tokens) + len(self.cuts) * (len(self.tokens) - 1 - self.tail)


def attention_bias(rows: PackedRows, dtype: torch.dtype) -> Tensor:
    """Attention bias of packed rows: tokens attend to earlier ones of the prefix and their block.

    Tokens of a truncation attend to its own tokens, and to those of the complete response before
    its position.

    Args:
        rows: packed rows.
        dtype: dtype of the result.

    Returns:
        (B, 1, L, L), 0 where the row's token attends to the column's, -1e4 elsewhere.
    """
    blocks, truncations, length = rows.blocks, rows.truncations, rows.blocks.shape[1]
    other = truncations[:, None, :] != truncations[:, :, None]
    is_before = rows.positions[0][:, None, :] < truncations[:, :, None]
    hidden = other & ((truncations[:, None, :] != COMPLETE) | ~is_before)
    of_question = (blocks[:, None, :] == blocks[:, :, None]) & ~hidden
    shared = (blocks[:, None, :] == PREFIX_BLOCK) | of_question
    earlier = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    bias = torch.zeros(shared.shape, dtype=dtype, device=blocks.device)
    return bias.masked_fill_(~(shared & earlier), -1e4)[:, None]


class QuestionPacker:
    """Packs questions behind an image for one tokenizer, prompt and image grid.

    Args:
        tokenizer: tokenizer of the policy.
        template: prompt template with the instruction behind the image.
        grid_size: image tokens along one side.

    Attributes:
        image_start: column of the first image token.
        image_stop: column behind the last image token.
        prefix: token ids up to the last image token.
        reference_id: token id of ``<REF_POS>``.
    """

    def __init__(self, tokenizer: Any, template: PromptTemplate, grid_size: int) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.grid_size = grid_size
        self._num_image_tokens = grid_size**2
        image_id = tokenizer.convert_tokens_to_ids(template.image_token)
        self.reference_id: int = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
        self._truncator = ReasoningTruncator(tokenizer, template)
        whole = encode_prompt(template, tokenizer, "x", self._num_image_tokens)
        self.image_start = whole.index(image_id)
        self.image_stop = self.image_start + self._num_image_tokens
        self.prefix = whole[: self.image_stop]
        start, cells = self.image_start, np.arange(self._num_image_tokens)
        text = np.tile(np.arange(start), (3, 1))
        image = start + np.stack([0 * cells, cells // grid_size, cells % grid_size])
        self._prefix_positions = np.concatenate([text, image], axis=1)
        self._next_position = start + grid_size

    def prefix_rows(self, num_rows: int) -> PackedRows:
        """Return rows of the prefix alone."""
        return self.pack([[] for _ in range(num_rows)], len(self.prefix))

    def pack(
        self,
        questions: Sequence[Sequence[InstructionResponse]],
        length: int | None = None,
        truncations: Sequence[Sequence[Collection[int]]] = (),
    ) -> PackedRows:
        """Pack pairs of instruction and response.

        Args:
            questions: pairs of each image; a complete response, text or token ids, ends with the
                end token.
            length: length L of a row; questions that do not fit are dropped. None takes the
                longest row.
            truncations: numbers of tokens of the reasoning that the truncations of each question
                keep, image by image; empty for none. The response has reasoning then.
        """
        kept = truncations or [[()] * len(pairs) for pairs in questions]
        rows = [self._tokenize(*each, length) for each in zip(questions, kept, strict=True)]
        num_prefix = len(self.prefix)
        longest = num_prefix + max(sum(question.length for question in row) for row in rows)
        shape = (len(rows), length or longest)
        ids = np.full(shape, self._tokenizer.pad_token_id)
        labels = np.full(shape, IGNORED_LABEL)
        blocks = np.full(shape, PADDING_BLOCK)
        truncated = np.full(shape, COMPLETE)
        positions = np.zeros((3, *shape), np.int64)
        ids[:, :num_prefix] = self.prefix
        blocks[:, :num_prefix] = PREFIX_BLOCK
        positions[:, :, :num_prefix] = self._prefix_positions[:, None]
        for index, row in enumerate(rows):
            column = num_prefix
            for block, tokens, start, tail, cuts in row:
                end = column + len(tokens)
                ids[index, column:end] = tokens
                labels[index, column + start - 1 : end - 1] = tokens[start:]
                positions[:, index, column:end] = self._next_position + np.arange(len(tokens))
                for cut in cuts:
                    first, begin, end = self._next_position + cut, end, end + len(tokens) - 1 - tail
                    ids[index, begin:end] = tokens[tail:-1]
                    labels[index, begin:end] = tokens[tail + 1 :]
                    positions[:, index, begin:end] = first + np.arange(end - begin)
                    truncated[index, begin:end] = first
                blocks[index, column:end] = block
                column = end
        references = np.argwhere(ids == self.reference_id)
        at = tuple(references.T)
        sources = np.stack([references[:, 0], blocks[at] - 1, truncated[at]], axis=1)
        arrays = (ids, positions, blocks, truncated, labels, references, sources)
        return PackedRows(*map(torch.from_numpy, arrays))

    def encode_prompt(self, instruction: str) -> list[int]:
        """Encode a whole prompt, image tokens included."""
        return encode_prompt(self._template, self._tokenizer, instruction, self._num_image_tokens)

    def encode_response(self, response: str | Sequence[int]) -> list[int]:
        """Encode a response; token ids are those of an encoded one."""
        is_text = isinstance(response, str)
        return list(self._tokenizer(response)["input_ids"] if is_text else response)

    def reasoning_columns(self, response: Sequence[int]) -> range:
        """Return the columns of the reasoning in an encoded response."""
        return self._truncator.columns(response)

    def _tokenize(
        self,
        pairs: Sequence[InstructionResponse],
        kept: Sequence[Collection[int]],
        length: int | None,
    ) -> list[_Question]:
        """Tokenize the questions that fit."""
        tokenized, left = [], math.inf if length is None else length - len(self.prefix)
        for block, ((instruction, text), counts) in enumerate(zip(pairs, kept, strict=True), 1):
            prompt = self.encode_prompt(instruction)[len(self.prefix) :]
            response = self.encode_response(text)
            reasoning = self.reasoning_columns(response)
            assert all(count in range(len(reasoning)) for count in counts)
            start = len(prompt) + reasoning.start
            question = _Question(
                block,
                [*prompt, *response],
                len(prompt),
                len(prompt) + reasoning.stop,
                [start + count for count in sorted(set(counts))],
            )
            if question.length <= left:
                tokenized.append(question)
                left -= question.length
        return tokenized
