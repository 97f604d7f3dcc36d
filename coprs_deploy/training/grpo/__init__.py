"""GRPO with segmentation in one backward pass: the paper's training, built on TRL.

TRL samples completions, normalizes rewards within groups, computes the policy loss and
synchronizes rollout engines. This package adds what is specific to CoPRS: the segmentation modules
attached to the policy, the masks decoded for each completion, their reward, and the joint loss.
"""
