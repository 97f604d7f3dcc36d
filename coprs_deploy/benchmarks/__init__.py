"""Benchmarks: each suite measures in processes of its own and writes one committed report."""
