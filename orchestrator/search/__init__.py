"""A search over many runs with Ray Tune."""
