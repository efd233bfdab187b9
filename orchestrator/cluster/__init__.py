"""The Ray cluster: connecting to it, the resources of its nodes, and what a run needs of them."""
