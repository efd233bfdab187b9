"""An example of a reward function: `evaluation.sampling.reward: {function: ...}` names one such as this."""

from orchestrator.demo.assets import load_lexicon


def sentiment(prompts: list[str], responses: list[str]) -> list[float]:
    """How favourable each response is, by VADER's lexicon: from -1 to 1."""
    score = load_lexicon()
    return [score(response) for response in responses]
