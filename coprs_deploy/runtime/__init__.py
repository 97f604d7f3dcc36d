"""The product: a picture and an instruction become reasoning, a prior and a mask."""

from coprs_deploy.policy import Words
from coprs_deploy.runtime.answer import Answer, PriorReady, Timings
from coprs_deploy.runtime.coprs import CoPRS
from coprs_deploy.runtime.options import RuntimeOptions

__all__ = ["Answer", "CoPRS", "PriorReady", "RuntimeOptions", "Timings", "Words"]
