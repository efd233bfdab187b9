"""The Ray cluster: connecting to it, what its nodes offer, and what a run needs of them."""
