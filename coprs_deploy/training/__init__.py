"""Training: the data that CoPRS learns from, and the recipes that it is trained by.

Nothing is imported here, so that ``import coprs_deploy.training`` stays light: torch, transformers,
accelerate and pyarrow are imported by the modules and functions that use them. The data side,
:mod:`~coprs_deploy.data.examples` and :mod:`~coprs_deploy.data.synthetic`, needs numpy,
Pillow and pycocotools, pyarrow for Parquet files, and never torch.
"""
