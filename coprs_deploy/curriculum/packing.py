"""Packing: several questions in one row of tokens, behind one image.

The prefix up to the image is computed once. Each question with its response attends to the prefix
and to itself, but to no other question, and its positions continue from the image, so that every
token has the hidden state of an unpacked row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from coprs_deploy.prompts import REFERENCE_TOKEN, PromptTemplate, encode_prompt
from coprs_deploy.training.losses import IGNORED_LABEL

InstructionResponse: TypeAlias = tuple[str, str | Sequence[int]]
"""An instruction, and its response as text or as token ids."""

PREFIX_BLOCK = 0
"""Block number of the tokens up to the image; questions are numbered from 1."""

PADDING_BLOCK = -1
"""Block number of padding."""


class PackedRows(NamedTuple):
    """Rows of packed tokens, one row per image.

    Attributes:
        input_ids: int64 (B, L).
        positions: int64 (3, B, L), time, row and column for the rotary embedding.
        blocks: int64 (B, L), block number of each token.
        labels: int64 (B, L), next token, or ``IGNORED_LABEL``.
        references: int64 (N, 2), row and column of each ``<REF_POS>``.
        sources: int64 (N, 2), row and question of each ``<REF_POS>``.
    """

    input_ids: Tensor
    positions: Tensor
    blocks: Tensor
    labels: Tensor
    references: Tensor
    sources: Tensor


def attention_bias(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention bias of packed rows: tokens attend to earlier ones of the prefix and their block.

    Args:
        blocks: int64 (B, L), block number of each token.
        dtype: dtype of the result.

    Returns:
        (B, 1, L, L), 0 where the row's token attends to the column's, -1e4 elsewhere.
    """
    length = blocks.shape[1]
    shared = (blocks[:, None, :] == PREFIX_BLOCK) | (blocks[:, None, :] == blocks[:, :, None])
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
        self, questions: Sequence[Sequence[InstructionResponse]], length: int | None = None
    ) -> PackedRows:
        """Pack pairs of instruction and response.

        Args:
            questions: pairs of each image; a complete response, text or token ids, ends with the
                end token.
            length: length L of a row; questions that do not fit are dropped. None takes the
                longest row.
        """
        rows = [self._tokenize(pairs, length) for pairs in questions]
        num_prefix = len(self.prefix)
        longest = num_prefix + max(sum(len(tokens) for _, tokens, _ in row) for row in rows)
        shape = (len(rows), length or longest)
        ids = np.full(shape, self._tokenizer.pad_token_id)
        labels = np.full(shape, IGNORED_LABEL)
        blocks = np.full(shape, PADDING_BLOCK)
        positions = np.zeros((3, *shape), np.int64)
        ids[:, :num_prefix] = self.prefix
        blocks[:, :num_prefix] = PREFIX_BLOCK
        positions[:, :, :num_prefix] = self._prefix_positions[:, None]
        for index, row in enumerate(rows):
            start = num_prefix
            for block, tokens, num_prompt in row:
                stop = start + len(tokens)
                ids[index, start:stop] = tokens
                labels[index, start + num_prompt - 1 : stop - 1] = tokens[num_prompt:]
                blocks[index, start:stop] = block
                positions[:, index, start:stop] = self._next_position + np.arange(len(tokens))
                start = stop
        references = np.argwhere(ids == self.reference_id)
        sources = np.stack([references[:, 0], blocks[*references.T] - 1], axis=1)
        arrays = (ids, positions, blocks, labels, references, sources)
        return PackedRows(*map(torch.from_numpy, arrays))

    def encode_prompt(self, instruction: str) -> list[int]:
        """Encode a whole prompt, image tokens included."""
        return encode_prompt(self._template, self._tokenizer, instruction, self._num_image_tokens)

    def _tokenize(
        self, pairs: Sequence[InstructionResponse], length: int | None
    ) -> list[tuple[int, list[int], int]]:
        """Return block number, tokens and size of the prompt of each question that fits."""
        tokenized, left = [], math.inf if length is None else length - len(self.prefix)
        for block, (instruction, response) in enumerate(pairs, start=1):
            prompt = self.encode_prompt(instruction)[len(self.prefix) :]
            is_text = isinstance(response, str)
            ids = [*prompt, *(self._tokenizer(response)["input_ids"] if is_text else response)]
            if len(ids) <= left:
                tokenized.append((block, ids, len(prompt)))
                left -= len(ids)
        return tokenized
