"""Curriculum of the tiny model: perception, segmentation and reasoning on generated scenes.

It uses the trainer, optimizers, losses and run directory of :mod:`coprs_deploy.training`, which
never imports it. Nothing is imported here, so that the package stays light.
"""
