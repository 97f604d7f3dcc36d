"""Capture of the hidden state of ``<REF_POS>`` inside vLLM's own decoding pass.

This module runs in vLLM's worker process. A step of the engine turns post-norm rows into logits;
the row of the step whose *input* token is ``<REF_POS>`` is the concentration. Two parts of vLLM's
public plug-in interface meet here: the model keeps the rows (:mod:`.models`), and a logits
processor knows which row belongs to which request and what that request wrote last. It appends the
vector to the file that the request names in ``SamplingParams.extra_args`` (:mod:`.vector_files`):
rows that move within the batch, and ids that change on their way, cannot mix requests up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from coprs_deploy.policy.vllm_policy.transport import append_vector

EXTRA_ARGUMENT = "coprs_deploy"
"""The key of a capture order in ``SamplingParams.extra_args``."""


@dataclass(frozen=True)
class CaptureRequest:
    """What is captured for one request, and when its answer is made to end.

    Attributes:
        path: file that the vectors are appended to; no other request ever has it.
        reference_id: ``<REF_POS>``.
        stop_id: the token that is forced when the answer must end; one of ``stop_token_ids``.
        targets: end after this many ``<REF_POS>`` have been read.
        budget: end after this many tokens; a ``<REF_POS>`` in the last place is still read.
    """

    path: str
    reference_id: int
    stop_id: int
    targets: int
    budget: int

    def extra_args(self) -> dict[str, Any]:
        """The order as ``SamplingParams.extra_args``."""
        return {EXTRA_ARGUMENT: asdict(self)}

    @classmethod
    def of(cls, params: Any) -> CaptureRequest | None:
        """Read the order of a request; None for one that was not made by this package."""
        found: Mapping[str, Any] | None = (params.extra_args or {}).get(EXTRA_ARGUMENT)
        return cls(**found) if found is not None else None


class Step:
    """What the model leaves for the logits processor in the same step.

    Attributes:
        rows: (R, D) post-norm rows, one for each row of the step's logits.
    """

    rows: torch.Tensor | None = None


STEP = Step()
"""Shared by the model and the logits processor of this process."""


class HiddenStateCapture(LogitsProcessor):  # type: ignore[misc]  # vLLM may be absent
    """Captures rows and ends answers; leaves requests without a :class:`CaptureRequest` alone."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse sampling parameters under which a ``<REF_POS>`` would stay unread.

        Raises:
            ValueError: names the parameter.
        """
        order = CaptureRequest.of(sampling_params)
        if order is None:
            return
        stops = sampling_params.stop_token_ids or []
        if sampling_params.min_tokens or sampling_params.ignore_eos:
            raise ValueError("min_tokens and ignore_eos would keep an answer from its end")
        if order.stop_id not in stops or order.reference_id in stops:
            raise ValueError(
                f"stop_token_ids is {stops}; it must hold {order.stop_id} and not <REF_POS> "
                f"({order.reference_id}), which is read before an answer ends"
            )
        if sampling_params.max_tokens <= order.budget:
            raise ValueError(
                f"max_tokens is {sampling_params.max_tokens}; it must be above the budget of "
                f"{order.budget}, so that a <REF_POS> in the last place is read"
            )

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "speculative decoding is on; <REF_POS> can only be captured without it"
            )
        self._batch: dict[int, tuple[CaptureRequest, list[int]]] = {}
        self._hands_over = is_first_rank()  # the others hold the same vectors

    def is_argmax_invariant(self) -> bool:
        """Forcing an end changes what greedy decoding takes."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow requests as they join, leave and move within the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._batch.pop(row, None)
        for row, params, _, response in batch_update.added:
            self._batch.pop(row, None)
            if (order := CaptureRequest.of(params)) is not None:
                self._batch[row] = (order, response)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._batch.pop(source, None), self._batch.pop(target, None)
            if moved is not None:
                self._batch[target] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self._batch[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Capture the rows that read a ``<REF_POS>``, and force the end where it is due.

        Args:
            logits: (R, V), changed in place.
        """
        read = {
            row: (order.path, len(response) - 1)
            for row, (order, response) in self._batch.items()
            if self.reads_reference(order, response)
        }
        if read and self._hands_over:
            # All rows in one copy: it waits for the device.
            vectors = torch.stack([self.row_of(row, logits) for row in read]).float().cpu().numpy()
            for (path, position), vector in zip(read.values(), vectors, strict=True):
                append_vector(path, position, vector)
        for row, (order, response) in self._batch.items():
            if len(response) >= order.budget or (
                row in read and response.count(order.reference_id) >= order.targets
            ):
                logits[row] = -torch.inf
                logits[row, order.stop_id] = 0.0
        return logits

    def reads_reference(self, order: CaptureRequest, response: list[int]) -> bool:
        """Whether the token that this step feeds is ``<REF_POS>``, written by the policy."""
        return bool(response) and response[-1] == order.reference_id

    def row_of(self, row: int, logits: torch.Tensor) -> torch.Tensor:
        """(D,) post-norm row behind a row of the logits."""
        rows = STEP.rows
        assert rows is not None, "the model was not loaded through coprs_deploy's architecture"
        assert len(rows) == len(logits), (rows.shape, logits.shape)
        return rows[row]


def is_first_rank() -> bool:
    """Whether this process is the one of its tensor parallel group whose outputs count."""
    from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized

    return not model_parallel_is_initialized() or get_tp_group().rank_in_group == 0
