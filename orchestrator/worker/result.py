"""The result that the workers of a run return. Imports nothing heavy: Ray Train's controller unpickles it."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """How training ended, the same on every rank but for the findings.

    Attributes:
        status: "done"; or an end that another start would only repeat: "diverged" (a loss is not finite),
            "refused" (a model cannot be used as the run file says) or "failed" (samples cannot be scored, or
            the checkpoint cannot be read); or "stopped" (after a checkpoint, since SIGTERM asked for it).
        reason: why the status is not "done".
        step: optimizer steps taken.
        exported_step: the step whose weights were exported.
        metrics: held-out metrics of the exported weights.
        phi_star: the dispersion constant that `phi_star: auto` was resolved to.
        plain_rows_reason: why prompts were computed once per response instead of once per pair, if they were.
        findings: messages of the numerical watch by name; of rank 0, the others have none.
    """

    status: Literal["done", "diverged", "refused", "failed", "stopped"]
    reason: str = ""
    step: int = 0
    exported_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    phi_star: float | None = None
    plain_rows_reason: str | None = None
    findings: dict[str, str] = field(default_factory=dict)
