"""Auxiliary heads: dense supervision from the objects of a scene, used in training only.

They predict attributes of cells or objects from image tokens, image embeddings or hidden states.
The finished checkpoint does not hold them. ``sizes`` maps each attribute to its number of values.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprs_deploy.curriculum.scenes import SceneBatch
from coprs_deploy.training.losses import Mean
from coprs_deploy.training.stage import StageOutput

MIN_OBJECT_RATIO = 0.2
"""Share of a cell's pixels from which the cell belongs to an object; a center always does."""

CENTER_WEIGHT = 4.0
"""Weight of a cell with an object's center, relative to the more frequent cells without."""

NUM_APPEARANCE = 4
"""Number of leading attributes that describe appearance; the others describe location."""


class CellLabels(NamedTuple):
    """Labels of the cells of a grid, row by row.

    Attributes:
        is_center: float32 (B, T), 1 where an object has its center.
        is_object: bool (B, T), whether the cell belongs to an object.
        attributes: int64 (B, T, 6), attributes of that object, as in ``SceneBatch``.
        offsets: float32 (B, T, 2), from the middle of the cell to the object's center, in cells.
    """

    is_center: Tensor
    is_object: Tensor
    attributes: Tensor
    offsets: Tensor


def cell_labels(scenes: SceneBatch, grid: int) -> CellLabels:
    """Label the cells of a grid with ``grid`` cells per side."""
    batch, size = scenes.instance_map.shape[0], scenes.instance_map.shape[1]
    cell = size // grid
    most = scenes.attributes.shape[1]
    pixels = scenes.instance_map.reshape(batch, grid, cell, grid, cell).permute(0, 1, 3, 2, 4)
    pixels = pixels.reshape(batch, grid * grid, cell * cell).long()
    counts = torch.zeros(batch, grid * grid, most + 1, device=pixels.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels, dtype=counts.dtype))
    largest, objects = counts[..., 1:].max(dim=-1)
    is_object = largest > MIN_OBJECT_RATIO * cell * cell
    column, row = (scenes.centers / cell).long().clamp(0, grid - 1).unbind(-1)
    number = torch.arange(most, device=pixels.device)
    is_present = number < scenes.num_objects[:, None]  # (B, M)
    image = torch.arange(batch, device=pixels.device)[:, None].expand_as(row)[is_present]
    center = (row * grid + column)[is_present]
    is_center = torch.zeros(batch, grid * grid, device=pixels.device)
    is_center[image, center] = 1.0
    is_object[image, center] = True
    objects[image, center] = number.expand_as(row)[is_present]
    attributes, centers = (
        _of_objects(scenes.attributes, objects),
        _of_objects(scenes.centers, objects),
    )
    cells = torch.arange(grid * grid, device=pixels.device)
    middles = torch.stack([cells % grid, cells // grid], dim=-1) + 0.5
    return CellLabels(is_center, is_object, attributes, centers / cell - middles)


def _of_objects(values: Tensor, objects: Tensor) -> Tensor:
    """Select the values (B, M, K) of objects (B, T): (B, T, K)."""
    return values.gather(1, objects[..., None].expand(-1, -1, values.shape[-1]))


class AttributeHead(nn.Module):
    """Head that classifies attributes of one object from one vector of size D."""

    def __init__(self, hidden_size: int, sizes: dict[str, int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.classify = nn.Linear(hidden_size, sum(sizes.values()))

    def forward(self, states: Tensor, attributes: Tensor) -> StageOutput:
        """Classify (N, D) vectors; labels are int64 (N, len(sizes))."""
        losses, metrics = {}, {}
        parts = self.classify(states).float().split(list(self.sizes.values()), dim=-1)
        for name, logits, label in zip(self.sizes, parts, attributes.unbind(-1), strict=True):
            losses[name] = Mean.of(F.cross_entropy(logits, label, reduction="none"))
            metrics[name] = Mean.of((logits.detach().argmax(-1) == label).float())
        return StageOutput(losses, metrics)


class CellHead(nn.Module):
    """Head that predicts the content of each image token's cell.

    Args:
        hidden_size: size D of the tokens.
        sizes: attribute to number of values.
        grid: cells along one side.
        has_location: whether the row and column of each token are predicted too.
    """

    def __init__(
        self, hidden_size: int, sizes: dict[str, int], grid: int, has_location: bool
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.appearance = _appearance_head(hidden_size, sizes)
        self.center = nn.Linear(hidden_size, 1)
        self.offset = nn.Linear(hidden_size, 2)
        self.grid = grid
        location_sizes = {"row": grid, "column": grid}
        self.location = AttributeHead(hidden_size, location_sizes) if has_location else None

    def forward(self, tokens: Tensor, labels: CellLabels) -> StageOutput:
        """Predict from (B, T, D) image tokens, T = grid * grid, row by row."""
        tokens = self.norm(tokens.float())
        at_object, at_center = labels.is_object, labels.is_center > 0
        appearance = labels.attributes[..., :NUM_APPEARANCE]
        object_tokens = tokens[at_object]
        center = self.center(tokens)[..., 0].float()
        offset = self.offset(object_tokens).float()
        weights = 1 + (CENTER_WEIGHT - 1) * labels.is_center
        center_loss = F.binary_cross_entropy_with_logits(center, labels.is_center, reduction="none")
        offset_loss = F.smooth_l1_loss(offset, labels.offsets[at_object], reduction="none")
        losses = {
            "center": Mean.of(weights * center_loss),
            "offset": Mean.of(offset_loss),
            **self.appearance(object_tokens, appearance[at_object]).losses,
        }
        # Most cells show a part of their object only, so accuracies count the cells of centers.
        with torch.no_grad():
            centers = self.appearance(tokens[at_center], appearance[at_center])
        is_right = ((center > 0) == at_center).float()
        metrics = {"center": Mean.of(is_right, weights), **centers.metrics}
        if self.location is not None:
            cells = torch.arange(self.grid**2, device=tokens.device)
            own = torch.stack([cells // self.grid, cells % self.grid], dim=-1)
            location = self.location(tokens.flatten(0, 1), own.repeat(tokens.shape[0], 1))
            losses.update(location.losses)
            metrics.update(location.metrics)
        return StageOutput(losses, metrics)


class CellHeads(nn.Module):
    """Cell heads behind the vision tower and behind a language layer."""

    def __init__(self, hidden_size: int, sizes: dict[str, int], grid: int) -> None:
        super().__init__()
        self.vision_head = CellHead(hidden_size, sizes, grid, has_location=False)
        self.language_head = CellHead(hidden_size, sizes, grid, has_location=True)

    def forward(self, features: Tensor, tokens: Tensor, labels: CellLabels) -> StageOutput:
        """Predict from (B, T, D) image tokens of the vision tower and of the language layer.

        Returns:
            Losses ``vision_head.X`` and ``language_head.X``; metrics ``vision_head.X`` and, of the
            language head, ``X``.
        """
        vision, language = self.vision_head(features, labels), self.language_head(tokens, labels)
        return StageOutput(
            prefixed("vision_head", vision.losses) | prefixed("language_head", language.losses),
            prefixed("vision_head", vision.metrics) | language.metrics,
        )


class PatchHead(nn.Module):
    """Head that predicts foreground and appearance from SAM's image embedding, C channels."""

    def __init__(self, channels: int, sizes: dict[str, int]) -> None:
        super().__init__()
        self.foreground = nn.Conv2d(channels, 16, kernel_size=1)
        self.appearance = _appearance_head(channels, sizes)

    def forward(self, image_embedding: Tensor, scenes: SceneBatch) -> StageOutput:
        """Predict from (B, C, G, G): foreground on the mask grid (4 G), appearance per patch."""
        grid = image_embedding.shape[-1]
        cell = scenes.instance_map.shape[1] // grid
        covered = F.adaptive_avg_pool2d((scenes.instance_map > 0).float()[:, None], 4 * grid)
        logits = F.pixel_shuffle(self.foreground(image_embedding).float(), 4)
        loss = F.binary_cross_entropy_with_logits(logits, covered, reduction="none")
        number = scenes.instance_map[:, cell // 2 :: cell, cell // 2 :: cell].flatten(1).long()
        is_object = number > 0
        attributes = _of_objects(scenes.attributes, (number - 1).clamp(min=0))[is_object]
        tokens = image_embedding.flatten(2).transpose(1, 2)[is_object]
        appearance = self.appearance(tokens, attributes[:, :NUM_APPEARANCE])
        losses = {"foreground": Mean.of(loss), **appearance.losses}
        return StageOutput(losses, appearance.metrics)


def _appearance_head(hidden_size: int, sizes: dict[str, int]) -> AttributeHead:
    return AttributeHead(hidden_size, dict(islice(sizes.items(), NUM_APPEARANCE)))


class OracleQuery(nn.Module):
    """Query from the target's attributes: normalized sum of their learned embeddings.

    It replaces the policy's hidden state at ``<REF_POS>`` while the segmentation path is trained
    alone.
    """

    def __init__(self, hidden_size: int, sizes: dict[str, int]) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.embeddings = nn.ModuleList(nn.Embedding(size, hidden_size) for size in sizes.values())

    def forward(self, attributes: Tensor) -> Tensor:
        """Map int64 (N, 6) to (N, D)."""
        columns = attributes.unbind(-1)
        total = sum(table(i) for table, i in zip(self.embeddings, columns, strict=True))
        return F.layer_norm(total, (self.hidden_size,))


class AuxiliaryHeads(nn.Module):
    """All auxiliary heads of a run.

    Args:
        hidden_size: hidden size D of the policy.
        channels: channels C of SAM's image embedding.
        sizes: attribute to number of values.
        grid: image tokens along one side.
    """

    def __init__(self, hidden_size: int, channels: int, sizes: dict[str, int], grid: int) -> None:
        super().__init__()
        self.cells = CellHeads(hidden_size, sizes, grid)
        self.patches = PatchHead(channels, sizes)
        self.oracle = OracleQuery(hidden_size, sizes)
        self.reference = AttributeHead(hidden_size, sizes)


def prefixed(prefix: str, means: dict[str, Mean]) -> dict[str, Mean]:
    """Put a prefix and a dot before each name."""
    return {f"{prefix}.{name}": mean for name, mean in means.items()}
