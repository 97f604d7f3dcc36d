"""The three runners as one pipeline: an image once, then any number of targets on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.closing import Closeable
from coprs_deploy.engines.runner import DeviceTensor, Runner
from coprs_deploy.images import PreparedImage, require_inside
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, CountProfile, PictureExtent


class Stages(Closeable):
    """Image encoder, prior and mask decoder of one bundle (or of one model).

    Calls from several threads are safe where the runners' are (ONNX Runtime: yes).
    """

    def __init__(self, runners: Mapping[str, Runner]) -> None:
        self.runners = dict(runners)
        self._joined = self.runners[PRIOR].joined_with(self.runners[MASK_DECODER])

    @property
    def joins_targets(self) -> bool:
        """Whether :meth:`priors_and_masks` is one piece of work."""
        return self._joined is not None

    def encode(self, prepared: PreparedImage) -> DeviceTensor:
        """Encode an image; the embedding stays on the device, (1, C, G, G)."""
        return self.encode_together([prepared])[0]

    @property
    def extent(self) -> PictureExtent | None:
        """How far pictures may reach into the padded square; None stands for all of it."""
        return self.runners[IMAGE_ENCODER].spec.extent

    @property
    def images(self) -> CountProfile:
        """How many images the encoder takes in one call."""
        return self.runners[IMAGE_ENCODER].spec.images

    def encode_together(self, images: Sequence[PreparedImage]) -> list[DeviceTensor]:
        """Encode images in few calls, of few different sizes; see :meth:`CountProfile.size_for`.

        Returns:
            An embedding for each, (1, C, G, G), on the device.

        Raises:
            ImageSizeError: a picture reaches further than the encoder was made for.
        """
        for prepared in images:
            require_inside(prepared, self.extent)
        embeddings: list[DeviceTensor] = []
        while len(embeddings) < len(images):
            start = len(embeddings)
            size = self.images.size_for(len(images) - start)
            batch = [prepared.image for prepared in images[start : start + size]]
            stacked = batch[0] if size == 1 else np.concatenate(batch)
            encoded = self.runners[IMAGE_ENCODER](image=stacked)["image_embedding"]
            embeddings += [encoded] if size == 1 else encoded.rows()
        return embeddings

    def priors(
        self, image_embedding: DeviceTensor, concentrations: NDArray[np.float32]
    ) -> list[DeviceTensor]:
        """Score N concentrations against an image.

        Args:
            image_embedding: what :meth:`encode` gave.
            concentrations: (N, D) float32, N at least 1.

        Returns:
            Prior logits in chunks of as many targets as the graph takes; the last chunk may repeat
            its last target to fill the graph's fixed number.
        """
        return [
            self.runners[PRIOR](image_embedding=image_embedding, concentration=chunk)[
                "prior_logits"
            ]
            for chunk in self._chunks(concentrations)
        ]

    def masks(
        self,
        image_embedding: DeviceTensor,
        prior_chunks: list[DeviceTensor],
        unpadded_size: NDArray[np.int64],
    ) -> list[DeviceTensor]:
        """Decode the chunks that :meth:`priors` gave into mask logits, chunk by chunk."""
        return [
            self.runners[MASK_DECODER](
                image_embedding=image_embedding,
                prior_logits=chunk,
                unpadded_size=unpadded_size,
            )["mask_logits"]
            for chunk in prior_chunks
        ]

    def priors_and_masks(
        self,
        image_embedding: DeviceTensor,
        concentrations: NDArray[np.float32],
        unpadded_size: NDArray[np.int64],
    ) -> tuple[list[DeviceTensor], list[DeviceTensor]]:
        """Score and decode N concentrations; nothing comes between the two where they are joined.

        Returns:
            What :meth:`priors` and :meth:`masks` give.
        """
        if self._joined is None:
            priors = self.priors(image_embedding, concentrations)
            return priors, self.masks(image_embedding, priors, unpadded_size)
        outputs = [
            self._joined(
                image_embedding=image_embedding, concentration=chunk, unpadded_size=unpadded_size
            )
            for chunk in self._chunks(concentrations)
        ]
        return [o["prior_logits"] for o in outputs], [o["mask_logits"] for o in outputs]

    def _chunks(self, concentrations: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        profile = self.runners[PRIOR].spec.targets
        for start in range(0, len(concentrations), profile.maximum):
            chunk = concentrations[start : start + profile.maximum]
            lacking = max(0, profile.minimum - len(chunk))
            yield np.concatenate([chunk, np.repeat(chunk[-1:], lacking, axis=0)])

    def close(self) -> None:
        """Free all three graphs, what joins them first."""
        with ExitStack() as stack:
            for runner in self.runners.values():
                stack.callback(runner.close)
            if self._joined is not None:
                stack.callback(self._joined.close)


def join_chunks(chunks: list[DeviceTensor], num_targets: int) -> NDArray[np.float32]:
    """Bring chunks of logits to the host as one (num_targets, 1, M, M) array."""
    joined: NDArray[np.float32] = np.concatenate([chunk.numpy() for chunk in chunks])
    return joined[:num_targets]
