"""Segmentation modules attached to the policy: one forward pass computes logits of text and masks.

The policy stays an instance of its own transformers class (a subclass defined elsewhere would load
its weights under other names) and gains a submodule ``segmentation`` and three hooks. A call with
``segmentation=SegmentationRequest(...)`` adds prior and mask logits to the usual output, as fields
of the output itself: wrappers of distributed training search it for tensors that need a gradient.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coprs_deploy.models import SegmentationModel
from coprs_deploy.training.mask_decoding import decode_targets
from coprs_deploy.training.state import freeze_unused

ATTRIBUTE = "segmentation"
"""Name of the submodule; a rollout engine gets all other weights."""


class SegmentationRequest(NamedTuple):
    """Inputs of the mask decoding of K masks in each of B rows.

    Attributes:
        image_embedding: (B, C, G, G).
        inside: (B, 1, M, M), 1 for mask cells of the image and 0 for padding.
        first_column: column of the first completion token; ``<REF_POS>`` before it is ignored.
        num_targets: K.
    """

    image_embedding: Tensor
    inside: Tensor
    first_column: int
    num_targets: int


class SegmentationHead(nn.Module):
    """Trainable segmentation modules: prior, prompt encoder, mask decoder; no image encoder."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        freeze_unused(model)
        self.prior = model.prior
        self.prompt_encoder = model.prompt_encoder
        self.mask_decoder = model.mask_decoder

    def forward(self, request: SegmentationRequest, concentration: Tensor) -> tuple[Tensor, Tensor]:
        """Decode K targets per row to prior and mask logits, (B, K, M, M) each.

        ``concentration`` is (B, K, D), hidden states of ``<REF_POS>``, zero where it is missing.
        """
        rows, targets, _ = concentration.shape
        dtype = self.prior.q_proj.weight.dtype
        embedding = request.image_embedding.to(dtype).repeat_interleave(targets, dim=0)
        inside = request.inside.repeat_interleave(targets, dim=0)
        states = concentration.flatten(0, 1).to(dtype)
        priors, masks = decode_targets(self, embedding, states, inside)
        shape = (rows, targets, *masks.shape[-2:])
        # Clones: sharded training registers hooks on outputs, which a view could lose.
        return priors.view(shape).clone(), masks.view(shape).clone()


class Attachment:
    """Attach a segmentation head to a plain transformers model; :meth:`detach` removes it."""

    def __init__(self, policy: Any, head: SegmentationHead, reference_id: int) -> None:
        self._policy = policy
        self._reference_id = reference_id
        self._pending: tuple[SegmentationRequest, Tensor] | None = None
        self._hidden: Tensor | None = None
        policy.add_module(ATTRIBUTE, head)
        self._hooks = [
            policy.register_forward_pre_hook(self._take_request, with_kwargs=True),
            policy.base_model.register_forward_hook(self._keep_states),
            policy.register_forward_hook(self._add_masks),
        ]

    def detach(self) -> None:
        """Remove head and hooks; the policy keeps its current weights."""
        for hook in self._hooks:
            hook.remove()
        delattr(self._policy, ATTRIBUTE)

    def _take_request(
        self, policy: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        request = named.pop("segmentation", None)
        self._pending = None if request is None else (request, named["input_ids"])
        return arguments, named

    def _keep_states(self, backbone: nn.Module, arguments: Any, output: Any) -> None:
        if self._pending is not None:
            self._hidden = output.last_hidden_state

    def _add_masks(self, policy: nn.Module, arguments: Any, output: Any) -> Any:
        pending, hidden = self._pending, self._hidden
        self._pending = self._hidden = None
        if pending is None:
            return None
        assert hidden is not None, "the policy did not run its backbone"
        request, ids = pending
        columns, is_found = reference_columns(
            ids, self._reference_id, request.first_column, request.num_targets
        )
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        states = torch.where(is_found[..., None], hidden[rows, columns], 0.0)
        priors, masks = getattr(policy, ATTRIBUTE)(request, states)
        return _output_with_masks(output.__class__)(
            **output, prior_logits=priors, mask_logits=masks, is_found=is_found
        )


def reference_columns(
    ids: Tensor, reference_id: int, first_column: int, num_targets: int
) -> tuple[Tensor, Tensor]:
    """Find the ``<REF_POS>`` of each completion, in order; of more than K, the last K count.

    Args:
        ids: int64 (B, L) tokens of prompts and completions.
        reference_id: token id of ``<REF_POS>``.
        first_column: column of the first completion token.
        num_targets: K.

    Returns:
        Columns, int64 (B, K), 0 where missing; and whether each exists, bool (B, K).
    """
    is_reference = ids == reference_id
    is_reference[:, :first_column] = False
    surplus = (is_reference.sum(1, keepdim=True) - num_targets).clamp(min=0)
    slot = is_reference.cumsum(1) - 1 - surplus
    row, column = torch.nonzero(is_reference & (slot >= 0), as_tuple=True)
    columns = ids.new_zeros((len(ids), num_targets))
    is_found = torch.zeros_like(columns, dtype=torch.bool)
    columns[row, slot[row, column]] = column
    is_found[row, slot[row, column]] = True
    return columns, is_found


@cache
def _output_with_masks(kind: Any) -> Any:
    """Extend a transformers output class by the fields of the masks.

    Sharded training rebuilds the output from its fields, so keys unknown to the class would be
    lost.
    """
    added: list[tuple[str, Any, Any]] = [
        (name, Tensor | None, dataclasses.field(default=None))
        for name in ("prior_logits", "mask_logits", "is_found")
    ]
    return dataclasses.make_dataclass(f"{kind.__name__}WithMasks", added, bases=(kind,))
