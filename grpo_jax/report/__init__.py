"""Metrics, the prediction beside the measurement, figures, pages and comparisons; each file is imported by its own name."""
