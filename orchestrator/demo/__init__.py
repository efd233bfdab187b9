"""The demonstration: a small real language model and human ratings, fetched once, and their use."""
