"""Export: checkpoint to bundle, with every graph proven equivalent to PyTorch."""

from coprs_deploy.export.exporter import ExportReport, export_checkpoint
from coprs_deploy.export.options import ExportOptions
from coprs_deploy.export.verifier import verify_bundle

__all__ = ["ExportOptions", "ExportReport", "export_checkpoint", "verify_bundle"]
