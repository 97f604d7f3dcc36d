"""Judging answers: overlaps with the truth, figures over many answers, prior against mask."""
