"""The demonstration: downloads a small language model and human ratings, and trains on them."""
