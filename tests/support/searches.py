"""Made-up searches: records and metrics files as a search leaves them, without a training."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.search.journal import TrialRecord

STEPS, EVERY = 100, 10
GAINS = {
    "dpo": 0.08,
    "gdpo": 0.1,
    "mallows_theta": 0.12,
    "simpo": 0.05,
    "mrpo": 0.11,
    "ipo": 0.06,
    "ropo": 0.07,
    "geometric_references": 0.09,
    "hinge": 0.03,
}


@dataclass(frozen=True)
class Goal:
    """An objective, as a sweep file has it."""

    metric: str
    mode: Literal["max", "min"] = "max"


ACCURACY = Goal("eval/accuracy")
KL = Goal("eval/kl/base", "min")


def search(
    folder: Path,
    *,
    points: int = 8,
    repeats: int = 1,
    families: Sequence[str] = tuple(GAINS)[:5],
    failed: Sequence[int] = (),
    controls: bool = False,
    kl: bool = False,
    stopped: float = 0.0,
    seed: int = 0,
) -> tuple[list[TrialRecord], dict[int, Path]]:
    """Records, and the folder of each trial by its number."""
    rng = random.Random(seed)
    records: list[TrialRecord] = []
    for _ in range(points):
        point = _point(rng, families)
        first = _enter(records, point, repeats, None)
        if controls and point["loss.preset"] in ("gdpo", "mallows_theta"):
            keep = ("loss.beta", "training.learning_rate", "training.warmup")
            _enter(records, {"loss.preset": "dpo"} | {k: point[k] for k in keep}, repeats, first)
    for record in records:
        reached = STEPS
        if rng.random() < stopped:
            record.status, reached = "stopped", rng.choice([20, 40])
        if record.number in failed:
            record.status, reached = "failed", 20
            record.reason = (
                "the loss is not finite at step 23; lower training.learning_rate [pairs train.jsonl:7]"
            )
        _run(record, reached, rng, folder / record.name, kl)
    return records, {record.number: folder / record.name for record in records}


def _point(rng: random.Random, families: Sequence[str]) -> dict[str, Any]:
    family = rng.choice(list(families))
    point: dict[str, Any] = {"loss.preset": family, "loss.beta": 10 ** rng.uniform(-2, 0)}
    if family == "simpo":
        point["loss.margin"] = rng.uniform(0.0, 1.5)
    if family == "mallows_theta":
        point["loss.dispersion.phi_star"] = rng.choice(["auto", 0.29])
    if family in ("mrpo", "geometric_references"):
        point["references.use"] = ["base", "movie-sft"]
        point["loss.references.trust_region"] = rng.choice([None, 0.1, 0.3])
    else:
        point["references.use"] = ["base"]
    return point | {
        "training.learning_rate": 10 ** rng.uniform(-6, -4),
        "training.warmup": rng.choice([0.0, 0.1]),
    }


def _enter(records: list[TrialRecord], point: dict[str, Any], repeats: int, control_of: int | None) -> int:
    first = len(records) + 1
    for repeat in range(repeats):
        records.append(
            TrialRecord(
                number=first + repeat,
                point_id=first,
                repeat=repeat,
                control_of=control_of,
                point=point,
                status="finished",
            )
        )
    return first


def _run(record: TrialRecord, reached: int, rng: random.Random, folder: Path, kl: bool) -> None:
    folder.mkdir(parents=True)
    point = record.point
    off = math.log10(point["training.learning_rate"] / 2e-5)
    gain = GAINS[point["loss.preset"]] + 0.05 - 0.05 * off**2 + rng.gauss(0, 0.006)
    began = 1.7e9 + 60 * record.number
    lines: list[dict[str, Any]] = []
    for step in range(0, reached + 1, EVERY):
        accuracy = 0.55 + gain * (1 - math.exp(-step / 30)) + rng.gauss(0, 0.004)
        line: dict[str, Any] = {"step": step, "time": began + step, "eval/accuracy": accuracy}
        line |= {"eval/accuracy_interval": 0.02, "eval/loss": 0.7 - gain * step / STEPS}
        if kl:
            line["eval/kl/base"] = (0.1 + step / point["loss.beta"] ** 0.5 / 20) * rng.uniform(0.8, 1.2)
            line["eval/kl/movie-sft"] = line["eval/kl/base"] + 9
        lines += [line, {"step": step + 1, "time": began + step + 1, "loss": 0.6}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record.step, record.seconds = reached, 60.0 + reached
    if record.status != "failed":
        record.result = {key: value for key, value in lines[-2].items() if key.startswith("eval/")}
