"""The segmentation modules on the policy: one forward pass serves words and masks.

The policy stays an instance of its own transformers class (a subclass defined elsewhere would load
its weights under other names), and gains a submodule ``segmentation`` and three hooks. A call with
``segmentation=SegmentationRequest(...)`` returns prior and mask logits beside the usual output.
They are fields of the output itself: wrappers of distributed training look for what needs a
gradient there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coprs_deploy.models import SegmentationModel
from coprs_deploy.training.mask_decoding import decode_targets
from coprs_deploy.training.state import freeze_unused

ATTRIBUTE = "segmentation"
"""Name of the submodule; the weights of a rollout engine are all others."""


class SegmentationRequest(NamedTuple):
    """What a forward pass needs to decode masks.

    Attributes:
        image_embedding: (B, C, G, G), of each row's image.
        inside: (B, 1, M, M), 1 for mask cells of the image and 0 for padding.
        first_column: where responses begin; ``<REF_POS>`` before it belongs to the prompt.
        num_targets: K, masks a row.
    """

    image_embedding: Tensor
    inside: Tensor
    first_column: int
    num_targets: int


class SegmentationHead(nn.Module):
    """Prior, prompt encoder and mask decoder: what is trained; the image encoder stays outside."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        freeze_unused(model)
        self.prior = model.prior
        self.prompt_encoder = model.prompt_encoder
        self.mask_decoder = model.mask_decoder

    def forward(self, request: SegmentationRequest, concentration: Tensor) -> tuple[Tensor, Tensor]:
        """Decode K targets a row.

        Args:
            request: embeddings and paddings of B rows.
            concentration: (B, K, D) states of ``<REF_POS>``, zero where there is none.

        Returns:
            Prior logits and mask logits, (B, K, M, M) each.
        """
        rows, targets, _ = concentration.shape
        dtype = self.prior.q_proj.weight.dtype
        embedding = request.image_embedding.to(dtype).repeat_interleave(targets, dim=0)
        inside = request.inside.repeat_interleave(targets, dim=0)
        states = concentration.flatten(0, 1).to(dtype)
        priors, masks = decode_targets(self, embedding, states, inside)
        shape = (rows, targets, *masks.shape[-2:])
        # Clones: sharded training hangs hooks on outputs, which a view could lose.
        return priors.view(shape).clone(), masks.view(shape).clone()


class Attachment:
    """Hangs a segmentation head on a policy; :meth:`detach` takes it off again.

    Args:
        policy: a transformers model, not a subclass of ours and not wrapped.
        head: what is attached.
        reference_id: id of ``<REF_POS>``.
    """

    def __init__(self, policy: Any, head: SegmentationHead, reference_id: int) -> None:
        self._policy = policy
        self._reference_id = reference_id
        self._asked: tuple[SegmentationRequest, Tensor] | None = None
        self._hidden: Tensor | None = None
        policy.add_module(ATTRIBUTE, head)
        self._hooks = [
            policy.register_forward_pre_hook(self._take_request, with_kwargs=True),
            policy.base_model.register_forward_hook(self._keep_states),
            policy.register_forward_hook(self._add_masks),
        ]

    def detach(self) -> None:
        """Give the policy back as it was, with the weights that it has now."""
        for hook in self._hooks:
            hook.remove()
        delattr(self._policy, ATTRIBUTE)

    def _take_request(
        self, policy: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        request = named.pop("segmentation", None)
        self._asked = None if request is None else (request, named["input_ids"])
        return arguments, named

    def _keep_states(self, backbone: nn.Module, arguments: Any, output: Any) -> None:
        if self._asked is not None:
            self._hidden = output.last_hidden_state

    def _add_masks(self, policy: nn.Module, arguments: Any, output: Any) -> Any:
        asked, hidden = self._asked, self._hidden
        self._asked = self._hidden = None
        if asked is None:
            return None
        assert hidden is not None, "the policy did not run its backbone"
        request, ids = asked
        columns, is_found = reference_columns(
            ids, self._reference_id, request.first_column, request.num_targets
        )
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        states = torch.where(is_found[..., None], hidden[rows, columns], 0.0)
        priors, masks = getattr(policy, ATTRIBUTE)(request, states)
        return _output_with_masks(type(output))(
            **output, prior_logits=priors, mask_logits=masks, is_found=is_found
        )


def reference_columns(
    ids: Tensor, reference_id: int, first_column: int, num_targets: int
) -> tuple[Tensor, Tensor]:
    """Find the ``<REF_POS>`` of each response, in order; of too many, the last ones count.

    Args:
        ids: int64 (B, L) prompts and responses.
        reference_id: id of ``<REF_POS>``.
        first_column: where responses begin.
        num_targets: K.

    Returns:
        int64 (B, K) columns, 0 where there is none, and bool (B, K), whether there is one.
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


_EXTENDED: dict[Any, Any] = {}


def _output_with_masks(kind: Any) -> Any:
    """Extend a transformers output class by our fields.

    Sharded training takes the output apart and builds it again, so keys that the class does not
    know would be lost.
    """
    if kind not in _EXTENDED:
        added: list[tuple[str, Any, Any]] = [
            (name, Tensor | None, dataclasses.field(default=None))
            for name in ("prior_logits", "mask_logits", "is_found")
        ]
        _EXTENDED[kind] = dataclasses.make_dataclass(
            f"{kind.__name__}WithMasks", added, bases=(kind,)
        )
    return _EXTENDED[kind]
