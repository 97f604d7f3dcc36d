"""Evaluation of predicted masks against ground truth: metrics, evaluator, plots, report."""
