"""Several requests in common passes of the decoder: what a batch run asks of a policy.

A pass with a few rows takes hardly longer than one with a single row, because it reads the weights
once. Requests on one image also share what the decoder has read of the prompt. Which requests are
read together depends on the requests alone, so that a repeated run computes the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.policy.greedy import (
    Feed,
    GreedyPolicy,
    GreedyResponse,
    Prefill,
    Steps,
    next_read,
)
from coprs_deploy.policy.openvino_policy.decoder import Decoder, DecoderRequest, NewRows
from coprs_deploy.policy.openvino_policy.graphs import VisionTower
from coprs_deploy.policy.openvino_policy.positions import common_prefix
from coprs_deploy.policy.policy import PolicyRequest, PolicyResult

MAX_SEQUENCES = 16
"""Responses that are decoded together."""

MAX_ATTENDED = 2048
"""Largest product of rows and columns of a pass over several images. Attention computes the columns
of all sequences for each row and throws away those of the others; of the demo model's passes over
4, 8 and 16 rows with 300 columns, one took 0.2 ms a row, as much as with 78 columns alone."""


class FittedImage(NamedTuple):
    """An image as the vision tower takes it.

    Attributes:
        image: RGB image within the pixel limits.
        key: hash of its content.
        grid: rows and columns of its patches.
    """

    image: Image.Image
    key: str
    grid: tuple[int, int]


class Prompt(NamedTuple):
    """A request as the graphs take it.

    Attributes:
        fitted: the image.
        token_ids: prompt.
        is_image: (L,) whether a token is a vision token.
        positions: (3, L) or (1, L).
    """

    fitted: FittedImage
    token_ids: list[int]
    is_image: NDArray[np.bool_]
    positions: NDArray[np.int64]

    def following(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the positions of ``count`` tokens behind the prompt, from the given one on."""
        return np.tile(start + np.arange(count), (len(self.positions), 1))

    def with_response(
        self, embed: Callable[[Sequence[int]], NDArray[np.float32]], vision_tokens: Any, tokens: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return embeddings and positions of the prompt and the beginning of a response."""
        embeddings = np.array(embed([*self.token_ids, *tokens]))
        embeddings[: len(self.token_ids)][self.is_image] = vision_tokens
        behind = self.following(int(self.positions.max()) + 1, len(tokens))
        return embeddings, np.concatenate([self.positions, behind], axis=1)


@dataclass
class _Member:
    """A request of a pack; see :class:`~coprs_deploy.policy.greedy.Decoding`.

    Attributes:
        index: number of the request.
        received: ``time.perf_counter()`` when it came.
        sequence: number of its sequence.
        next_position: position of the next token.
    """

    index: int
    request: PolicyRequest
    prompt: Prompt
    received: float
    sequence: int = 0
    num_cached_tokens: int = 0
    next_position: int = 0
    running: DecoderRequest | None = field(default=None, repr=False)

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens of the prompt."""
        return self.prompt.token_ids

    def drop(self, count: int) -> None:
        """Forget the last tokens that were read."""
        assert self.running is not None, "it is being decoded"
        self.next_position -= count
        self.running.drop(count, self.sequence)

    def new_rows(self, embeddings: NDArray[np.float32]) -> NewRows:
        """Return the next tokens as what is read, all with results."""
        count = len(embeddings)
        positions = self.prompt.following(self.next_position, count)
        self.next_position += count
        return NewRows(self.sequence, embeddings, positions, count)


def answer_together(
    policy: GreedyPolicy,
    prepare: Callable[[PolicyRequest], Prompt],
    vision: VisionTower,
    decoder: Decoder,
    requests: Sequence[PolicyRequest],
) -> Iterator[tuple[int, PolicyResult | Exception]]:
    """Answer requests in as few passes as pays; see :meth:`Policy.answer_together`."""
    members = []
    for index, request in enumerate(requests):
        received = time.perf_counter()
        try:
            members.append(_Member(index, request, prepare(request), received))
        except Exception as error:  # of any kind: it is the result of this request alone
            yield index, error
    for pack in _packs(members):
        yield from _Pack(policy, vision, decoder, pack).answer()


def _packs(members: Sequence[_Member]) -> Iterator[list[_Member]]:
    """Divide requests into those that are read together, images in the order of the first."""
    groups: dict[str, list[_Member]] = {}
    for member in members:
        groups.setdefault(member.prompt.fitted.key, []).append(member)
    pack: list[_Member] = []
    columns = 0
    for group in groups.values():
        for start in range(0, len(group), MAX_SEQUENCES):
            part = group[start : start + MAX_SEQUENCES]
            first = part[0].prompt_ids
            added = len(first) + sum(
                len(other.prompt_ids) - _shared(first, other.prompt_ids) for other in part[1:]
            )
            count = len(pack) + len(part)
            if pack and (count > MAX_SEQUENCES or count * (columns + added) > MAX_ATTENDED):
                yield pack
                pack, columns = [], 0
            pack += part
            columns += added
    if pack:
        yield pack


def _shared(first: list[int], other: list[int]) -> int:
    """Return how many tokens of a prompt need not be read after another prompt on its image."""
    return min(common_prefix(first, other), len(other) - 1)


class _Pack:
    """Requests that are read together."""

    def __init__(
        self,
        policy: GreedyPolicy,
        vision: VisionTower,
        decoder: Decoder,
        members: Sequence[_Member],
    ) -> None:
        self._policy, self._vision, self._decoder = policy, vision, decoder
        self._members = members
        self._responses: dict[int, GreedyResponse] = {}
        self._steps: dict[int, Steps] = {}
        self._reads: dict[int, Prefill | Feed] = {}
        self._done: list[tuple[int, PolicyResult | Exception]] = []

    def answer(self) -> Iterator[tuple[int, PolicyResult | Exception]]:
        """Yield number and result, or error, of each request when it is done."""
        with self._decoder.request(len(self._members)) as running:
            try:
                self._start(running)
                groups: dict[str, list[_Member]] = {}
                for sequence in self._reads:
                    member = self._members[sequence]
                    groups.setdefault(member.prompt.fitted.key, []).append(member)
                for group in groups.values():
                    self._prefill(running, group)
                yield from self._take_done()
                while self._reads:
                    self._feed(running)
                    yield from self._take_done()
            except Exception as error:  # of a pass: none of its requests has a result
                yield from self._take_done()
                for sequence in self._reads:
                    yield self._members[sequence].index, error

    def _start(self, running: DecoderRequest) -> None:
        for sequence, member in enumerate(self._members):
            member.sequence, member.running = sequence, running
            try:
                response = GreedyResponse(self._policy, member.request, member)
            except Exception as error:  # of any kind: it is the result of this request alone
                self._done.append((member.index, error))
                continue
            self._responses[sequence], self._steps[sequence] = response, response.steps()
            self._continue(sequence, None)

    def _prefill(self, running: DecoderRequest, group: Sequence[_Member]) -> None:
        """Read the prompts of one image."""
        first, start = group[0].prompt, running.num_columns
        vision_tokens = self._vision(first.fitted.image)
        parts = []
        for member in group:
            read = self._reads[member.sequence]
            assert isinstance(read, Prefill), "a response begins with its prompt"
            embeddings, positions = member.prompt.with_response(
                self._decoder.embed, vision_tokens, read.response
            )
            if member is not group[0]:
                member.num_cached_tokens = _shared(first.token_ids, member.prompt_ids)
                running.share(member.sequence, range(start, start + member.num_cached_tokens))
            new = slice(member.num_cached_tokens, None)
            parts.append(NewRows(member.sequence, embeddings[new], positions[:, new]))
            member.next_position = int(positions.max()) + 1
        results = running.read(parts)
        self._decoder.weights.release()
        for member, ((token,), hidden) in zip(group, results, strict=True):
            self._continue(member.sequence, (token, hidden[0]))

    def _feed(self, running: DecoderRequest) -> None:
        """Read the next tokens of all responses that go on."""
        sequences, parts = list(self._reads), []
        for sequence in sequences:
            read = self._reads[sequence]
            assert isinstance(read, Feed), "the prompt has been read"
            parts.append(self._members[sequence].new_rows(self._decoder.embed(read.tokens)))
        for sequence, result in zip(sequences, running.read(parts), strict=True):
            self._continue(sequence, result)

    def _continue(self, sequence: int, reply: Any) -> None:
        """Give a response what was read for it; note what it reads next, or that it is done."""
        member, response = self._members[sequence], self._responses[sequence]
        self._reads.pop(sequence, None)
        try:
            read = next_read(self._steps[sequence], reply)
            if read is not None:
                self._reads[sequence] = read
                return
            result = response.result(member.received, time.perf_counter())
        except Exception as error:  # of any kind: it is the result of this request alone
            self._done.append((member.index, error))
        else:
            self._done.append((member.index, result))

    def _take_done(self) -> Iterator[tuple[int, PolicyResult | Exception]]:
        done, self._done = self._done, []
        yield from done
