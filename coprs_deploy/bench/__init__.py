"""Benchmarks: cases in isolated workers, statistics, accuracy, reports and their comparison."""
