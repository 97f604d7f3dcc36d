"""Known sizes of the splits of public data sets, to notice incomplete or wrong downloads.

References and images are those of the catalog of TensorFlow Datasets (``ref_coco``) and of the data
set cards; sentences those of the papers. Their sums agree with the published totals: 142,210
sentences of RefCOCO, 141,564 of RefCOCO+, 95,010 of RefCOCOg and 259,859 of the released gRefCOCO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class SplitCounts:
    """Size of a split; None for a number that is not known, or that the data set does not have.

    Attributes:
        refs: number of references.
        sentences: number of sentences.
        images: number of distinct images.
    """

    refs: int | None = None
    sentences: int | None = None
    images: int | None = None

    def differences(self, found: SplitCounts) -> list[str]:
        """Return one text for each number that is known on both sides and differs."""
        pairs = zip(asdict(self).items(), asdict(found).values(), strict=True)
        return [
            f"{actual:,} of {expected:,} {name}"
            for (name, expected), actual in pairs
            if None not in (expected, actual) and expected != actual
        ]


KNOWN_COUNTS: Mapping[str, SplitCounts] = {
    "refcoco:unc:train": SplitCounts(42_404, 120_624, 16_994),
    "refcoco:unc:val": SplitCounts(3_811, 10_834, 1_500),
    "refcoco:unc:testA": SplitCounts(1_975, 5_657, 750),
    "refcoco:unc:testB": SplitCounts(1_810, 5_095, 750),
    "refcoco:google:train": SplitCounts(40_000, None, 19_213),
    "refcoco:google:val": SplitCounts(5_000, None, 4_559),
    "refcoco:google:test": SplitCounts(5_000, None, 4_527),
    "refcoco+:unc:train": SplitCounts(42_278, 120_191, 16_992),
    "refcoco+:unc:val": SplitCounts(3_805, 10_758, 1_500),
    "refcoco+:unc:testA": SplitCounts(1_975, 5_726, 750),
    "refcoco+:unc:testB": SplitCounts(1_798, 4_889, 750),
    "refcocog:umd:train": SplitCounts(42_226, 80_512, 21_899),
    "refcocog:umd:val": SplitCounts(2_573, 4_896, 1_300),
    "refcocog:umd:test": SplitCounts(5_023, 9_602, 2_600),
    "refcocog:google:train": SplitCounts(44_822, 85_474, 24_698),
    "refcocog:google:val": SplitCounts(5_000, 9_536, 4_650),
    "grefcoco:unc:train": SplitCounts(None, 209_344, None),
    "grefcoco:unc:val": SplitCounts(None, 16_870, None),
    "grefcoco:unc:testA": SplitCounts(None, 18_712, None),
    "grefcoco:unc:testB": SplitCounts(None, 14_933, None),
    "reasonseg:train": SplitCounts(images=239),
    "reasonseg:val": SplitCounts(images=200),
    "reasonseg:test": SplitCounts(images=779),
}
"""Full name of a split to its size."""


def split_with(found: SplitCounts) -> str:
    """Return the name of the split that has these counts; empty if none has."""
    for name, known in KNOWN_COUNTS.items():
        if known.refs and known.refs == found.refs and known.images == found.images:
            return name
    return ""
