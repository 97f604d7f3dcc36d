"""Who writes the reasoning: policies that turn an image and an instruction into concentrations."""

from coprs_deploy.policy.availability import availability
from coprs_deploy.policy.policy import Policy, PolicyRequest, PolicyResult, StopReason, TextDelta

__all__ = ["Policy", "PolicyRequest", "PolicyResult", "StopReason", "TextDelta", "availability"]
