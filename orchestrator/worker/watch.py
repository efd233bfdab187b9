"""What a run says about its own numbers while it trains: each finding once, in one line with its remedy.

The rules are functions of values that a step or an evaluation has anyway: its table, summed over ranks, and
its metrics. Each returns a message, or None where the numbers are as they should be.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from orchestrator.references.tolerance import allow_difference
from orchestrator.worker.metrics import StepTable

SURPRISE = 4.0
"""Nats per token by which a reference may be more surprised than its entropy lets it expect. SmolLM2-135M has
0.3 on plain text, 2.5 on text cut into single bytes, 5 or more on ids that are shifted or permuted."""
DISPLACEMENT = 0.1
"""Nats per token that chosen responses may lose since the first evaluation while margins rise."""
_CHOSEN = "eval/logps/chosen"
_MARGINS = ("eval/margin", "eval/rewards/margins")
_NAMED_PAIRS = 5

FindPlace = Callable[[int], str]
"""The file and line of the pair in a slot of the table."""


@dataclass(kw_only=True)
class NumericalWatch:
    """Applies the rules to the steps and evaluations of a run, on rank 0.

    Attributes:
        report: called with the step, the name and the message of each new finding.
        known: names of findings that an earlier start of the run has reported.
        initial_reference: the reference that scores exactly like the policy before its first update, if one
            does and the policy has no dropout.
        tolerance: nats per token that such scores may differ by.
        vocabulary_sizes: by reference name.
        first_evaluation: metrics of the run's first evaluation, with its `step`; None before it.
    """

    report: Callable[[int, str, str], None]
    known: set[str] = field(default_factory=set)
    initial_reference: str | None
    tolerance: float
    vocabulary_sizes: Mapping[str, int]
    first_evaluation: Mapping[str, float | None] | None = None

    def check_training_step(
        self, step: int, table: StepTable, metrics: Mapping[str, float], find_place: FindPlace
    ) -> None:
        """Check a training step; `step` counts the updates with the one that the table led to."""
        if step == 1:
            self._check_reference_tokens(step, table)
            if self.initial_reference is not None:
                self._report(
                    step,
                    "start",
                    find_unequal_start(table, self.initial_reference, self.tolerance, find_place),
                )
        self._report(step, "not_finite.train", find_non_finite(step, metrics, table, find_place))

    def check_evaluation(
        self,
        step: int,
        table: StepTable,
        metrics: Mapping[str, float],
        find_place: FindPlace,
        *,
        judged: StepTable | None = None,
    ) -> None:
        """Check an evaluation after `step` updates.

        `judged` is the table of the pairs that `eval/logps/chosen` is a mean of, if not of all.
        """
        if step == 0:
            self._check_reference_tokens(step, table)
        if self.first_evaluation is None:
            self.first_evaluation = {**metrics, "step": step}
        judged = table if judged is None else judged
        tokens = float(judged.compute_mean(judged["chosen_length"]))
        self._report(step, "displacement", find_displacement(self.first_evaluation, step, metrics, tokens))
        self._report(step, "not_finite.eval", find_non_finite(step, metrics, table, find_place))

    def _check_reference_tokens(self, step: int, table: StepTable) -> None:
        for name in table.references:
            if name in self.vocabulary_sizes:
                columns = (table[f"logp_per_token/{name}"], table[f"entropy/{name}"])
                logp, entropy = (float(column.mean()) for column in columns)
                found = find_wrong_tokens(name, logp, entropy * math.log(self.vocabulary_sizes[name]))
                self._report(step, f"tokens.{name}", found)

    def _report(self, step: int, name: str, message: str | None) -> None:
        if message is not None and name not in self.known:
            self.known.add(name)
            self.report(step, name, message)


def find_unequal_start(
    table: StepTable, reference: str, tolerance: float, find_place: FindPlace
) -> str | None:
    """Find a pair whose log-ratios to the reference that the policy starts from are not 0.

    Args:
        table: of the first step, before its update.
        reference: the name of a reference whose fingerprint is that of the initial policy.
        tolerance: nats per token.
        find_place: names a pair.
    """
    ratio = 2 * table[f"logratio/{reference}"].abs()  # of both responses together
    if reference == table.references[0]:
        ratio = torch.maximum(ratio, table["primary_gap"].abs())
    tokens = table["chosen_length"] + table["rejected_length"]
    excess = (ratio - allow_difference(tolerance, tokens)).nan_to_num(nan=math.inf)
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return None
    return (
        f"step 1: the policy starts as reference {reference!r}, but before any update their log-probs differ "
        f"by {float(ratio[worst]):.4g} nats over {int(tokens[worst])} tokens at {find_place(worst)}, and "
        f"beyond rounding in {int((excess > 0).sum())} of {len(excess)} pairs; if polyref score --audit 100 "
        "finds its stored scores wrong, delete them, else set training.precision: float32"
    )


def find_wrong_tokens(reference: str, logp: float, entropy: float) -> str | None:
    """Find a reference that is surprised by nearly every token, as if ids meant others to its weights.

    A model that knows its tokens gives them about minus its entropy on average, however hard the text is.

    Args:
        reference: its name.
        logp: its mean log-prob of a response token, nats.
        entropy: its mean entropy at a response token, nats.
    """
    if not logp < -entropy - SURPRISE:
        return None
    return (
        f"reference {reference!r} gives a response's tokens {logp:.2f} nats on average, where its own "
        f"entropy lets it expect {-entropy:.2f}: its tokenizer makes other ids than its weights know, or "
        f"these are not the weights you mean; check references.models.{reference}: model, revision, "
        "chat_template"
    )


def find_displacement(
    first: Mapping[str, float | None], step: int, metrics: Mapping[str, float], chosen_tokens: float
) -> str | None:
    """Find chosen responses that lose probability while margins rise, since the first evaluation.

    This is likelihood displacement (Razin et al. 2024, arXiv:2410.08847): both responses become less likely,
    the rejected ones faster, and what the policy writes instead was in no pair.

    Args:
        first: metrics of the first evaluation, with its `step`.
        step: optimizer steps before this evaluation.
        metrics: of this evaluation.
        chosen_tokens: mean length of a chosen response.
    """
    chosen, first_chosen = metrics.get(_CHOSEN), first.get(_CHOSEN)
    margin = next((name for name in _MARGINS if name in metrics and first.get(name) is not None), None)
    if chosen is None or first_chosen is None or margin is None:
        return None
    before, after = float(first[margin] or 0), metrics[margin]
    per_token = (first_chosen - chosen) / max(chosen_tokens, 1)
    if not (per_token > DISPLACEMENT and after > before):
        return None
    return (
        f"step {step}: chosen responses become unlikely while margins rise: since step {first['step']} "
        f"{_CHOSEN} fell from {first_chosen:.4g} to {chosen:.4g} ({per_token:.2g} nats per token), and "
        f"{margin} rose from {before:.4g} to {after:.4g}; set loss.sft_weight (as preset rpo does), lower "
        "training.learning_rate, or with references raise loss.beta"
    )


def find_non_finite(
    step: int, metrics: Mapping[str, float], table: StepTable, find_place: FindPlace
) -> str | None:
    """Find metrics that are NaN or infinite, such as entropies, rewards and means of samples.

    Only if there are any, the table is read for the pairs they come from.
    """
    names = [name for name, value in metrics.items() if not math.isfinite(value)]
    if not names:
        return None
    slots = (~torch.isfinite(table.values[:-1])).any(dim=1).nonzero().flatten().tolist()
    places = ", ".join(find_place(slot) for slot in slots[:_NAMED_PAIRS])
    more = f" and {len(slots) - _NAMED_PAIRS} more" if len(slots) > _NAMED_PAIRS else ""
    where = f"at {places}{more}: look at these rows" if slots else "but in no pair: look at the samples"
    return (
        f"step {step}: {', '.join(names)} not finite, {where}, lower training.learning_rate, or set "
        "policy.dtype and training.precision to float32"
    )
