"""Distillation of a light image encoder from the image encoder of a checkpoint."""
