"""In which form a bundle is exported for a row: how many targets and images, which pictures."""

from __future__ import annotations

from dataclasses import dataclass

from coprs_deploy.bundle import Manifest
from coprs_deploy.specs import IMAGE_ENCODER, PRIOR, CountProfile


@dataclass(frozen=True)
class Form:
    """What the graphs of a bundle take, as options of ``export`` say it.

    Attributes:
        targets: in one call.
        images: in one call of the image encoder.
        aspect: of all pictures; empty stands for any.
        drop_padding: whether padding is not computed at all.
    """

    targets: str = "1"
    images: str = "1"
    aspect: str = ""
    drop_padding: bool = False

    @property
    def pictures(self) -> str:
        """Say which pictures it is for; nothing where it takes any."""
        if not self.aspect:
            return ""
        return f"for {self.aspect}" + (" without padding" if self.drop_padding else "")

    @property
    def suffix(self) -> str:
        """What the names of its folders end with."""
        counts = f"{self.targets}x{self.images}".replace(",", "-")
        aspect = f"-{self.aspect.replace(':', 'to')}" if self.aspect else ""
        return counts + aspect + ("-alone" if self.drop_padding else "")

    def is_of(self, manifest: Manifest) -> bool:
        """Whether the graphs of a bundle take just that."""
        encoder, prior = manifest.graphs[IMAGE_ENCODER].spec, manifest.graphs[PRIOR].spec
        counts = (CountProfile.parse(self.targets), CountProfile.parse(self.images))
        pictures = Form.of_pictures(manifest)
        return (prior.targets, encoder.images) == counts and (
            (pictures.aspect, pictures.drop_padding) == (self.aspect, self.drop_padding)
        )

    @classmethod
    def of_pictures(cls, manifest: Manifest) -> Form:
        """Which pictures a bundle takes, one of them and one target in a call."""
        extent = manifest.graphs[IMAGE_ENCODER].spec.extent
        if extent is None:
            return ANY_PICTURE
        width, height = extent.aspect
        return cls(aspect=f"{width}:{height}", drop_padding=extent.drops_padding)


WIDE = "16:9"
"""The aspect of most cameras, which encoders of real size are measured for too."""

ANY_PICTURE = Form()
"""One of any aspect in a call, with one target."""
