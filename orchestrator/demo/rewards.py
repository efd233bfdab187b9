"""An example of a reward function for `evaluation.sampling.reward: {function: ...}`."""

from orchestrator.demo.assets import load_lexicon


def sentiment(prompts: list[str], responses: list[str]) -> list[float]:
    """Return the sentiment of each response by VADER's lexicon, from -1 (negative) to 1 (positive)."""
    score = load_lexicon()
    return [score(response) for response in responses]
