"""Heads that teach a part of the model what to look at, and are thrown away in the end.

They read what a scene's truth says about single cells or single objects.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprs_deploy.curriculum.scenes import ATTRIBUTES, SceneBatch
from coprs_deploy.training.losses import Mean

OWNED_SHARE = 0.2
"""Share of a cell's pixels that makes an object its owner; its center does so anyway."""

CENTER_WEIGHT = 4.0
"""How much more a cell with a center counts than one without, which is more frequent."""

NUM_LOOKS = 4
"""The first of ``ATTRIBUTES``, which say what an object looks like; the others say where it is."""


class CellTruth(NamedTuple):
    """What a scene's truth says about cells, row by row.

    Attributes:
        is_center: float32 (B, T), 1 where an object's center lies.
        is_owned: bool (B, T), where an object is seen.
        attributes: int64 (B, T, 6) of the owner.
        offsets: float32 (B, T, 2), from the cell's middle to the owner's center, in cells.
    """

    is_center: Tensor
    is_owned: Tensor
    attributes: Tensor
    offsets: Tensor


class HeadResult(NamedTuple):
    """Losses, each to be added with weight 1, and shares of right answers."""

    losses: dict[str, Mean]
    accuracies: dict[str, Mean]


def cell_truth(scenes: SceneBatch, grid: int) -> CellTruth:
    """Read off what a grid of so many cells a side shows."""
    batch, size = scenes.instance_map.shape[0], scenes.instance_map.shape[1]
    cell = size // grid
    most = scenes.attributes.shape[1]
    pixels = scenes.instance_map.reshape(batch, grid, cell, grid, cell).permute(0, 1, 3, 2, 4)
    pixels = pixels.reshape(batch, grid * grid, cell * cell).long()
    counts = torch.zeros(batch, grid * grid, most + 1, device=pixels.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels, dtype=counts.dtype))
    largest, owner = counts[..., 1:].max(dim=-1)
    is_owned = largest > OWNED_SHARE * cell * cell
    column, row = (scenes.centers / cell).long().clamp(0, grid - 1).unbind(-1)
    number = torch.arange(most, device=pixels.device)
    is_object = number < scenes.num_objects[:, None]  # (B, M)
    image = torch.arange(batch, device=pixels.device)[:, None].expand_as(row)[is_object]
    place = (row * grid + column)[is_object]
    is_center = torch.zeros(batch, grid * grid, device=pixels.device)
    is_center[image, place] = 1.0
    is_owned[image, place] = True
    owner[image, place] = number.expand_as(row)[is_object]
    attributes = scenes.attributes.gather(1, owner[..., None].expand(-1, -1, len(ATTRIBUTES)))
    centers = scenes.centers.gather(1, owner[..., None].expand(-1, -1, 2)) / cell
    cells = torch.arange(grid * grid, device=pixels.device)
    middles = torch.stack([cells % grid, cells // grid], dim=-1) + 0.5
    return CellTruth(is_center, is_owned, attributes, centers - middles)


class AttributeReader(nn.Module):
    """Reads attributes of one object from one vector."""

    def __init__(self, width: int, sizes: tuple[int, ...], names: tuple[str, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        self.names = names
        self.read = nn.Linear(width, sum(sizes))

    def forward(self, states: Tensor, attributes: Tensor) -> HeadResult:
        """Compare what is read from (N, D) with int64 (N, len(sizes))."""
        losses, accuracies = {}, {}
        parts = self.read(states).float().split(self.sizes, dim=-1)
        for name, logits, label in zip(self.names, parts, attributes.unbind(-1), strict=True):
            losses[name] = Mean.of(F.cross_entropy(logits, label, reduction="none"))
            accuracies[name] = Mean.of((logits.detach().argmax(-1) == label).float())
        return HeadResult(losses, accuracies)


class CellReader(nn.Module):
    """Reads from each image token what its cell shows.

    Args:
        width: of the tokens.
        sizes: values of each attribute; see ``ATTRIBUTES``.
        grid: cells along one side.
        has_place: whether each token must also know its own row and column.
    """

    def __init__(self, width: int, sizes: tuple[int, ...], grid: int, has_place: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.looks = AttributeReader(width, sizes[:NUM_LOOKS], ATTRIBUTES[:NUM_LOOKS])
        self.center = nn.Linear(width, 1)
        self.offset = nn.Linear(width, 2)
        self.grid = grid
        self.place = AttributeReader(width, (grid, grid), ("row", "column")) if has_place else None

    def forward(self, tokens: Tensor, truth: CellTruth) -> HeadResult:
        """Read (B, T, D) image tokens, T = grid * grid in rows."""
        tokens = self.norm(tokens.float())
        owned = tokens[truth.is_owned]
        center = self.center(tokens)[..., 0].float()
        weights = 1 + (CENTER_WEIGHT - 1) * truth.is_center
        losses = {
            "center": Mean.of(
                weights
                * F.binary_cross_entropy_with_logits(center, truth.is_center, reduction="none")
            ),
            "offset": Mean.of(
                F.smooth_l1_loss(
                    self.offset(owned).float(), truth.offsets[truth.is_owned], reduction="none"
                )
            ),
        }
        looks = self.looks(owned, truth.attributes[truth.is_owned][:, :NUM_LOOKS])
        # An owner is only seen in part in most of its cells: its center's cell is what counts.
        at_center = truth.is_center > 0
        with torch.no_grad():
            seen = self.looks(tokens[at_center], truth.attributes[at_center][:, :NUM_LOOKS])
        accuracies = {
            "center": Mean.of(((center > 0) == at_center).float(), weights),
            **seen.accuracies,
        }
        losses.update(looks.losses)
        if self.place is not None:
            cells = torch.arange(self.grid**2, device=tokens.device)
            labels = torch.stack([cells // self.grid, cells % self.grid], dim=-1)
            labels = labels.repeat(tokens.shape[0], 1)
            place = self.place(tokens.flatten(0, 1), labels)
            losses.update(place.losses)
            accuracies.update(place.accuracies)
        return HeadResult(losses, accuracies)


class PatchReader(nn.Module):
    """Reads from each patch of SAM's embedding what it shows: who is there, and where exactly."""

    def __init__(self, channels: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.foreground = nn.Conv2d(channels, 16, kernel_size=1)
        self.looks = AttributeReader(channels, sizes[:NUM_LOOKS], ATTRIBUTES[:NUM_LOOKS])

    def forward(self, image_embedding: Tensor, scenes: SceneBatch) -> HeadResult:
        """Read (B, C, G, G); foreground is asked for on the mask grid, 4 G a side."""
        grid = image_embedding.shape[-1]
        cell = scenes.instance_map.shape[1] // grid
        covered = F.adaptive_avg_pool2d((scenes.instance_map > 0).float()[:, None], 4 * grid)
        logits = F.pixel_shuffle(self.foreground(image_embedding).float(), 4)
        loss = F.binary_cross_entropy_with_logits(logits, covered, reduction="none")
        owner = scenes.instance_map[:, cell // 2 :: cell, cell // 2 :: cell].flatten(1).long()
        is_owned = owner > 0
        index = (owner - 1).clamp(min=0)[..., None].expand(-1, -1, len(ATTRIBUTES))
        attributes = scenes.attributes.gather(1, index)[is_owned]
        tokens = image_embedding.flatten(2).transpose(1, 2)[is_owned]
        looks = self.looks(tokens, attributes[:, :NUM_LOOKS])
        return HeadResult({"foreground": Mean.of(loss), **looks.losses}, looks.accuracies)


class OracleQuery(nn.Module):
    """The query that knows its target: normalized sum of learned embeddings of its attributes.

    It stands in for the policy's state at ``<REF_POS>`` while the segmentation path learns alone.
    """

    def __init__(self, width: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.width = width
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)

    def forward(self, attributes: Tensor) -> Tensor:
        """Map int64 (N, 6) to (N, D)."""
        columns = attributes.unbind(-1)
        total = sum(table(i) for table, i in zip(self.tables, columns, strict=True))
        return F.layer_norm(total, (self.width,))


class SceneHeads(nn.Module):
    """Every throw-away head of a run on scenes.

    Args:
        width: D, the width of the policy.
        channels: of SAM's image embedding.
        sizes: values of each attribute; see ``ATTRIBUTES``.
        grid: image tokens along one side.
    """

    def __init__(self, width: int, channels: int, sizes: tuple[int, ...], grid: int) -> None:
        super().__init__()
        self.vision = CellReader(width, sizes, grid, has_place=False)
        self.language = CellReader(width, sizes, grid, has_place=True)
        self.patches = PatchReader(channels, sizes)
        self.oracle = OracleQuery(width, sizes)
        self.reference = AttributeReader(width, sizes, ATTRIBUTES)
