"""A run from its start to its report: directory, states, checkpoints, processes, curves."""
