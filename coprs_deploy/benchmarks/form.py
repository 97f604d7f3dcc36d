"""In which form a bundle is exported for a row: how many targets and images, which pictures."""

from __future__ import annotations

from dataclasses import dataclass

from coprs_deploy.bundle import Manifest
from coprs_deploy.specs import IMAGE_ENCODER, PRIOR, OptimizationProfile


@dataclass(frozen=True)
class Form:
    """What the graphs of a bundle take, as options of ``export`` say it.

    Attributes:
        targets: in one call.
        images: in one call of the image encoder.
        aspect_ratio: of all pictures; empty stands for any.
        drop_padding: whether padding is not computed at all.
    """

    targets: str = "1"
    images: str = "1"
    aspect_ratio: str = ""
    drop_padding: bool = False

    @property
    def pictures(self) -> str:
        """Say which pictures it is for; nothing where it takes any."""
        if not self.aspect_ratio:
            return ""
        return f"for {self.aspect_ratio}" + (" without padding" if self.drop_padding else "")

    @property
    def suffix(self) -> str:
        """What the names of its folders end with."""
        counts = f"{self.targets}x{self.images}".replace(",", "-")
        aspect_ratio = f"-{self.aspect_ratio.replace(':', 'to')}" if self.aspect_ratio else ""
        return counts + aspect_ratio + ("-alone" if self.drop_padding else "")

    def is_of(self, manifest: Manifest) -> bool:
        """Whether the graphs of a bundle take just that."""
        encoder, prior = manifest.graphs[IMAGE_ENCODER].spec, manifest.graphs[PRIOR].spec
        counts = (OptimizationProfile.parse(self.targets), OptimizationProfile.parse(self.images))
        pictures = Form.of_pictures(manifest)
        return (prior.targets, encoder.images) == counts and (
            (pictures.aspect_ratio, pictures.drop_padding) == (self.aspect_ratio, self.drop_padding)
        )

    @classmethod
    def of_pictures(cls, manifest: Manifest) -> Form:
        """Which pictures a bundle takes, one of them and one target in a call."""
        valid_region = manifest.graphs[IMAGE_ENCODER].spec.valid_region
        if valid_region is None:
            return ANY_PICTURE
        width, height = valid_region.aspect_ratio
        return cls(aspect_ratio=f"{width}:{height}", drop_padding=valid_region.drops_padding)


WIDE = "16:9"
"""The aspect of most cameras, which encoders of real size are measured for too."""

ANY_PICTURE = Form()
"""One of any aspect in a call, with one target."""
