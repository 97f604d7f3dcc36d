"""What the server sent: a result, and the prior of a stream; arrays are decoded when read."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.coco_results import coco_results
from coprs_deploy.data.detections import detections
from coprs_deploy.data.rle import decode_mask
from coprs_deploy.errors import EndpointError

if TYPE_CHECKING:
    import supervision as sv


@dataclass(frozen=True, repr=False, eq=False)
class RemoteResult:
    """Result of a request, with the names of ``SegmentationResult``.

    Attributes:
        masks_rle: compressed COCO RLE of each target, in the order of the response.
        scores: (N,) confidence of each mask in [0, 1].
        boxes: (N, 4) x1, y1, x2, y2 in pixels, x2 and y2 exclusive.
        areas: (N,) areas in pixels.
        image_size: height and width of the image in pixels.
        reasoning: text inside ``<think>``.
        response: whole text of the policy.
        stop_reason: why the response ended, such as ``targets_reached``.
        format_violations: deviations from the response format.
        instruction: the instruction of the request.
        timings: wall times in milliseconds and token counts.
        runtime: description of graphs and policy of the server.
    """

    masks_rle: tuple[Mapping[str, Any], ...]
    scores: NDArray[np.float64]
    boxes: NDArray[np.int64]
    areas: NDArray[np.int64]
    image_size: tuple[int, int]
    reasoning: str
    response: str
    stop_reason: str
    format_violations: tuple[str, ...]
    instruction: str
    timings: Mapping[str, float]
    runtime: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RemoteResult:
        """Read the JSON of the server.

        Raises:
            EndpointError: it is no result.
        """
        try:
            height, width = data["image_size"]
            return cls(
                masks_rle=tuple(data["masks"]),
                scores=np.array(data["scores"], np.float64),
                boxes=np.array(data["boxes"], np.int64).reshape(-1, 4),
                areas=np.array(data["areas"], np.int64),
                image_size=(int(height), int(width)),
                reasoning=data["reasoning"],
                response=data["response"],
                stop_reason=data["stop_reason"],
                format_violations=tuple(data["format_violations"]),
                instruction=data["instruction"],
                timings=data["timings"],
                runtime=data["runtime"],
            )
        except (LookupError, TypeError, ValueError) as error:
            raise EndpointError(
                f"the server sent no result of a segmentation ({error!r}); check the URL, and that "
                "client and server have the same version"
            ) from error

    @property
    def found(self) -> bool:
        """Whether the policy named a target."""
        return len(self.masks_rle) > 0

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W) bool, one mask per target; decoded on first access."""
        masks = np.zeros((len(self.masks_rle), *self.image_size), np.bool_)
        for index, mask in enumerate(self.masks_rle):
            masks[index] = decode_mask(mask, *self.image_size)
        return masks

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W) bool mask of the last target, the one that counts; empty if none was found."""
        if not self.found:
            return np.zeros(self.image_size, np.bool_)
        return decode_mask(self.masks_rle[-1], *self.image_size)

    def to_json(self) -> dict[str, Any]:
        """Return the result as the server sent it."""
        return {
            "found": self.found,
            "instruction": self.instruction,
            "reasoning": self.reasoning,
            "response": self.response,
            "stop_reason": self.stop_reason,
            "format_violations": list(self.format_violations),
            "image_size": list(self.image_size),
            "scores": self.scores.tolist(),
            "boxes": self.boxes.tolist(),
            "areas": self.areas.tolist(),
            "masks": [dict(mask) for mask in self.masks_rle],
            "timings": dict(self.timings),
            "runtime": self.runtime,
        }

    def to_coco(self, image_id: int | str = 0, category_id: int = 1) -> list[dict[str, Any]]:
        """Return the masks as COCO results; see :meth:`SegmentationResult.to_coco`."""
        numbers = (each.tolist() for each in (self.boxes, self.areas, self.scores))
        return coco_results(image_id, self.masks_rle, *numbers, category_id=category_id)

    def to_supervision(self) -> sv.Detections:
        """Return the masks as ``supervision.Detections``, labeled with the instruction.

        Raises:
            MissingDependencyError: supervision is not installed.
        """
        instructions = [self.instruction] * len(self.masks_rle)
        return detections(self.masks, self.boxes, self.scores, instructions, [self.instruction])

    def __repr__(self) -> str:
        height, width = self.image_size
        found = f"areas {self.areas.tolist()}" if self.found else "nothing found"
        return f"RemoteResult({found} in {width}x{height}, {self.stop_reason})"


@dataclass(frozen=True, eq=False)
class RemotePrior:
    """Prior of a stream: where the policy looks, before the masks are decoded.

    Attributes:
        png: the heat map of all targets as a gray PNG, the whole image on fewer pixels.
    """

    png: bytes

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RemotePrior:
        """Read the event of the server."""
        return cls(base64.b64decode(data["image"].partition(",")[2]))

    @cached_property
    def prior(self) -> NDArray[np.float32]:
        """(h, w) float32 heat map in [0, 1]; decoded on first access."""
        from PIL import Image

        gray = np.asarray(Image.open(io.BytesIO(self.png)).convert("L"), np.float32)
        return gray / np.float32(255)
