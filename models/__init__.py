"""Causal language models: loading, exact log-probs, adapters, fingerprints, parallel training."""
