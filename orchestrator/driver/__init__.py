"""One training run, as the commands `train`, `score` and `check` drive it."""
