"""Metrics and MLflow runs, progress on the console, and a run's plots."""
