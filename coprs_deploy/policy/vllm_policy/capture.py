"""Hidden-state capture of ``<REF_POS>`` inside vLLM's decoding pass.

This module runs in vLLM's worker process. An engine step turns post-norm hidden states into logits;
the hidden state of the step whose *input* token is ``<REF_POS>`` is the concentration. Two parts of
vLLM's public plug-in interface are combined: the model keeps the hidden states of the step
(:mod:`.models`), and a logits processor knows the request of each row and its last token. The
processor appends the state to the file that the request names in ``SamplingParams.extra_args``
(:mod:`.transport`), so that rows that move within the batch cannot mix up requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from coprs_deploy.policy.vllm_policy.transport import append_hidden_state

EXTRA_ARGUMENT = "coprs_deploy"
"""Key of a capture request in ``SamplingParams.extra_args``."""


@dataclass(frozen=True)
class CaptureRequest:
    """Capture settings of one request, and the limits of its response.

    Attributes:
        path: file of this request for its hidden states.
        reference_id: id of ``<REF_POS>``.
        stop_id: token that is forced at a limit; one of ``stop_token_ids``.
        max_targets: maximum number of ``<REF_POS>``.
        token_budget: maximum response length; a ``<REF_POS>`` at the last position is still read.
        continues_reference: whether the prompt ends with the response's first ``<REF_POS>``, whose
            state is captured at position -1.
    """

    path: str
    reference_id: int
    stop_id: int
    max_targets: int
    token_budget: int
    continues_reference: bool = False

    def extra_args(self) -> dict[str, Any]:
        """Return the value of ``SamplingParams.extra_args``."""
        return {EXTRA_ARGUMENT: asdict(self)}

    @classmethod
    def from_params(cls, params: Any) -> CaptureRequest | None:
        """Read the capture request of sampling parameters; None if they have none."""
        values: Mapping[str, Any] | None = (params.extra_args or {}).get(EXTRA_ARGUMENT)
        return cls(**values) if values is not None else None


class HiddenStateCapture(LogitsProcessor):  # type: ignore[misc]  # vLLM may be absent
    """Logits processor that captures hidden states and ends responses at their limits.

    Requests without a :class:`CaptureRequest` are not touched.

    Attributes:
        step: (R, D) post-norm hidden states of the engine step, one for each row of its logits;
            set by the model of this process.
    """

    step: torch.Tensor | None = None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check that every ``<REF_POS>`` will be read under these sampling parameters.

        Raises:
            ValueError: a parameter would end the response too early or too late.
        """
        request = CaptureRequest.from_params(sampling_params)
        if request is None:
            return
        stops = sampling_params.stop_token_ids or []
        if sampling_params.min_tokens or sampling_params.ignore_eos:
            raise ValueError("min_tokens or ignore_eos is set; both prevent the end of a response")
        if request.stop_id not in stops or request.reference_id in stops:
            raise ValueError(
                f"stop_token_ids is {stops}; it must contain {request.stop_id} and not <REF_POS> "
                f"({request.reference_id}), which is read before a response ends"
            )
        if sampling_params.max_tokens <= request.token_budget:
            raise ValueError(
                f"max_tokens is {sampling_params.max_tokens}; it must exceed the token budget of "
                f"{request.token_budget}, so that a <REF_POS> at the last position is read"
            )

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "speculative decoding is on; vLLM's first model runner refuses custom logits "
                "processors under it, and its second one calls them through another interface, "
                "with a row for each draft token: leave speculative_config out"
            )
        self._batch: dict[int, tuple[CaptureRequest, list[int]]] = {}
        self._is_first_rank = is_first_rank()  # the other ranks have the same hidden states

    def is_argmax_invariant(self) -> bool:
        """Return False: forcing the end changes the result of greedy decoding."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Track requests that are added to, removed from or moved within the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._batch.pop(row, None)
        for row, params, _, response in batch_update.added:
            self._batch.pop(row, None)
            if (request := CaptureRequest.from_params(params)) is not None:
                self._batch[row] = (request, response)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._batch.pop(source, None), self._batch.pop(target, None)
            if moved is not None:
                self._batch[target] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self._batch[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Capture the hidden states of ``<REF_POS>`` and force the end of complete responses.

        Args:
            logits: (R, V), changed in place.
        """
        captured = {
            row: (request.path, len(response) - 1)
            for row, (request, response) in self._batch.items()
            # While the prompt is read in parts, each part replaces the state of the one before.
            if (response[-1] == request.reference_id if response else request.continues_reference)
        }
        if captured and self._is_first_rank:
            # One copy for all rows, because it waits for the device.
            stacked = torch.stack([self.hidden_state_of(row, logits) for row in captured])
            states = stacked.float().cpu().numpy()
            for (path, position), state in zip(captured.values(), states, strict=True):
                append_hidden_state(path, position, state)
        for row, (request, response) in self._batch.items():
            num_targets = response.count(request.reference_id) + request.continues_reference
            if len(response) >= request.token_budget or (
                row in captured and num_targets >= request.max_targets
            ):
                logits[row] = -torch.inf
                logits[row, request.stop_id] = 0.0
        return logits

    def hidden_state_of(self, row: int, logits: torch.Tensor) -> torch.Tensor:
        """Return the (D,) post-norm hidden state behind a row of the logits."""
        states = HiddenStateCapture.step
        assert states is not None, "the model was not loaded through coprs_deploy's architecture"
        assert len(states) == len(logits), (states.shape, logits.shape)
        return states[row]


def is_first_rank() -> bool:
    """Return whether this process is the first rank of its tensor-parallel group."""
    from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized

    return not model_parallel_is_initialized() or get_tp_group().rank_in_group == 0
