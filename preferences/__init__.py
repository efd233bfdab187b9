"""Human preferences: from rows to pairs, from pairs to tokens, from tokens to batches."""
