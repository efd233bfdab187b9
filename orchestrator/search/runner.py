"""A search on a cluster: one reference service for all trials, a response scored once per reference.

Ray Tune says which trial goes on, the journal what is done; the best is registered.
"""

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from mlflow.exceptions import MlflowException
from ray import tune as ray_tune
from ray.tune import PlacementGroupFactory
from ray.tune.stopper import CombinedStopper, TrialPlateauStopper
from rich.console import Console

from orchestrator.cluster.connection import keep_ctrl_c_handler
from orchestrator.cluster.nodes import list_node_resources
from orchestrator.cluster.placement import ClusterProfile, build_worker_bundle, list_trial_bundles
from orchestrator.cluster.worker_environment import collect_secrets
from orchestrator.config.sweep import Point, SweepConfig
from orchestrator.driver.prepare import PreparedRun
from orchestrator.driver.record import RunRecord
from orchestrator.driver.scoring import (
    open_reward_scorer,
    report_scores,
    score_split,
    select_served_tables,
    start_missing_references,
    start_services,
)
from orchestrator.errors import RunFailed, UsageError
from orchestrator.redaction import hide_secrets, summarize_error
from orchestrator.references.client import ReferenceClient
from orchestrator.references.service import ReferenceService
from orchestrator.search.callbacks import ProgressCallback
from orchestrator.search.context import SearchContext
from orchestrator.search.controls import build_control, match_beta
from orchestrator.search.journal import Journal, TrialRecord
from orchestrator.search.limits import SearchLimits
from orchestrator.search.promote import find_best_trial, promote_trial, registration_message
from orchestrator.search.report.tables import build_summary
from orchestrator.search.report.write import draw_search, explain_missing_figures, write_csv
from orchestrator.search.samplers import to_key
from orchestrator.search.searcher import JournalSearcher
from orchestrator.search.trial import NUMBER, TrialSetup, build_trial_config, run_trial
from orchestrator.tracking.code_version import read_code_tags
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.rewards import RewardScorer
from orchestrator.worker.setup import WorkerSetup, sample_calibration_rows
from tune_spaces.spaces import Space

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

log = logging.getLogger(__name__)

MLFLOW_PAUSE_S = 5.0
TUNE_STATE = ".tune"
"""Folder of Tune's own state, which nobody reads back."""
_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal and MLflow have it all
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # each is told in one line
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that gives up reports why, and no metric
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints a banner at any verbosity
}


class SearchRunner:
    """A search, from its first trial to the registered model.

    Args:
        sweep: the sweep file.
        space: what points are drawn from.
        scheduler: which trials go on.
        total: optimizer steps of a trial.
        prepared: the run file that trials start from, every reference served.
        record: of the search.
        trials: the journal.
        folder: the search's.
        console: where it is told.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        space: Space,
        scheduler: "TrialScheduler",
        total: int,
        prepared: PreparedRun,
        record: RunRecord,
        journal: Journal,
        folder: Path,
        console: Console,
    ) -> None:
        self.sweep, self.base, self.prepared, self.record = sweep, prepared.config, prepared, record
        self.journal, self.folder, self.console = journal, folder, console
        self._space, self._scheduler, self._total = space, scheduler, total
        self.tracker = _open_search_run(sweep, prepared, record, folder)
        self._entropies: np.ndarray | None = None

    def run_search(self, slots: int, neighbours: int) -> RunRecord:
        """Search to the end, report and promote.

        Args:
            slots: trials at a time.
            neighbours: of them on one machine.
        """
        status = "FAILED"
        try:
            with start_services(self.prepared) as service, open_reward_scorer(self.base) as judge:
                search = self._build_searcher(service)
                limits = (
                    self._run_trials(search, service, judge, slots, neighbours)
                    if search.next_trial()
                    else None
                )
                self.report_result()
                if limits is not None and limits.failed:
                    raise RunFailed(limits.failed)
                if best := find_best_trial(self.journal, self.sweep):
                    self._promote_best(best, service, judge)
                elif limits is None or limits.reason is None:
                    raise RunFailed(f"no trial gave a result: {_list_reasons(self.journal)}")
            self.record.finished = limits is None or limits.reason is None
            self.record.write(self.folder)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self.tracker.finish(status)
        if limits is not None and limits.reason:
            self.console.print(f"{limits.reason}; the same command goes on")
        return self.record

    def reprint_result(self) -> None:
        """What came of a search that is finished."""
        self.report_result()
        self.tracker.finish()
        if self.record.registered:
            self.console.print(f"registered as {self.record.registered}")

    # ------------------------------------------------------------ searching

    def _build_searcher(self, service: ReferenceService) -> "_TrackedSearcher":
        def allowed(point: Point) -> str | None:
            try:
                build_trial_config(self.sweep, self.base, point, repeat=0, name="trial")
            except UsageError as error:
                return str(error)
            return None

        return _TrackedSearcher(
            self._space,
            self.sweep.search,
            self.sweep.objective,
            self.journal,
            allowed=allowed,
            control=lambda point: self._find_control(point, service),
            child=self._open_trial_run,
        )

    def _run_trials(
        self,
        search: "_TrackedSearcher",
        service: ReferenceService,
        judge: RewardScorer | None,
        slots: int,
        neighbours: int,
    ) -> SearchLimits:
        """Score what is missing, then run Tune until all trials have ended, a limit is reached or Ctrl-C."""
        held_out, train = self.prepared.eval, self.prepared.train
        assert held_out is not None  # a sweep without held-out pairs is refused
        score_split(service, held_out, "eval", self.base, self.console)
        if self.base.references.mode == "precompute":
            score_split(service, train, "train", self.base, self.console)
            service.release()
        else:
            sampled = self.base.evaluation.sampling is not None
            start_missing_references(service, select_served_tables(train, self.base), sampled=sampled)
        limits = SearchLimits(self.sweep, self.journal, search, wait_minutes=self.base.placement.wait_minutes)
        following = ProgressCallback(
            self.journal, search, limits, self.sweep.objective, self.prepared.tracking_uri, self.console
        )
        self.console.print(f"searching, {slots} trial(s) at a time")
        tuner = self._build_tuner(
            self._build_trial_setup(service, judge, neighbours), search, slots, limits, following
        )
        try:
            with keep_ctrl_c_handler(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Consider boosting PBT", category=UserWarning)
                tuner.fit()
        finally:
            following.close()
            shutil.rmtree(self.folder / TUNE_STATE, ignore_errors=True)
        self.record.reference_counts = {name: asdict(c) for name, c in service.stats().items()}
        report_scores(service, self.console)
        if limits.reason is None and any(not trial.ended for trial in self.journal):
            raise KeyboardInterrupt
        wanted = self.sweep.search.trials
        if limits.reason is None and wanted is not None and search.entered < wanted:
            self.console.print(f"the space has only {search.entered} points, of {wanted} asked for")
        return limits

    def _build_tuner(
        self,
        shared: TrialSetup,
        search: JournalSearcher,
        slots: int,
        limits: SearchLimits,
        following: ProgressCallback,
    ) -> ray_tune.Tuner:
        for name, value in _TUNE_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        for noisy in ("ray.tune", "ray.tune.schedulers.pbt", "ray.tune.tune"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        shutil.rmtree(self.folder / TUNE_STATE, ignore_errors=True)
        stoppers: list[ray_tune.Stopper] = [limits]
        plateau, first = self.sweep.plateau, self.sweep.objective[0]
        if plateau is not None:
            stoppers.append(
                TrialPlateauStopper(
                    first.metric, plateau.std, num_results=plateau.results, grace_period=plateau.grace
                )
            )
        population = self.sweep.scheduler.type == "pbt"
        return ray_tune.Tuner(
            ray_tune.with_resources(
                ray_tune.with_parameters(run_trial, shared=shared),
                PlacementGroupFactory(
                    list_trial_bundles(self.base, ClusterProfile.from_nodes(list_node_resources()))[:1]
                ),
            ),
            tune_config=ray_tune.TuneConfig(
                search_alg=search,
                scheduler=self._scheduler,
                num_samples=-1,
                # A population takes turns on what there is: a trial that waits must not keep others out.
                max_concurrent_trials=None if population else slots,
            ),
            run_config=ray_tune.RunConfig(
                name=TUNE_STATE,
                storage_path=str(self.folder),
                verbose=0,
                failure_config=ray_tune.FailureConfig(max_failures=self.base.parallel.max_failures),
                checkpoint_config=ray_tune.CheckpointConfig(num_to_keep=3 if population else None),
                callbacks=[following],
                stop=CombinedStopper(*stoppers),
            ),
        )

    def _build_trial_setup(
        self, service: ReferenceService, judge: RewardScorer | None, trials_per_node: int
    ) -> TrialSetup:
        worker = WorkerSetup(
            config=self.base,
            policy=self.prepared.policy.config,
            train=ray.put(self.prepared.train),
            eval=ray.put(self.prepared.eval),
            routers=service.routers,
            identity=self.prepared.identity,
            initial_policy_reference=self.prepared.initial_policy_reference,
            bundle=build_worker_bundle(
                self.base.parallel.resources, ClusterProfile.from_nodes(list_node_resources())
            ),
            folder=str(self.folder),
            code_folder=os.getcwd(),
            tracking_uri=self.prepared.tracking_uri,
            tracking_run=self.tracker.run_id,
            reward_scorer=judge,
            export=False,
            trials_per_node=trials_per_node,
        )
        return TrialSetup(
            sweep=self.sweep, worker=worker, secrets=collect_secrets(os.environ), total=self._total
        )

    def _find_control(self, point: Point, service: ReferenceService) -> Point | None:
        """The matched control of a soft or dispersed point."""
        loss = build_trial_config(self.sweep, self.base, point, repeat=0, name="trial").loss
        labels = self.prepared.train.soft_labels
        if not loss.needs_entropy:
            return build_control(point, loss, match_beta(loss, soft_labels=labels, entropies=None))
        rows = sample_calibration_rows(len(labels), self.base.training.seed)
        if self._entropies is None:
            self._entropies = _read_primary_entropies(service, self.prepared, rows)
        beta = match_beta(loss, soft_labels=labels[rows], entropies=self._entropies)
        return build_control(point, loss, beta)

    def _open_trial_run(self, trial: TrialRecord) -> str:
        """The trial's MLflow run under the search's, the same however often it is started."""
        config = build_trial_config(self.sweep, self.base, trial.point, repeat=trial.repeat, name=trial.name)
        tags = {"loss.preset": config.preset, "search": self.sweep.name, "search.trial": str(trial.number)}
        tags |= {"search.point": str(trial.point_id), "search.repeat": str(trial.repeat)}
        if trial.control_of is not None:
            tags["search.control_of"] = str(trial.control_of)
        return Tracker.resume_or_start(
            trial.mlflow_run,
            name=f"{self.sweep.name}-{trial.name}",
            uri=self.prepared.tracking_uri,
            folder=self.journal.trial_folder(trial),
            experiment=self.base.tracking.experiment,
            params=hide_secrets(config.model_dump(mode="json")),
            tags=tags,
            parent=self.tracker.run_id,
            key=f"{self.tracker.run_id}/{trial.number}",
        ).run_id

    # ------------------------------------------------------------ reporting

    def _promote_best(self, best: TrialRecord, service: ReferenceService, judge: RewardScorer | None) -> None:
        """Register the best, and say so on the search's own MLflow run."""
        self.record.best_trial = best.number
        tags = {"search.best": str(best.number)}
        if self.sweep.promote is not None:
            run = promote_trial(
                self._context, best, trials=len(self.journal), service=service, reward_scorer=judge
            )
            self.record.registered = run.registered
            tags["search.registered"] = str(run.registered)
            self.console.print(registration_message(run, self.tracker.uri))
        self.tracker.set_tags(tags)
        # MLflow keeps the value of the last step, and a search that goes on may find a better one.
        self.tracker.log(sum(trial.ended for trial in self.journal), best.result)

    @property
    def _context(self) -> SearchContext:
        return SearchContext(
            sweep=self.sweep,
            prepared=self.prepared,
            folder=self.folder,
            mlflow_run=self.tracker.run_id,
            console=self.console,
        )

    def report_result(self) -> None:
        """Print the ranking, and write table and pictures to the search's folder and to MLflow."""
        trials, objectives = list(self.journal), self.sweep.objective
        primary = self.base.references.primary
        controls = {to_key(trial.point): trial.control for trial in trials if trial.control}
        self.console.print(
            build_summary(
                trials,
                objectives,
                primary=primary,
                control=lambda point: controls.get(to_key(point)),
                width=self.console.width,
            )
        )
        table = self.folder / "trials.csv"
        write_csv(trials, table)
        folders = {trial.number: self.journal.trial_folder(trial) for trial in trials}
        drawn = draw_search(trials, objectives, folders, self.folder / "plots", primary=primary)
        for sentence in explain_missing_figures(trials, objectives):
            self.console.print(sentence)
        self.tracker.log_files(drawn, under="plots")
        self.tracker.log_files([table])
        counts = {
            status: sum(t.status == status for t in trials) for status in ("finished", "stopped", "failed")
        }
        self.tracker.set_tags({f"search.{status}": str(count) for status, count in counts.items()})
        self.console.print(f"plots: {self.folder / 'plots'}\nall trials: {table}")


class _TrackedSearcher(JournalSearcher):
    """A search whose trials have an MLflow run before they start, and which can be cut short."""

    def __init__(self, *arguments: Any, child: Callable[[TrialRecord], str], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._child = child
        self.cut_short = False
        """From here on a trial that ends was ended by us: it stays unfinished in the journal."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial with its child run; none for now while MLflow does not answer."""
        asked = super().suggest(trial_id)
        if not isinstance(asked, dict):
            return asked
        trial = self._journal[asked[NUMBER]]
        try:
            self._journal.set_mlflow_run(trial.number, self._child(trial))
        except (UsageError, MlflowException) as error:
            log.warning("trial %s waits for MLflow: %s", trial.number, summarize_error(error))
            self._journal.put_back(trial.number)
            time.sleep(MLFLOW_PAUSE_S)
        return asked if trial.status == "running" else None

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """As the search does, unless it was cut short."""
        if not self.cut_short:
            super().on_trial_complete(trial_id, result, error)


def _open_search_run(sweep: SweepConfig, prepared: PreparedRun, record: RunRecord, folder: Path) -> Tracker:
    """The search's own MLflow run, above those of its trials."""
    settings = {name: value for name, value in record.config.items() if name != "run"}
    tracker = Tracker.resume_or_start(
        record.mlflow_run,
        name=sweep.name,
        uri=prepared.tracking_uri,
        folder=folder,
        experiment=prepared.config.tracking.experiment,
        params=settings,
        key=record.key,
        tags={"search": sweep.name, "search.spaces": ", ".join(sweep.spaces)} | read_code_tags(),
    )
    record.mlflow_run = tracker.run_id
    record.write(folder)
    tracker.log_files([folder / "sweep.yaml"], under="config")
    return tracker


def _list_reasons(trials: Journal) -> str:
    reasons = dict.fromkeys(trial.reason for trial in trials if trial.reason)
    return "; ".join(map(str, reasons)) or "none came to its end"


def _read_primary_entropies(service: ReferenceService, prepared: PreparedRun, rows: np.ndarray) -> np.ndarray:
    """(N,) mean entropy of both responses under the primary reference."""
    primary = prepared.config.references.ordered[0]
    client = ReferenceClient(
        {primary: service.routers[primary]}, {primary: prepared.train.references[primary]}
    )
    client.request_scores("control", rows)
    scores = client.collect_scores("control")[primary]
    return (scores.chosen_entropy + scores.rejected_entropy) / 2
