"""The segmentation path as PyTorch modules: no files, no devices chosen, no numpy.

``sam_encoder`` turns the padded image into keys, ``prior`` scores them with the policy's
concentration, ``mask_decoder`` turns the prior into a mask, and ``segmentation`` holds the three
together under the parameter names of a checkpoint.
"""

from coprs_deploy.models.segmentation import SegmentationModel

__all__ = ["SegmentationModel"]
