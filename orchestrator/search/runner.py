"""Run a search on a cluster; its trials share the references, which score each response once.

Ray Tune decides which trials continue, the journal records what is done, and the best trial is registered.
"""

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
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
from orchestrator.driver.prepare import PreparedRun, refuse_hard_labels
from orchestrator.driver.record import RunRecord
from orchestrator.driver.scoring import open_reward_scorer, prepare_references, report_scores, start_services
from orchestrator.errors import RunFailed, UsageError
from orchestrator.redaction import hide_secrets, summarize_error
from orchestrator.references.client import ReferenceClient
from orchestrator.references.service import ReferenceService
from orchestrator.search.callbacks import ProgressCallback
from orchestrator.search.context import SearchContext, SearchPlan
from orchestrator.search.controls import build_control, match_beta
from orchestrator.search.journal import END_STATUSES, Journal, TrialRecord
from orchestrator.search.limits import SearchLimits
from orchestrator.search.promote import find_best_trial, format_registration, promote_trial
from orchestrator.search.report.tables import build_summary
from orchestrator.search.report.write import draw_search, explain_missing_figures, write_csv
from orchestrator.search.samplers import to_key
from orchestrator.search.searcher import JournalSearcher
from orchestrator.search.trial import NUMBER_KEY, TrialSetup, build_trial_config, run_trial
from orchestrator.tracking.code_version import read_code_tags
from orchestrator.tracking.tracker import Tracker
from orchestrator.worker.rewards import RewardScorer
from orchestrator.worker.setup import WorkerSetup, sample_calibration_rows
from orchestrator.worker.splits import send_split

log = logging.getLogger(__name__)

MLFLOW_PAUSE_S = 5.0
TUNE_STATE = ".tune"
"""Folder of Tune's own state, which is never read back."""
_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal and MLflow have all metrics
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # ProgressCallback prints each error in one line
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that gives up reports the reason and no metric
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner at any verbosity
}


class SearchRunner:
    """Runs a search, from its first trial to the registered model.

    Args:
        plan: the search, checked.
        record: the search's record, which is written when the search ends.
        journal: the search's trials.
        folder: the search's folder.
        console: where progress and results are printed.
    """

    def __init__(
        self, *, plan: SearchPlan, record: RunRecord, journal: Journal, folder: Path, console: Console
    ) -> None:
        self.sweep, self.base, self.prepared = plan.sweep, plan.prepared.config, plan.prepared
        self.record, self.journal, self.folder, self.console = record, journal, folder, console
        self._space, self._scheduler, self._total_steps = plan.space, plan.scheduler, plan.total_steps
        self.tracker = _open_search_run(plan.sweep, plan.prepared, record, folder)
        self._entropies: np.ndarray | None = None

    def run_search(self, slots: int, trials_per_node: int) -> RunRecord:
        """Search to the end, report the results and promote the best trial.

        Args:
            slots: how many trials run at a time.
            trials_per_node: how many of them share a machine.

        Raises:
            RunFailed: no trial gave a result, too many failed, or none found room.
        """
        status = "FAILED"
        try:
            with start_services(self.prepared) as service, open_reward_scorer(self.base) as reward_scorer:
                search = self._build_searcher(service)
                limits = (
                    self._run_trials(search, service, reward_scorer, slots, trials_per_node)
                    if search.next_trial()
                    else None
                )
                self.report_result()
                if limits is not None and limits.failure:
                    raise RunFailed(limits.failure)
                if best := find_best_trial(self.journal, self.sweep):
                    self._promote_best(best, service, reward_scorer)
                elif limits is None or limits.reason is None:
                    raise RunFailed(f"no trial gave a result: {_format_reasons(self.journal)}")
            self.record.finished = limits is None or limits.reason is None
            self.record.write(self.folder)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self.tracker.finish(status)
        if limits is not None and limits.reason:
            self.console.print(f"{limits.reason}; the same command resumes the search")
        return self.record

    def reprint_result(self) -> None:
        """Report the result of a finished search again."""
        self.report_result()
        self.tracker.finish()
        if self.record.registered:
            self.console.print(f"registered as {self.record.registered}")

    # ------------------------------------------------------------ searching

    def _build_searcher(self, service: ReferenceService) -> "_TrackedSearcher":
        """Build the searcher, which adds the search's first point if the journal has none."""

        def explain_refusal(point: Point) -> str | None:
            try:
                trial = build_trial_config(self.sweep, self.base, point, repeat=0, name="trial")
                refuse_hard_labels(trial, self.prepared.train)
            except UsageError as error:
                return str(error)
            return None

        return _TrackedSearcher(
            self._space,
            self.sweep.search,
            self.sweep.objective,
            self.journal,
            explain_refusal=explain_refusal,
            find_control=lambda point: self._find_control(point, service),
            open_trial_run=self._open_trial_run,
        )

    def _run_trials(
        self,
        search: "_TrackedSearcher",
        service: ReferenceService,
        reward_scorer: RewardScorer | None,
        slots: int,
        trials_per_node: int,
    ) -> SearchLimits:
        """Score what is missing, then run Tune until all trials have ended, a limit is reached or Ctrl-C.

        Returns:
            The limits, with the one that ended the search if one did.
        """
        prepare_references(service, self.prepared, self.console)
        limits = SearchLimits(self.sweep, self.journal, search, wait_minutes=self.base.placement.wait_minutes)
        progress = ProgressCallback(
            self.journal, search, limits, self.sweep.objective, self.prepared.tracking_uri, self.console
        )
        self.console.print(f"searching, {slots} trial(s) at a time")
        tuner = self._build_tuner(
            self._build_trial_setup(service, reward_scorer, trials_per_node), search, slots, limits, progress
        )
        try:
            with keep_ctrl_c_handler(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Consider boosting PBT", category=UserWarning)
                tuner.fit()
        finally:
            progress.close()
            shutil.rmtree(self.folder / TUNE_STATE, ignore_errors=True)
        self.record.reference_counts = {name: asdict(c) for name, c in service.stats().items()}
        report_scores(service, self.console)
        if limits.reason is None and any(not trial.ended for trial in self.journal):
            raise KeyboardInterrupt
        requested = self.sweep.search.trials
        if limits.reason is None and requested is not None and search.point_count < requested:
            self.console.print(f"the space has only {search.point_count} points, of {requested} requested")
        return limits

    def _build_tuner(
        self,
        shared: TrialSetup,
        search: JournalSearcher,
        slots: int,
        limits: SearchLimits,
        progress: ProgressCallback,
    ) -> ray_tune.Tuner:
        """Build Tune's tuner, with its console output silenced and an empty folder for its own state."""
        for name, value in _TUNE_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        for logger in ("ray.tune", "ray.tune.schedulers.pbt", "ray.tune.tune"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        shutil.rmtree(self.folder / TUNE_STATE, ignore_errors=True)
        is_population = self.sweep.scheduler.type == "pbt"
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
                # The trials of a population take turns: one that waits must not keep the others from running.
                max_concurrent_trials=None if is_population else slots,
            ),
            run_config=ray_tune.RunConfig(
                name=TUNE_STATE,
                storage_path=str(self.folder),
                verbose=0,
                failure_config=ray_tune.FailureConfig(max_failures=self.base.parallel.max_failures),
                checkpoint_config=ray_tune.CheckpointConfig(num_to_keep=3 if is_population else None),
                callbacks=[progress],
                stop=self._build_stopper(limits),
            ),
        )

    def _build_stopper(self, limits: SearchLimits) -> ray_tune.Stopper:
        """Combine the search's limits with the stopping rule for trials on a plateau, if one is set."""
        plateau = self.sweep.plateau
        if plateau is None:
            return CombinedStopper(limits)
        metric = self.sweep.objective[0].metric
        return CombinedStopper(
            limits,
            TrialPlateauStopper(metric, plateau.std, num_results=plateau.results, grace_period=plateau.grace),
        )

    def _build_trial_setup(
        self, service: ReferenceService, reward_scorer: RewardScorer | None, trials_per_node: int
    ) -> TrialSetup:
        """Build the setup that all trials share."""
        assert self.prepared.eval is not None  # a sweep without held-out pairs is refused
        worker = WorkerSetup(
            config=self.base,
            policy=self.prepared.policy.config,
            train=send_split(self.prepared.train),
            eval=send_split(self.prepared.eval),
            routers=service.routers,
            identity=self.prepared.identity,
            initial_policy_reference=self.prepared.initial_policy_reference,
            bundle=build_worker_bundle(
                self.base.parallel.resources, ClusterProfile.from_nodes(list_node_resources())
            ),
            folder=str(self.folder),
            code_folder=str(Path.cwd()),
            tracking_uri=self.prepared.tracking_uri,
            tracking_run=self.tracker.run_id,
            reward_scorer=reward_scorer,
            vocabulary_sizes=self.prepared.vocabulary_sizes,
            export=False,
            trials_per_node=trials_per_node,
        )
        return TrialSetup(
            sweep=self.sweep,
            worker=worker,
            secrets=collect_secrets(os.environ),
            total_steps=self._total_steps,
        )

    def _find_control(self, point: Point, service: ReferenceService) -> Point | None:
        """Build the matched control of a point; None if its loss is neither soft nor dispersed."""
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
        """Open the trial's MLflow run under the search's, the same at every start; return its id."""
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

    def _promote_best(
        self, best: TrialRecord, service: ReferenceService, reward_scorer: RewardScorer | None
    ) -> None:
        """Register the best trial, and record it in the search's own MLflow run."""
        self.record.best_trial = best.number
        tags = {"search.best": str(best.number)}
        if self.sweep.promote is not None:
            run = promote_trial(
                self._context, best, trials=len(self.journal), service=service, reward_scorer=reward_scorer
            )
            self.record.registered = run.registered
            tags["search.registered"] = str(run.registered)
            self.console.print(format_registration(run, self.tracker.uri))
        self.tracker.set_tags(tags)
        # The step is the number of ended trials, because MLflow shows the value of the last step, and a
        # search that is resumed may find a better trial.
        self.tracker.log(sum(trial.ended for trial in self.journal), best.result)

    @property
    def _context(self) -> SearchContext:
        """The search as `promote_trial` gets it."""
        return SearchContext(
            sweep=self.sweep,
            prepared=self.prepared,
            folder=self.folder,
            mlflow_run=self.tracker.run_id,
            console=self.console,
        )

    def report_result(self) -> None:
        """Print the ranking, and write the table and the plots to the search's folder and to MLflow."""
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
        plots = draw_search(trials, objectives, folders, self.folder / "plots", primary=primary)
        for sentence in explain_missing_figures(trials, objectives):
            self.console.print(sentence)
        self.tracker.log_files(plots, under="plots")
        self.tracker.log_files([table])
        counts = {status: sum(trial.status == status for trial in trials) for status in END_STATUSES}
        self.tracker.set_tags({f"search.{status}": str(count) for status, count in counts.items()})
        self.console.print(f"plots: {self.folder / 'plots'}\nall trials: {table}")


class _TrackedSearcher(JournalSearcher):
    """A searcher that opens a trial's MLflow run before the trial starts, and that can be interrupted.

    Args:
        arguments: those of JournalSearcher, as `options`.
        open_trial_run: opens a trial's MLflow run and returns its id.

    Attributes:
        interrupted: once True, a trial that ends has been cut off: it stays unfinished in the journal.
    """

    def __init__(self, *arguments: Any, open_trial_run: Callable[[TrialRecord], str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._open_trial_run = open_trial_run
        self.interrupted = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial, with its MLflow run open; None for now if MLflow does not answer."""
        suggestion = super().suggest(trial_id)
        if not isinstance(suggestion, dict):
            return suggestion
        trial = self._journal[suggestion[NUMBER_KEY]]
        try:
            self._journal.set_mlflow_run(trial.number, self._open_trial_run(trial))
        except (UsageError, MlflowException) as error:
            log.warning("trial %s waits for MLflow: %s", trial.number, summarize_error(error))
            self._journal.mark_pending(trial.number)
            time.sleep(MLFLOW_PAUSE_S)
        return suggestion if trial.status == "running" else None

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record that a trial has ended, unless the search was interrupted."""
        if not self.interrupted:
            super().on_trial_complete(trial_id, result, error)


def _open_search_run(sweep: SweepConfig, prepared: PreparedRun, record: RunRecord, folder: Path) -> Tracker:
    """Open the search's own MLflow run, the parent of those of its trials."""
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


def _format_reasons(journal: Journal) -> str:
    """Format the distinct reasons why trials failed."""
    reasons = dict.fromkeys(trial.reason for trial in journal if trial.reason)
    return "; ".join(map(str, reasons)) or "none came to its end"


def _read_primary_entropies(service: ReferenceService, prepared: PreparedRun, rows: np.ndarray) -> np.ndarray:
    """Return the (N,) mean entropies of each row's two responses under the primary reference."""
    primary = prepared.config.references.ordered[0]
    client = ReferenceClient(
        {primary: service.routers[primary]}, {primary: prepared.train.references[primary]}
    )
    client.request_scores("control", rows)
    scores = client.collect_scores("control")[primary]
    return (scores.chosen_entropy + scores.rejected_entropy) / 2
