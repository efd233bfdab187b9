"""Human preferences: rows become pairs, pairs become tokens, tokens become batches."""
