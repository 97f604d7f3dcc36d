"""The decoder of a policy in OpenVINO: one inference request reads one sequence, or several.

The cache of a request has the rows of all its sequences in the order in which they were read. A
mask lets each sequence attend to its own rows, and to a prefix that it shares with another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.engines.mapped_weights import MappedWeights
from coprs_deploy.engines.openvino_runner import compile_file
from coprs_deploy.policy.fair_lock import FairLock
from coprs_deploy.policy.openvino_policy.graphs import (
    DECODER_FILE,
    EmbeddingTable,
    decoder_tensors,
)
from coprs_deploy.policy.openvino_policy.positions import MASKED

MAX_IDLE_REQUESTS = 8
"""Inference requests that are kept for later; each holds the keys and values that it has read."""

ROWS, MASK = "rows", "attention_mask"
"""Inputs that :func:`add_inputs` adds: (R,) rows to return, and the (1, 1, L, C) mask that is added
to the attention logits of L rows to C cached and new ones."""

FIRST_COLUMNS = 512
"""Columns of a new table of what each sequence attends to; it grows by doubling."""


def add_inputs(graph: Any) -> None:
    """Let a decoder graph, which returns its last row, take ``ROWS`` and ``MASK`` as inputs.

    Raises:
        ValueError: the graph does not select a row, or has no attention with a mask.
    """
    from openvino import opset13 as ops

    def rank(port: Any) -> int:
        shape = port.get_partial_shape()
        return len(shape) if shape.rank.is_static else 0

    nodes = graph.get_ops()
    # The last row is taken of (1, L, D), D being known; LLaVA's positions are taken of (1, 1, L).
    found = [
        node
        for node in nodes
        if node.get_type_name() == "Gather"
        and rank(node.input(0)) == 3
        and rank(node.output(0)) == 2
        and node.output(0).get_partial_shape()[1].is_static
    ]
    if len(found) != 1:
        raise ValueError(f"{DECODER_FILE} selects rows {len(found)} times; accepted: once")
    attentions = [node for node in nodes if node.get_type_name() == "ScaledDotProductAttention"]
    if not attentions or any(node.get_input_size() < 4 for node in attentions):
        raise ValueError(f"{DECODER_FILE} has no attention with a mask")
    rows = ops.parameter([-1], np.int64, name=ROWS)
    mask = ops.parameter([1, 1, -1, -1], np.float32, name=MASK)
    for parameter, name in ((rows, ROWS), (mask, MASK)):
        parameter.output(0).get_tensor().set_names({name})
    selected = ops.gather(found[0].input_value(0), rows, ops.constant(np.array(1)))
    without_batch = ops.squeeze(selected, ops.constant(np.array([0])))
    for user in found[0].output(0).get_target_inputs():
        user.replace_source_output(without_batch.output(0))
    for node in attentions:
        node.input(3).replace_source_output(mask.output(0))
    graph.add_parameters([rows, mask])
    graph.validate_nodes_and_infer_types()


class Decoder:
    """Embedding table and decoder graph; each request in progress has keys and values of its own.

    Args:
        path: directory of the graphs.
        settings: properties of OpenVINO.

    Attributes:
        embed: embedding table.
        weights: file of the decoder's weights, which OpenVINO packs with the first request.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.embed = EmbeddingTable(path)
        self._compiled = compile_file(path / DECODER_FILE, settings, change=add_inputs)
        self.weights = MappedWeights((path / DECODER_FILE).with_suffix(".bin"))
        self._idle: deque[Any] = deque(maxlen=MAX_IDLE_REQUESTS)  # its append and pop are atomic
        self._lock = FairLock()

    @contextmanager
    def request(
        self, num_sequences: int = 1, remaining_s: Callable[[], float | None] = lambda: None
    ) -> Iterator[DecoderRequest]:
        """Lend an inference request with an empty cache for some sequences.

        Args:
            num_sequences: number of sequences.
            remaining_s: how long a pass may wait for those of others; see :meth:`FairLock.hold`.
        """
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        request.reset_state()
        try:
            yield DecoderRequest(request, partial(self._lock.hold, remaining_s), num_sequences)
        finally:
            self._idle.append(request)


class NewRows(NamedTuple):
    """What a sequence reads in a pass.

    Attributes:
        sequence: number of the sequence.
        embeddings: (L, D).
        positions: (3, L) or (1, L).
        num_rows: number R of rows at the end to return something of.
    """

    sequence: int
    embeddings: NDArray[np.float32]
    positions: NDArray[np.int64]
    num_rows: int = 1


RowResults = tuple[list[int], NDArray[np.float32]]
"""Most likely token after each of R rows, and their (R, D) post-norm hidden states."""


class DecoderRequest:
    """One inference request of the decoder, with the keys and values of what it has read.

    Args:
        request: inference request of OpenVINO.
        turn: waits until no other request runs, for the length of a block.
        num_sequences: number of sequences.
    """

    def __init__(
        self, request: Any, turn: Callable[[], AbstractContextManager[None]], num_sequences: int
    ) -> None:
        self._request = request
        self._turn = turn
        self._attended = np.zeros((num_sequences, FIRST_COLUMNS), dtype=np.bool_)
        self._num_columns = 0

    @property
    def num_columns(self) -> int:
        """Number of rows that have been read, of all sequences."""
        return self._num_columns

    def feed(
        self, embeddings: NDArray[np.float32], positions: NDArray[np.int64], num_rows: int
    ) -> RowResults:
        """Read rows of the only sequence; see :meth:`read`.

        Args:
            embeddings: (L, D).
            positions: (3, L) or (1, L).
            num_rows: number R of rows at the end to return something of.
        """
        return self.read([NewRows(0, embeddings, positions, num_rows)])[0]

    def read(self, parts: Sequence[NewRows]) -> list[RowResults]:
        """Read rows of several sequences in one pass.

        Other requests run between two calls, in the order in which they wait, not during one.

        Args:
            parts: rows of each sequence, in the order in which they are kept.

        Returns:
            What follows the last R rows of each part.
        """
        counts = [len(part.embeddings) for part in parts]
        ends = np.cumsum(counts)
        rows = [np.arange(end - p.num_rows, end) for p, end in zip(parts, ends, strict=True)]
        inputs = decoder_tensors(
            np.concatenate([part.embeddings for part in parts]),
            np.concatenate([part.positions for part in parts], axis=1),
        )
        inputs |= {ROWS: np.concatenate(rows), MASK: self._extend(parts, counts)[None, None]}
        with self._turn():
            outputs = self._request.infer(inputs, share_inputs=True)
            tokens: list[int] = outputs["logits"].argmax(-1).tolist()
            hidden: NDArray[np.float32] = outputs["hidden"].copy()
        found, start = [], 0
        for part in parts:
            end = start + part.num_rows
            found.append((tokens[start:end], hidden[start:end]))
            start = end
        return found

    def share(self, sequence: int, columns: range) -> None:
        """Let a sequence attend to columns that another one has read, or reads in the next pass."""
        self._reserve(columns.stop)
        self._attended[sequence, columns.start : columns.stop] = True

    def drop(self, count: int, sequence: int = 0) -> None:
        """Forget the last rows of a sequence: it no longer attends to them."""
        own = self._attended[sequence]
        own[np.flatnonzero(own)[-count:]] = False

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Copy the keys and values, (1, heads, L, d) each."""
        return {s.name: np.array(s.state.data) for s in self._request.query_state()}

    def restore(self, state: dict[str, NDArray[np.float32]], length: int) -> None:
        """Take over the keys and values of the first ``length`` rows of another request."""
        import openvino

        for variable in self._request.query_state():
            rows = np.ascontiguousarray(state[variable.name][:, :, :length])
            variable.state = openvino.Tensor(rows)
        self._reserve(length)
        self._attended[0] = np.arange(self._attended.shape[1]) < length
        self._num_columns = length

    def _extend(self, parts: Sequence[NewRows], counts: Sequence[int]) -> NDArray[np.float32]:
        """Add the columns of new rows; return the (L, C) mask of a pass over them."""
        end = self._num_columns + sum(counts)
        self._reserve(end)
        start = self._num_columns
        for part, count in zip(parts, counts, strict=True):
            self._attended[part.sequence, start : start + count] = True
            start += count
        owners = np.repeat([part.sequence for part in parts], counts)
        mask = np.where(self._attended[owners, :end], np.float32(0), np.float32(MASKED))
        row = 0
        for count in counts:
            if count > 1:  # no row attends to a later one
                column = self._num_columns + row
                later = np.triu_indices(count, 1)
                mask[row : row + count, column : column + count][later] = MASKED
            row += count
        self._num_columns = end
        return mask

    def _reserve(self, columns: int) -> None:
        while columns > self._attended.shape[1]:
            self._attended = np.concatenate([self._attended, np.zeros_like(self._attended)], axis=1)
