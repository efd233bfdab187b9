"""How far two log-probs of one response may lie apart when the same model computed both."""

from typing import Any

from models.config import ModelConfig

TOLERANCE, TOLERANCE_16_BIT = 1e-3, 0.05
"""Nats per token, for float32 and for 16 or fewer bits."""
SLACK_TOKENS = 16
"""Rounding grows with the root of the tokens, so short responses are allowed more per token."""


def choose_tolerance(config: ModelConfig, device_type: str) -> float:
    """Return the nats per token that scores of a model on "cuda" or "cpu" may differ by."""
    return TOLERANCE if config.resolve_dtype(device_type) == "float32" else TOLERANCE_16_BIT


def allow_difference(tolerance: float, tokens: Any) -> Any:
    """Return how many nats the log-probs of responses of so many tokens (a number or an array) may differ."""
    return tolerance * (tokens + SLACK_TOKENS)
