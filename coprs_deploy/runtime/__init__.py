"""The runtime: an image and an instruction become reasoning, a prior and masks."""

from coprs_deploy.policy import TextDelta
from coprs_deploy.runtime.coprs import CoPRS
from coprs_deploy.runtime.options import RuntimeOptions
from coprs_deploy.runtime.result import PriorEvent, SegmentationResult, Timings

__all__ = ["CoPRS", "PriorEvent", "RuntimeOptions", "SegmentationResult", "TextDelta", "Timings"]
