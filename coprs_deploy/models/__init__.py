"""Segmentation model as PyTorch modules, without files, devices or numpy.

``sam_encoder`` embeds the padded image, ``prior`` scores the embedding with the policy's
concentration, ``mask_decoder`` decodes the prior to a mask, and ``segmentation`` combines the three
under the parameter names of a checkpoint.
"""

from coprs_deploy.models.segmentation import SegmentationModel

__all__ = ["SegmentationModel"]
