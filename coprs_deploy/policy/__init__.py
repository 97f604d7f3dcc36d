"""Policies: image and instruction in, reasoning and concentrations out."""

from coprs_deploy.policy.availability import availability
from coprs_deploy.policy.policy import Policy, PolicyRequest, PolicyResult, StopReason, TextDelta

__all__ = ["Policy", "PolicyRequest", "PolicyResult", "StopReason", "TextDelta", "availability"]
