"""One training run as its workers see it."""
