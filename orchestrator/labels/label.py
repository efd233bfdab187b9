"""The command `label`: read pairs, ask judges which response is better, and write soft labels."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console

from orchestrator.cluster.connection import connect_to_ray
from orchestrator.cluster.shared_storage import refuse_unshared
from orchestrator.errors import RunFailed, UsageError
from orchestrator.files import replace_text
from orchestrator.labels.endpoint import EndpointJudge
from orchestrator.labels.local_judges import (
    LocalJudge,
    ask_local_judges,
    find_fitting_pairs,
    find_local_judges,
    read_device_type,
)
from orchestrator.labels.output import (
    LINEAGE_VERSION,
    REQUEST,
    build_text_table,
    read_lineage,
    refuse_other_lineage,
    write_labels,
)
from orchestrator.labels.pairs import UnlabelledPairs, read_unlabelled_pairs
from orchestrator.labels.report import draw_report, print_report, write_report
from orchestrator.labels.settings import LabelSettings
from orchestrator.labels.statistics import compute_statistics
from orchestrator.labels.verdicts import Verdicts, combine_verdicts
from orchestrator.redaction import redact
from orchestrator.storage.probe import refuse_unwritable, refuse_unwritable_file
from orchestrator.tracking.code_version import read_code_tags
from orchestrator.tracking.progress import make_plain_console


@dataclass(frozen=True)
class _Job:
    """Pairs that every judge can read, and the judges."""

    settings: LabelSettings
    pairs: UnlabelledPairs
    too_long: int
    local: Sequence[LocalJudge]
    endpoint: EndpointJudge | None

    def build_request(self, device_type: str) -> dict[str, Any]:
        """Return everything that decides the labels."""
        local = [judge.for_device(device_type) for judge in self.local]
        identities: dict[str, dict[str, Any]] = {
            judge.choice.name: {"fingerprint": judge.reader.fingerprint} for judge in local
        }
        settings = self.settings
        if settings.endpoint is not None and self.endpoint is not None:
            identities[self.endpoint.choice.name] = {
                "url": redact(settings.endpoint.url),
                "model": self.endpoint.choice.model,
                "votes": settings.endpoint.votes,
            }
        return {
            "source": self.pairs.digest,
            "judges": {
                judge.name: {"kind": judge.kind, "weight": judge.weight} | identities[judge.name]
                for judge in settings.judges
            },
            "template": settings.template.text,
            "answers": list(settings.answers),
            "temperature": settings.temperature,
        }


def label_pairs(settings: LabelSettings) -> None:
    """Label pairs and write them with their lineage and a report; a second call does nothing.

    A call that was killed is repeated at little cost: scores and answers are kept under the storage path.

    Raises:
        UsageError, DataError, ModelError: the input is wrong, or the output is of other labels.
        RunFailed: a judge or an endpoint failed.
    """
    console = make_plain_console()
    output = settings.output
    refuse_unwritable_file(output, "--to")
    refuse_unwritable(settings.storage_path)
    written = read_lineage(output)
    job = _prepare_job(settings, console)
    if written is not None:
        refuse_other_lineage(output, written, job.build_request(written.get("device_type", "cpu")))
        console.print(f"{output} has these labels already: nothing to do")
        return
    with _lock_output(output):
        verdicts, device_type = _ask_judges(job, console)
        _write_results(job, verdicts, device_type, console)


def _prepare_job(settings: LabelSettings, console: Console) -> _Job:
    """Read the pairs, find the judges, and leave out pairs that are too long for one of them."""
    pairs = read_unlabelled_pairs(settings.sources, limit=settings.limit, on_bad_row=settings.on_bad_row)
    build_text_table(pairs.pairs)  # what cannot be written is refused before any judge is asked
    endpoints = [EndpointJudge(choice, settings) for choice in settings.list_judges("endpoint")]
    local = find_local_judges(settings, pairs.pairs)
    fitting = find_fitting_pairs(local, len(pairs.pairs))
    too_long = len(pairs.pairs) - len(fitting)
    console.print(
        f"{len(pairs.pairs):,} pairs"
        + (f", {too_long:,} skipped (longer than a judge's positions)" if too_long else "")
        + "".join(f", {count:,} skipped ({reason})" for reason, count in pairs.skipped.items())
    )
    if not len(fitting):
        raise UsageError(
            "every pair is longer than a judge's positions; give a judge that reads longer texts"
        )
    return _Job(
        settings,
        pairs.take(fitting.tolist()),
        too_long,
        [judge.take_pairs(fitting) for judge in local],
        endpoints[0] if endpoints else None,
    )


def _ask_judges(job: _Job, console: Console) -> tuple[dict[str, Verdicts], str]:
    """Ask all judges; return their verdicts in the order of the command, and the device type."""
    verdicts: dict[str, Verdicts] = {}
    device_type = "cpu"
    if job.endpoint is not None:
        verdicts[job.endpoint.choice.name] = job.endpoint.ask(job.pairs.pairs, console)
    if job.local:
        with connect_to_ray():
            refuse_unshared(job.settings.storage_path)
            device_type = read_device_type()
            judges = [judge.for_device(device_type) for judge in job.local]
            verdicts |= ask_local_judges(judges, job.settings, console)
    return {judge.name: verdicts[judge.name] for judge in job.settings.judges}, device_type


def _write_results(job: _Job, verdicts: Mapping[str, Verdicts], device_type: str, console: Console) -> None:
    """Combine verdicts to labels, print the report and write all files, the labels last."""
    settings, output = job.settings, job.settings.output
    labels = combine_verdicts(verdicts, {judge.name: judge.weight for judge in settings.judges})
    answered = np.flatnonzero(np.isfinite(labels))
    unanswered = len(labels) - len(answered)
    if not len(answered):
        raise RunFailed("no judge gave one of the two answers to any question; see --answers and --template")
    pairs, labels = job.pairs.take(answered.tolist()), labels[answered]
    verdicts = {name: verdict.take(answered) for name, verdict in verdicts.items()}
    counts = {"labelled": len(answered), "too_long": job.too_long, "no_answer": unanswered}
    lineage = {
        "version": LINEAGE_VERSION,
        REQUEST: job.build_request(device_type),
        "device_type": device_type,
        "pins": {judge.choice.name: judge.reader.model.pin for judge in job.local},
        "template_name": settings.template.name,
        "sources": [redact(source.source) for source in settings.sources],
        "counts": counts | {"skipped": dict(pairs.skipped)},
        "code": read_code_tags(),
    }
    human = np.array([p.soft_label for p in pairs.pairs]) if pairs.has_human_labels else None
    statistics = compute_statistics(pairs.pairs, labels, verdicts, human)
    if unanswered:
        console.print(f"{unanswered:,} pairs skipped (a judge gave neither answer)")
    print_report(statistics, console)
    write_report(output.with_suffix(".report.json"), statistics)
    draw_report(output.with_suffix(".png"), statistics, verdicts)
    replace_text(output.with_suffix(".json"), json.dumps(lineage, indent=1) + "\n")
    write_labels(output, pairs.pairs, labels, verdicts, lineage, with_human_labels=pairs.has_human_labels)
    console.print(f"labels: {output}")


@contextmanager
def _lock_output(output: Path) -> Iterator[None]:
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"--to {output}: another process is writing it; wait, or name another file"
        ) from None
    try:
        yield
    finally:
        lock.release()
