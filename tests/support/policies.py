"""What a finished run hands over for registration, in small."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from models.probe import LogitProbe, build_probe_rows, compute_probe_logits
from orchestrator.registry.lineage import Lineage, PinnedReference

ROWS = [[5, 80, 33, 120, 7, 7, 200], [99, 1, 4, 4, 61, 250, 13, 2]]


@dataclass(frozen=True)
class Exported:
    """What a finished LoRA run leaves in its folder, and the model still in hand."""

    model: PeftModel
    base: Path
    merged: Path
    adapter: Path
    probe: LogitProbe


def lineage(base: str = "tiny/base@0123abc", accuracy: float = 0.75, **changes: object) -> Lineage:
    settings: dict[str, object] = {
        "base_model": base,
        "preset": "mallows_theta",
        "loss": {"beta": 0.1, "link": {"type": "logistic"}, "references": {"weights": (0.5, 0.5)}},
        "references": {
            "base": PinnedReference("tiny/base@0123abc", "f" * 40),
            "movie": PinnedReference("models:/movie-sft/4", "e" * 40),
        },
        "primary": "base",
        "data_digest": "d" * 40,
        "eval_digest": "a" * 40,
        "judged_set": "in_domain",
        "counts": {"train pairs": 900, "held-out pairs": 100, "skipped, too long": 3},
        "before": {"eval/accuracy": 0.5},
        "after": {"eval/accuracy": accuracy, "eval/label_nll": 0.61},
        "config": {
            "tracking": {"uri": "http://me:hunter2@mlflow.example"},
            "extra": [{"api_key": "hunter2"}],
        },
        "code": {"polyref.version": "0.1.0"},
    }
    return Lineage(**(settings | changes))  # type: ignore[arg-type]


def probe_model(model: torch.nn.Module, initial: torch.nn.Module | None = None) -> LogitProbe:
    """The probe of a float32 model, and of what it was before it was trained."""
    rows = build_probe_rows(ROWS)
    start = None if initial is None else compute_probe_logits(initial, rows)
    return LogitProbe(rows, compute_probe_logits(model, rows), torch.float32, start)
