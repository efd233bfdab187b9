"""Judges on the cluster: language models and reward models, behind the routers that serve references."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from rich.console import Console

from models.config import ModelConfig
from orchestrator.cluster.nodes import list_node_resources
from orchestrator.cluster.placement import ClusterProfile, Need, build_replica_bundle, refuse_if_scattered
from orchestrator.config.paths import resolve_if_present
from orchestrator.config.sections import Resources
from orchestrator.labels.questions import TEMPLATE_KWARGS, JudgeReader
from orchestrator.labels.rewards import RewardReader
from orchestrator.labels.settings import JudgeChoice, LabelSettings
from orchestrator.labels.verdicts import Verdicts
from orchestrator.references.client import ReferenceClient
from orchestrator.references.service import ReferenceService, build_reference_spec, start_references
from orchestrator.registry.find import find_model
from orchestrator.tracking.mlflow import resolve_tracking_uri
from orchestrator.tracking.progress import ProgressMeter
from orchestrator.tracking.progress_lines import RESPONSES
from preferences.pairs import Pair
from preferences.tokens.tables import TokenTable

SAVE_EVERY_S = 5.0
"""Scores of about so many seconds are lost when the command is killed."""
START_TIMEOUT_S = 600.0
READ_ROWS = 4096


@dataclass(frozen=True)
class LocalJudge:
    """A judge whose files have been found, and the tokens of the pairs that it reads."""

    reader: JudgeReader | RewardReader
    table: TokenTable

    @property
    def choice(self) -> JudgeChoice:
        """What was named on the command line."""
        return self.reader.choice

    def for_device(self, device_type: str) -> "LocalJudge":
        """Return the same judge with its dtype decided for "cuda" or "cpu"."""
        model = replace(self.reader.model, device_type=device_type)
        return replace(self, reader=replace(self.reader, model=model))

    def take_pairs(self, pairs: npt.NDArray[np.int64]) -> "LocalJudge":
        """Return the judge for the pairs at these places only."""
        return replace(self, table=self.reader.take_pairs(self.table, pairs))


def find_local_judges(settings: LabelSettings, pairs: Sequence[Pair]) -> list[LocalJudge]:
    """Find the judges that run on the cluster, and tokenise the pairs for each.

    Raises:
        UsageError, ModelError: a judge cannot be found, or cannot answer.
    """
    choices = [choice for choice in settings.judges if choice.kind != "endpoint"]
    return [_find_judge(choice, settings, pairs) for choice in choices]


def _find_judge(choice: JudgeChoice, settings: LabelSettings, pairs: Sequence[Pair]) -> LocalJudge:
    registered = choice.model.startswith("models:/")
    model = find_model(
        choice.option,
        # Actors have other working folders.
        ModelConfig(model=resolve_if_present(choice.model, field=choice.option)),
        tracking_uri=resolve_tracking_uri(settings.tracking_uri, settings.storage_path) if registered else "",
        template_kwargs=TEMPLATE_KWARGS if choice.kind == "judge" else None,
        is_classifier=choice.kind == "reward",
    )
    kind = JudgeReader if choice.kind == "judge" else RewardReader
    reader = kind(choice, model, settings)
    if isinstance(reader, RewardReader):
        reader.refuse_several_outputs()
    return LocalJudge(reader, reader.build_table(pairs))


def find_fitting_pairs(judges: Iterable[LocalJudge], count: int) -> npt.NDArray[np.int64]:
    """Return the places of the pairs, of `count`, that are within every judge's positions."""
    fitting = np.ones(count, dtype=bool)
    for judge in judges:
        fitting &= judge.reader.find_fitting_pairs(judge.table)
    return np.flatnonzero(fitting)


def read_device_type() -> str:
    """Return the device type that judges run on in the connected cluster: "cuda" or "cpu"."""
    return ClusterProfile.from_nodes(list_node_resources()).device_type


def ask_local_judges(
    judges: Sequence[LocalJudge], settings: LabelSettings, console: Console
) -> dict[str, Verdicts]:
    """Ask judges about their pairs on the connected cluster, and print what the store already had.

    They are asked one after the other, so that each may have all devices.

    Raises:
        UsageError: the cluster has no room for a judge's replicas.
        ModelError: a judge cannot be loaded.
        RunFailed: a judge died, or gave a number that is not finite.
    """
    nodes = list_node_resources()
    bundle = build_replica_bundle(Resources(), ClusterProfile.from_nodes(nodes))
    verdicts: dict[str, Verdicts] = {}
    for judge in judges:
        name = judge.choice.name
        refuse_if_scattered([Need(f"judge {name}", settings.replicas, bundle)], nodes)
        spec = build_reference_spec(
            name,
            judge.reader.model.config,
            judge.reader.fingerprint,
            device_type=judge.reader.model.device_type,
            bundle=bundle,
            replicas=settings.replicas,
            start_timeout_s=START_TIMEOUT_S,
            kind=judge.reader.score_kind,
        )
        with start_references(
            [spec],
            settings.storage_path,
            replica_class=judge.reader.replica_class,
            flush_s=SAVE_EVERY_S,
        ) as service:
            _score_table(service, judge, console)
            verdicts[name] = _read_verdicts(service, judge)
    return verdicts


def _score_table(service: ReferenceService, judge: LocalJudge, console: Console) -> None:
    name, table = judge.choice.name, judge.table
    missing = service.count_missing({name: table})[name]
    if missing:
        service.start_replicas()
    with ProgressMeter(console, RESPONSES, "asking ") as meter:
        service.score_all({name: table}, meter.update)
    console.print(f"{name}: {2 * len(table) - missing:,} answers from the store, {missing:,} scored")


def _read_verdicts(service: ReferenceService, judge: LocalJudge) -> Verdicts:
    name = judge.choice.name
    client = ReferenceClient({name: service.routers[name]}, {name: judge.table})
    chosen, rejected = [], []
    for start in range(0, len(judge.table), READ_ROWS):
        client.request_scores(start, range(start, min(start + READ_ROWS, len(judge.table))))
        scores = client.collect_scores(start)[name]
        chosen.append(scores.chosen)
        rejected.append(scores.rejected)
    return judge.reader.read_verdicts(np.concatenate(chosen), np.concatenate(rejected))
