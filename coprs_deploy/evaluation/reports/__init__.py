"""Report of an evaluation: metrics, plots, galleries, and the published results beside them."""
