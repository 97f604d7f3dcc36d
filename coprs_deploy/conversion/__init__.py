"""Conversion of public weights to checkpoints: SAM, policies, public training checkpoints."""

from coprs_deploy.conversion.converters import (
    ConversionOptions,
    checkpoint_from_checkpoint,
    checkpoint_from_policy_and_sam,
    checkpoint_from_public_training,
    random_checkpoint,
)

__all__ = [
    "ConversionOptions",
    "checkpoint_from_checkpoint",
    "checkpoint_from_policy_and_sam",
    "checkpoint_from_public_training",
    "random_checkpoint",
]
