"""GRPO with segmentation in one backward pass: the paper's training, built on TRL."""
