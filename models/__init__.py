"""Frozen and trained causal language models: loading, exact log-probs, adapters, fingerprints, parallelism."""
