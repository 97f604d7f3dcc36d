"""Training of models that start from a checkpoint: recipes, supervised stages and GRPO.

Nothing is imported here, so that ``import coprs_deploy.training`` stays light. Training data is
read by :mod:`coprs_deploy.data`; the tiny model is trained by :mod:`coprs_deploy.curriculum`.
"""
