"""The named sets of an evaluation: slices of its one table, each with metrics of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from orchestrator.config.eval_sets import make_set_names
from orchestrator.worker.metrics import MetricFlags, StepTable, compute_eval_metrics
from preferences.split import TokenizedSplit

SET_METRICS = ("accuracy", "loss", "rewards/margins", "label_nll", "calibration_error")
"""Metrics that every set has, where the run has them."""


@dataclass(frozen=True)
class EvaluationSets:
    """The rows of the held-out sets.

    Attributes:
        judged: (N,) rows that `eval/accuracy`, `eval/loss` and so on are means of, ascending.
        rows: by name, (N,) rows of each set or source; empty if there is nothing to tell apart.
    """

    judged: Tensor
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_split(cls, split: TokenizedSplit, judged_set: str | None) -> "EvaluationSets":
        """Find the sets of a held-out split.

        Args:
            split: the held-out rows.
            judged_set: the set that the run is judged by, if `data.eval` names sets; else all rows count, and
                the sources of a mixture are told apart.
        """
        everything = torch.arange(len(split))
        if judged_set is None and len(split.source_names) == 1:
            return cls(everything)
        names = make_set_names(split.source_names) if judged_set is None else split.source_names
        index = torch.zeros(len(split)) if split.source_index is None else torch.tensor(split.source_index)
        rows = {name: torch.nonzero(index == number)[:, 0] for number, name in enumerate(names)}
        return cls(everything if judged_set is None else rows[judged_set], rows)

    def compute_metrics(self, table: StepTable, flags: MetricFlags) -> dict[str, float]:
        """Compute the metrics of the judged rows, and `eval/<set>/<metric>` of every set that has pairs.

        `label_nll` and `calibration_error` are of sets that have soft labels.
        """
        metrics = compute_eval_metrics(table.select(self.judged), flags)
        for name, rows in self.rows.items():
            part = table.select(rows)
            has_soft_labels = flags.has_soft_labels and bool((part["soft_label"] != 1).any())
            of_set = compute_eval_metrics(part, replace(flags, has_soft_labels=has_soft_labels))
            metrics |= {f"eval/{name}/{m}": of_set[f"eval/{m}"] for m in SET_METRICS if f"eval/{m}" in of_set}
        return metrics
