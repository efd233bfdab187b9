"""Columns of public preference data sets, and the settings with which their rows are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """The columns by which a data set is known, and how they are read.

    Attributes:
        name: the data set.
        columns: the names that it is known by: all must be there.
        settings: `columns`, `pair` and `label` of `SourceConfig`, where field names do not say them.
        alternatives: labels that the data has too, to choose instead.
        question: labels among which only the user can choose.
        refusal: why its rows are no pairs, with what to do instead.
    """

    name: str
    columns: frozenset[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    alternatives: tuple[Mapping[str, Any], ...] = ()
    question: tuple[Mapping[str, Any], ...] = ()
    refusal: str = ""


def _strength(column: str) -> dict[str, Any]:
    """Return the label of HelpSteer's scale, on which 3 means that the second response is much better."""
    return {"type": "strength", "column": column, "range": [-3, 3], "prefers": "second"}


def _winner(column: str, first: Any, second: Any, *tie: Any) -> dict[str, Any]:
    label = {"type": "winner", "column": column, "first": first, "second": second}
    return label | ({"tie": list(tie)} if tie else {})


def _scores(first: str, second: str) -> dict[str, Any]:
    return {"type": "scores", "columns": [first, second], "temperature": 1.0}


LAYOUTS = (
    Layout(
        "HelpSteer3",
        frozenset({"context", "response1", "response2", "overall_preference", "individual_preference"}),
        {"pair": ["response1", "response2"], "label": _strength("overall_preference")},
        alternatives=({**_strength("individual_preference"), "type": "raters", "field": "score"},),
    ),
    Layout(
        "HelpSteer2, preferences",
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        {"pair": ["response_1", "response_2"], "label": _strength("preference_strength")},
    ),
    Layout(
        "HelpSteer2, ratings",
        frozenset(
            {"prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"}
        ),
        refusal="its rows rate one response each, and polyref reads pairs; those of HelpSteer2 are in its "
        "preference folder: hf://datasets/nvidia/HelpSteer2/preference/preference.jsonl.gz",
    ),
    Layout(
        "UltraFeedback, completions with scores",
        frozenset({"instruction", "models", "completions", "correct_answers", "incorrect_answers"}),
        {
            "columns": {
                "prompt": "instruction",
                "completions": "completions.response",
                "scores": "completions.overall_score",
            }
        },
    ),
    Layout(
        "UltraFeedback, binarized",
        frozenset({"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}),
        alternatives=(_scores("score_chosen", "score_rejected"),),
    ),
    Layout(
        "UltraFeedback, binarized with instructions",
        frozenset({"instruction", "chosen", "rejected", "chosen-rating", "rejected-rating"}),
        {"columns": {"prompt": "instruction"}},
        alternatives=(_scores("chosen-rating", "rejected-rating"),),
    ),
    Layout(
        "UltraFeedback, binarized and cleaned",
        frozenset({"prompt", "chosen", "rejected", "chosen-rating", "rejected-rating"}),
        alternatives=(_scores("chosen-rating", "rejected-rating"),),
    ),
    Layout(
        "a mixture with ratings",
        frozenset({"chosen", "rejected", "chosen_rating", "rejected_rating"}),
        alternatives=(_scores("chosen_rating", "rejected_rating"),),
    ),
    Layout(
        "Stanford Human Preferences",
        frozenset({"history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"}),
        {
            "columns": {"prompt": "history"},
            "pair": ["human_ref_A", "human_ref_B"],
            "label": _winner("labels", 1, 0),
        },
    ),
    Layout(
        "arena conversations",
        frozenset({"model_a", "model_b", "winner", "conversation_a", "conversation_b"}),
        {
            "pair": ["conversation_a", "conversation_b"],
            "label": _winner("winner", "model_a", "model_b", "tie", "tie (bothbad)", "both_bad"),
        },
    ),
    Layout(
        "PKU-SafeRLHF",
        frozenset({"prompt", "response_0", "response_1", "better_response_id", "safer_response_id"}),
        {"pair": ["response_0", "response_1"]},
        question=(_winner("better_response_id", 0, 1), _winner("safer_response_id", 0, 1)),
    ),
    Layout(
        "PKU-SafeRLHF, one dimension",
        frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
        {"pair": ["response_0", "response_1"], "label": _winner("better_response_id", 0, 1)},
    ),
    Layout(
        "summaries with comparisons",
        frozenset({"info", "summaries", "choice", "worker"}),
        {
            "columns": {"prompt": "info.post"},
            "pair": ["summaries.0.text", "summaries.1.text"],
            "label": _winner("choice", 0, 1),
        },
    ),
    Layout(
        "Nectar",
        frozenset({"prompt", "answers", "turns", "num_responses"}),
        {"columns": {"completions": "answers.answer", "ranks": "answers.rank"}},
    ),
    Layout(
        "ShareGPT with two answers",
        frozenset({"conversations", "chosen", "rejected"}),
        {"columns": {"prompt": "conversations"}},
    ),
)
"""In the order in which they are tried."""

PROMPT_NAMES = ("question", "instruction", "input", "query", "history", "trajectory")
"""Columns that hold the prompt of chosen and rejected where no column is called so, most telling first."""
