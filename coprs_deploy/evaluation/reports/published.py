"""Published results on RefCOCO, RefCOCO+, RefCOCOg and ReasonSeg, each with its source.

The paper's tables 1 (cIoU) and 2 (gIoU and cIoU), in percent. The paper's own tables were not at
hand: its rows are from their records, the others from the sources below, read in 2026-11. A number
that no source had is missing, never guessed. Methods are listed in the order of their sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

REFERRING_SPLITS = (
    *("refcoco:val", "refcoco:testA", "refcoco:testB"),
    *("refcoco+:val", "refcoco+:testA", "refcoco+:testB"),
    *("refcocog:val", "refcocog:test"),
)
"""Columns of table 1, which has cIoU."""

REASONING_SPLITS = ("reasonseg:val", "reasonseg:test")
"""Columns of table 2, each with gIoU and cIoU."""

SOURCES: Mapping[str, str] = {
    "coprs": "CoPRS, arXiv 2510.11173, tables 1 and 2",
    "survey": "Multimodal Referring Segmentation: A Survey, arXiv 2508.00265v2, tables 2 and 10",
    "seg_zero": "Seg-Zero, arXiv 2503.06520, tables 9 and 10",
    "lisa": "LISA, arXiv 2308.00692, table 1",
    "evf_sam": "EVF-SAM, table 10, which repeats LISA's",
    "lens": "LENS, arXiv 2508.14153, table 1",
    "rechannel": "ReChannel, github.com/xmz111/ReChannel, table of RefCOCO",
    "swim": "SWiM, github.com/yancilin/SWiM, table 5",
    "one_thinker": "OneThinker, table 8",
    "notes": "notes on CoPRS of en.papernotes.org, which quote its table 1",
}
"""Where the numbers were read."""


@dataclass(frozen=True)
class PublishedResult:
    """Row of a published table.

    Attributes:
        method: name with its size; (ft) is fine-tuned on the data set's training split.
        source: key of ``SOURCES``.
        values: percent, in the order of the columns; None where the source has no number.
    """

    method: str
    source: str
    values: tuple[float | None, ...]


def _parse(table: str, num_columns: int) -> tuple[PublishedResult, ...]:
    """Read lines of method, source and numbers; ``-`` is no number."""
    results = []
    for line in table.strip().splitlines():
        method, source, numbers = (part.strip() for part in line.split("|"))
        values = tuple(None if text == "-" else float(text) for text in numbers.split())
        assert len(values) == num_columns, f"{method} has {len(values)} numbers"
        assert source in SOURCES, f"{source} is no source"
        results.append(PublishedResult(method, source, values))
    return tuple(results)


REFERRING_RESULTS = _parse(
    """
    ReLA                | survey      | 73.8 76.5 70.2 66.0 71.0 57.7 65.0 66.0
    LAVT                | survey      | 72.7 75.8 68.8 62.1 68.4 55.1 61.2 62.1
    PolyFormer          | survey      | 76.0 77.1 73.2 70.7 74.5 64.6 69.4 69.9
    UNINEXT             | survey      | 82.2 83.4 81.3 72.5 76.4 66.2 74.7 76.4
    LISA-7B             | lens        | 74.1 76.5 71.1 62.4 67.4 56.5 66.4 68.5
    LISA-7B (ft)        | survey      | 74.9 79.1 72.3 65.1 70.8 58.1 67.9 70.6
    PixelLM-7B          | survey      | 73.0 76.5 68.2 66.3 71.7 58.3 69.3 70.5
    AnyRef-7B (ft)      | survey      | 76.9 79.9 74.2 70.3 73.5 61.8 70.0 70.7
    PerceptionGPT-7B    | lens        | 75.1 78.6 71.7 68.5 73.9 61.3 70.3 71.7
    PerceptionGPT-13B   | survey      | 75.3 79.1 72.1 68.9 74.0 61.9 70.7 71.9
    GSVA-7B (ft)        | survey      | 77.2 78.9 73.5 65.9 69.6 59.8 72.7 73.3
    GLaMM-7B            | survey      | 79.5 83.2 76.9 72.6 78.7 64.6 74.2 74.9
    OMG-LLaVA-7B        | rechannel   | 78.0 80.3 74.1 69.1 73.1 63.0 72.9 72.9
    VISA                | lens        | 72.4 75.5 68.1 59.8 64.8 53.1 65.5 66.4
    CoReS-7B            | survey      | 76.0 78.6 72.5 65.1 70.0 58.6 69.0 70.7
    SAM4MLLM-8B         | survey      | 79.8 82.7 74.7 74.6 80.0 67.2 75.5 76.4
    SegLLM-7B           | survey      | 80.2 81.5 75.4 70.3 73.0 62.5 72.6 73.6
    Text4Seg-8B         | rechannel   | 79.2 81.7 75.6 72.8 77.9 66.5 74.0 75.3
    READ-7B             | survey      | 78.1 80.2 73.2 68.4 73.7 60.4 70.1 71.4
    POPEN-7B (ft)       | survey      | 79.3 82.0 74.1 73.1 77.0 65.1 75.4 75.6
    RAS-13B             | notes       | -    83.5 -    75.1 80.0 -    76.0 -
    Seg-R1-7B           | one_thinker | 74.3 -    -    62.6 -    -    71.0 -
    Seg-Zero-3B         | seg_zero    | -    79.3 -    -    73.7 -    -    71.5
    Seg-Zero-7B         | seg_zero    | -    80.3 -    -    76.2 -    -    72.6
    SAM-R1-7B           | swim        | -    79.2 -    -    74.7 -    -    73.1
    VisionReasoner-7B   | swim        | -    76.6 -    -    72.1 -    -    67.2
    CoPRS-3B            | coprs       | 80.4 83.9 75.6 71.8 78.9 66.5 74.8 73.7
    CoPRS-7B            | coprs       | 81.6 85.3 79.5 75.9 80.3 69.7 76.2 76.2
    """,
    len(REFERRING_SPLITS),
)
"""Table 1: cIoU."""

REASONING_RESULTS = _parse(
    """
    OVSeg                  | survey   | 28.5 18.6 26.1 20.8
    ReLA (GRES)            | survey   | 22.4 19.9 21.3 22.0
    X-Decoder              | survey   | 22.6 17.9 21.7 16.3
    SEEM                   | survey   | 25.5 21.2 24.3 18.7
    Grounded-SAM           | survey   | 26.0 14.5 21.3 16.4
    LISA-7B                | evf_sam  | 44.4 46.0 36.8 34.1
    LISA-7B-LLaVA1.5       | seg_zero | 53.6 52.3 48.7 48.8
    LISA-7B-LLaVA1.5 (ft)  | evf_sam  | 61.3 62.9 55.6 56.9
    LISA-13B-LLaVA1.5      | seg_zero | 57.7 60.3 53.8 50.8
    LISA-13B-LLaVA1.5 (ft) | survey   | 65.0 72.9 61.3 62.2
    GSVA-7B (ft)           | survey   | 50.5 56.4 -    -
    SAM4MLLM               | seg_zero | 46.7 48.1 -    -
    SAM4MLLM-8B (ft)       | survey   | 58.4 60.4 -    -
    SegLLM-7B              | survey   | 57.2 54.3 52.4 48.4
    READ-7B (ft)           | survey   | 59.8 67.6 56.8 59.0
    POPEN-7B               | survey   | 60.2 64.5 -    -
    Qwen2.5VL-3B + SAM2    | seg_zero | 53.8 44.1 47.6 37.4
    Seg-Zero-3B            | seg_zero | 58.2 53.1 56.1 48.6
    Seg-Zero-7B            | seg_zero | 62.6 62.0 57.5 52.0
    PixelThink-7B          | survey   | 63.8 62.7 60.2 55.8
    SAM-R1-7B              | survey   | 64.0 55.8 60.2 54.3
    VisionReasoner-7B      | survey   | 66.3 -    63.6 -
    CoPRS-3B               | coprs    | 61.3 60.6 57.8 52.7
    CoPRS-7B               | coprs    | 65.2 64.5 59.8 55.1
    """,
    2 * len(REASONING_SPLITS),
)
"""Table 2: gIoU and cIoU of val, gIoU and cIoU of test."""

NOT_CHECKED = ("Seg-R1 on ReasonSeg", "Text4Seg on ReasonSeg", "PixelLM on ReasonSeg")
"""Results that the paper or its field names and no source at hand had."""
