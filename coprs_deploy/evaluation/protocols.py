"""Protocols: how published evaluations select sentences, count pixels and average.

Metrics of two protocols cannot be compared, so every report names its own. Sources: LISA
(``utils/dataset.py``, ``train_ds.py``), Seg-Zero and VisionReasoner (``evaluation``), the public
CoPRS code, ReLA (``refer_evaluation.py``) for gRefCOCO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from coprs_deploy.data.examples import Example, ExampleFile, ExampleSource


@dataclass(frozen=True)
class EvaluationProtocol:
    """Rules of an evaluation.

    Attributes:
        name: as in ``--protocol``.
        first_sentences: use only the first sentence of each reference; None is what the published
            evaluation of the data set does.
        lower_case: instructions that are changed to lower case: ``none``, ``references`` (the
            expressions of REFER) or ``all``.
        stripped: characters that are removed from both ends of an instruction; None for spaces, as
            in ``str.strip``.
        ignored_pixels: ``exclude`` removes ignored pixels from prediction and ground truth;
            ``foreground`` adds them to the ground truth.
        empty_iou: IoU of two empty masks.
        epsilon: added to the union in the IoU of an example; not in the cIoU.
        no_match: how an example without a target counts. ``mask``: as an empty mask, in every mean.
            ``answer``: its IoU is 1 without a prediction, else 0; it is left out of the precision.
            ``apart``: it is in no mean of masks.
        strict_precision: whether precision needs an IoU above the threshold; else at least it.
    """

    name: str
    first_sentences: bool | None = None
    lower_case: Literal["none", "references", "all"] = "none"
    stripped: str | None = ""
    ignored_pixels: Literal["exclude", "foreground"] = "exclude"
    empty_iou: float = 0.0
    epsilon: float = 0.0
    no_match: Literal["mask", "answer", "apart"] = "apart"
    strict_precision: bool = True

    def instruction(self, text: str, *, is_reference: bool) -> str:
        """Return the text of an example as the model gets it."""
        if self.lower_case == "all" or (self.lower_case == "references" and is_reference):
            text = text.lower()
        return text.strip(self.stripped)


LISA = EvaluationProtocol(
    "lisa", lower_case="references", stripped=None, empty_iou=1.0, epsilon=1e-5, no_match="mask"
)
SEG_ZERO = EvaluationProtocol(
    "seg_zero",
    first_sentences=True,
    lower_case="all",
    stripped='."?!',
    ignored_pixels="foreground",
    no_match="answer",
)
COPRS = EvaluationProtocol("coprs", first_sentences=True, empty_iou=1.0, no_match="mask")
GREFCOCO = EvaluationProtocol("grefcoco", no_match="answer", strict_precision=False)
TARGETS = EvaluationProtocol("targets")
"""Means over the examples with a target; no-match examples apart: that of generated scenes."""

PROTOCOLS = {each.name: each for each in (LISA, SEG_ZERO, COPRS, GREFCOCO, TARGETS)}


def default_protocol(examples: Sequence[Example]) -> EvaluationProtocol:
    """Return ``targets`` for scenes and example files, and that of its field for a data set."""
    if not isinstance(examples, ExampleSource) or isinstance(examples, ExampleFile):
        return TARGETS
    return GREFCOCO if examples.has_references and examples.has_no_match else LISA


def find_protocol(name: str) -> EvaluationProtocol:
    """Return a protocol by name.

    Raises:
        ValueError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol is {name!r}; accepted: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
