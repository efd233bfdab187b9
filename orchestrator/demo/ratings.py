"""Preference pairs with true soft labels, from short movie reviews that 15 to 29 people rated each.

A pair is two reviews with the same first words: these words are the prompt and the rest of each review is a
response, so a policy that learns to prefer the chosen ones writes more favourable reviews. The soft label
is the share of votes for the chosen one if one rater of each review is drawn at random: P(rating of chosen
above rating of rejected), a tie counting half. Raters are anonymous in this data, so the ratings of one rater
cannot be compared with each other.

Every review is in one row only, so held-out pairs share no text with the training pairs, nor with the
reviews that the movie reference is fine-tuned on. Training and held-out pairs alike have a vote share of at
least `MIN_SHARE`: nearer to one half there is hardly a majority to agree with.
"""

import json
import random
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from orchestrator.files import replace_text

PROMPT = "Movie review: "
MIN_SHARE = 0.6
SHORTEST, LONGEST = 5, 14
"""Number of words of a review: short reviews keep the demonstration within minutes on a laptop."""
LONGEST_OPENING = 4
"""Largest number of a review's words in a prompt."""

Row = dict[str, Any]


@dataclass(frozen=True)
class RatedText:
    """A text and the ratings of all its raters, from -4 (extremely negative) to 4 (extremely positive)."""

    text: str
    ratings: tuple[int, ...]

    @property
    def words(self) -> list[str]:
        """The text's words; joined by single spaces they are the text."""
        return self.text.split(" ")


@dataclass(frozen=True)
class DemoRows:
    """Rows of the three files: preference pairs for training and evaluation, reviews for the reference."""

    train: list[Row]
    eval: list[Row]
    reviews: list[Row]


def read_movie_reviews(folder: Path) -> list[RatedText]:
    """Read the rated snippets in `fetch_human_ratings()`, each text once, in the file's order."""
    texts = _split_columns(folder / "movieReviewSnippets_GroundTruth.txt", text_column=2)
    ratings = _split_columns(folder / "movieReviewSnippets_anonDataRatings.txt", text_column=3)
    reviews: dict[str, RatedText] = {}
    for name, text in texts.items():
        spaced = " ".join(text.split())
        reviews.setdefault(spaced.casefold(), RatedText(spaced, tuple(json.loads(ratings[name]))))
    return list(reviews.values())


def compute_vote_share(one: Sequence[int], other: Sequence[int]) -> float:
    """Return P(random rating of `one` > random rating of `other`), ties counting half; in [0, 1]."""
    ordered = sorted(other)
    halves = sum(bisect_left(ordered, rating) + bisect_right(ordered, rating) for rating in one)
    return halves / (2 * len(one) * len(other))


def build_preference_rows(
    texts: Iterable[RatedText],
    *,
    train: int = 400,
    held_out: int = 320,
    reviews: int = 384,
    seed: int = 0,
) -> DemoRows:
    """Draw the rows: `held_out` and `train` pairs, then `reviews` rows of texts that no pair uses.

    The same texts, counts and seed give the same rows; the held-out pairs do not depend on `train`.

    Raises:
        ValueError: the texts yield fewer rows than requested.
    """
    rng = random.Random(seed)
    pairs, unpaired = _pair_texts([text for text in texts if SHORTEST <= len(text.words) <= LONGEST], rng)
    rows = [row for pair in pairs if (row := _build_pair_row(*pair))["soft_label"] >= MIN_SHARE]
    if len(rows) < train + held_out or len(unpaired) < reviews:
        raise ValueError(
            f"{train} + {held_out} pairs and {reviews} reviews were requested, but the texts give only "
            f"{len(rows)} pairs and {len(unpaired)} reviews; ask for fewer"
        )
    return DemoRows(
        train=rows[held_out : held_out + train],
        eval=rows[:held_out],
        reviews=[_build_review_row(text) for text in unpaired[:reviews]],
    )


def write_rows(rows: DemoRows, folder: Path) -> dict[str, Path]:
    """Write `train.jsonl`, `eval.jsonl` and `reviews.jsonl`; return their paths by stem."""
    paths = {}
    for name, content in (("train", rows.train), ("eval", rows.eval), ("reviews", rows.reviews)):
        paths[name] = folder / f"{name}.jsonl"
        replace_text(paths[name], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
    return paths


def _split_columns(file: Path, *, text_column: int) -> dict[str, str]:
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    fields = (line.split("\t", text_column) for line in lines if line.strip())
    return {row[0]: row[text_column] for row in fields}


def _pair_texts(
    texts: Iterable[RatedText], rng: random.Random
) -> tuple[list[tuple[RatedText, RatedText]], list[RatedText]]:
    """Pair texts with the same first word, preferably the same two, at random.

    Returns the pairs and the unpaired texts.
    """
    by_opening: dict[str, list[RatedText]] = defaultdict(list)
    for text in texts:
        by_opening[text.words[0]].append(text)
    pairs, unpaired = [], []
    for opening in sorted(by_opening):
        group = by_opening[opening]
        rng.shuffle(group)
        group.sort(key=lambda text: text.words[1])
        pairs += list(zip(group[::2], group[1::2], strict=False))
        unpaired += group[len(group) // 2 * 2 :]
    rng.shuffle(pairs)
    rng.shuffle(unpaired)
    return pairs, unpaired


def _build_pair_row(one: RatedText, other: RatedText) -> Row:
    share = compute_vote_share(one.ratings, other.ratings)
    chosen, rejected = (one, other) if share >= 0.5 else (other, one)
    shared = _count_shared_words(chosen.words, rejected.words)
    return {
        "prompt": PROMPT + " ".join(chosen.words[:shared]),
        "chosen": "".join(f" {word}" for word in chosen.words[shared:]),
        "rejected": "".join(f" {word}" for word in rejected.words[shared:]),
        "soft_label": round(max(share, 1 - share), 6),
        "meta": {
            "chosen_rating": round(fmean(chosen.ratings), 4),
            "rejected_rating": round(fmean(rejected.ratings), 4),
            "disagreement": round((pstdev(chosen.ratings) + pstdev(rejected.ratings)) / 2, 4),
        },
    }


def _build_review_row(text: RatedText) -> Row:
    return {"prompt": PROMPT + text.words[0], "completion": "".join(f" {word}" for word in text.words[1:])}


def _count_shared_words(one: Sequence[str], other: Sequence[str]) -> int:
    """Count the equal leading words, up to `LONGEST_OPENING` and such that each text has a word left."""
    limit = min(len(one) - 1, len(other) - 1, LONGEST_OPENING)
    return next((index for index in range(limit) if one[index] != other[index]), limit)
