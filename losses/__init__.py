"""Preference losses as a pipeline of five stages over per-pair sequence log-probabilities."""
