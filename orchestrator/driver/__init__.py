"""One training run as the command sees it."""
