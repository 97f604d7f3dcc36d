"""GRPO with segmentation in one backward pass: the paper's training, carried by TRL.

TRL samples, scores groups, computes the policy's loss and synchronizes rollout engines. What is
CoPRS's own lies here: the segmentation modules that hang on the policy, the masks that are decoded
for each sampled response and earn its reward, and the joint loss.
"""
