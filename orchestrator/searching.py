"""A search on a cluster: one reference service for all trials, a response scored once per reference.

Ray Tune says which trial goes on, the journal what is done; the best is registered.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune as ray_tune
from ray.tune import PlacementGroupFactory
from ray.tune.stopper import CombinedStopper, TrialPlateauStopper
from rich.console import Console

from orchestrator import report, sweep_plots
from orchestrator.cluster import secrets
from orchestrator.config import RunConfig, RunFailed, UsageError
from orchestrator.follow import Following, Limits
from orchestrator.matching import control_of, matched_beta
from orchestrator.mlflow_client import without_secrets
from orchestrator.placement import trial_bundles
from orchestrator.prepare import Prepared
from orchestrator.record import RunRecord, open_record
from orchestrator.references.client import ReferenceClient
from orchestrator.references.service import ReferenceService
from orchestrator.rewards import Judge
from orchestrator.scoring import judging, report_scores, score_split, serve, served_tables, warm
from orchestrator.search import Search
from orchestrator.sweep import Point, SweepConfig
from orchestrator.tracking import Tracker, code_tags
from orchestrator.train import finish, train_on_cluster
from orchestrator.trial import NUMBER, Shared, run_trial, trial_config
from orchestrator.trials import TrialRecord, Trials
from orchestrator.worker import calibration_rows, total_steps
from tune_spaces.schedulers import build
from tune_spaces.spaces import Space

_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal and MLflow have it all
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that gives up reports why, and no metric
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints a banner at any verbosity
}


class Searching:
    """A search, from its first trial to the registered model.

    Args:
        sweep: the sweep file.
        space: what points are drawn from.
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
        prepared: Prepared,
        record: RunRecord,
        trials: Trials,
        folder: Path,
        console: Console,
    ) -> None:
        self.sweep, self.base, self.prepared, self.record = sweep, prepared.config, prepared, record
        self.space, self.trials, self.folder, self.console = space, trials, folder, console
        self.gpus = prepared.policy.device_type == "cuda"
        self.tracker = _parent(sweep, prepared, record, folder)
        self._entropies: np.ndarray | None = None

    def run(self, slots: int) -> RunRecord:
        """Search to the end, report and promote."""
        status = "FAILED"
        try:
            with serve(self.prepared) as service, judging(self.base, gpus=self.gpus) as judge:
                search = self._search(service)
                if search.waiting:
                    limits = self._try(search, service, judge, slots)
                    self.record.result = {"scores": {n: asdict(c) for n, c in service.stats().items()}}
                    report_scores(service, self.console)
                else:
                    limits = None
                self.report()
                _refuse_fruitless(self.trials, self.sweep)
                if limits is not None and limits.failed:
                    raise RunFailed(limits.failed)
                if self.sweep.promote is not None:
                    self._promote(service, judge)
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

    def tell_again(self) -> None:
        """What came of a search that is finished."""
        self.report()
        self.tracker.finish()
        if self.record.registered:
            self.console.print(f"registered as {self.record.registered}")

    # ------------------------------------------------------------ searching

    def _search(self, service: ReferenceService) -> "_TrackedSearch":
        def allowed(point: Point) -> str | None:
            try:
                trial_config(self.sweep, self.base, point, repeat=0, name="trial")
            except UsageError as error:
                return str(error)
            return None

        return _TrackedSearch(
            self.space,
            self.sweep.search,
            self.sweep.objective,
            self.trials,
            allowed=allowed,
            control=lambda point: self._control(point, service),
            child=self._child,
        )

    def _try(
        self, search: "_TrackedSearch", service: ReferenceService, judge: Judge | None, slots: int
    ) -> Limits:
        held_out, train = self.prepared.held_out, self.prepared.train
        assert held_out is not None  # a sweep without held-out pairs is refused
        score_split(service, held_out, "eval", self.base, self.console)
        if self.base.references.mode == "precompute":
            score_split(service, train, "train", self.base, self.console)
            service.release()
        else:
            warm(service, served_tables(train, self.base))
        limits = Limits(self.sweep, self.trials, search, wait_minutes=self.base.placement.wait_minutes)
        following = Following(
            self.trials, search, limits, self.sweep.objective, self.prepared.tracking_uri, self.console
        )
        total = total_steps(self.base, len(train))
        shared = self._shared(service, judge, slots)
        self.console.print(f"searching, {slots} trial(s) at a time")
        _fit(self.sweep, self.base, self.space, self.folder, shared, search, limits, following, total)
        following.close()
        if limits.reason is None and any(not trial.ended for trial in self.trials):
            raise KeyboardInterrupt
        return limits

    def _shared(self, service: ReferenceService, judge: Judge | None, slots: int) -> Shared:
        return Shared(
            sweep=self.sweep,
            base=self.base,
            policy=self.prepared.policy.config,
            train=ray.put(self.prepared.train),
            held_out=ray.put(self.prepared.held_out),
            routers=service.routers,
            identity=self.prepared.identity,
            start_is=self.prepared.start_is,
            tracking_uri=self.prepared.tracking_uri,
            judge=judge,
            secrets=secrets(os.environ),
            gpus=self.gpus,
            at_once=slots,
        )

    def _control(self, point: Point, service: ReferenceService) -> Point | None:
        """The matched DPO of a soft or dispersed point."""
        loss = trial_config(self.sweep, self.base, point, repeat=0, name="trial").loss
        labels = self.prepared.train.soft_labels
        if not loss.needs_entropy:
            return control_of(point, loss, matched_beta(loss, soft_labels=labels, entropies=None))
        rows = calibration_rows(len(labels), self.base.training.seed)
        if self._entropies is None:
            self._entropies = _entropies(service, self.prepared, rows)
        beta = matched_beta(loss, soft_labels=labels[rows], entropies=self._entropies)
        return control_of(point, loss, beta)

    def _child(self, trial: TrialRecord) -> str:
        """The trial's MLflow run under the search's, the same however often it is started."""
        config = trial_config(self.sweep, self.base, trial.point, repeat=trial.repeat, name=trial.name)
        tags = {"loss.preset": config.preset, "search": self.sweep.name, "search.trial": str(trial.number)}
        tags |= {"search.point": str(trial.point_id), "search.repeat": str(trial.repeat)}
        if trial.control_of is not None:
            tags["search.control_of"] = str(trial.control_of)
        return Tracker.resume_or_start(
            trial.mlflow_run,
            name=f"{self.sweep.name}-{trial.name}",
            uri=self.prepared.tracking_uri,
            folder=self.trials.path(trial),
            experiment=self.base.tracking.experiment,
            params=without_secrets(config.model_dump(mode="json")),
            tags=tags,
            parent=self.tracker.run_id,
            key=f"{self.tracker.run_id}/{trial.number}",
        ).run_id

    # ------------------------------------------------------------ reporting

    def report(self) -> None:
        """Print the ranking, and write table and pictures to the search's folder and to MLflow."""
        trials, objectives = list(self.trials), self.sweep.objective
        primary = self.base.references.primary
        self.console.print(report.summary(trials, objectives, primary=primary, width=self.console.width))
        table = self.folder / "trials.csv"
        report.write_csv(trials, table)
        folders = {trial.number: self.trials.path(trial) for trial in trials}
        drawn = sweep_plots.draw(trials, objectives, folders, self.folder / "plots", primary=primary)
        for sentence in sweep_plots.not_drawn(trials, objectives):
            self.console.print(sentence)
        self.tracker.log_files(drawn, under="plots")
        self.tracker.log_files([table])
        counts = {
            status: sum(t.status == status for t in trials) for status in ("finished", "stopped", "failed")
        }
        self.tracker.set_tags({f"search.{status}": str(count) for status, count in counts.items()})
        self.console.print(f"plots: {self.folder / 'plots'}\nall trials: {table}")

    def _promote(self, service: ReferenceService, judge: Judge | None) -> None:
        """Register the best trial's model, or one trained anew as it was."""
        best = _best(self.trials, self.sweep)
        config = trial_config(self.sweep, self.base, best.point, repeat=best.repeat, name=best.name)
        tracking = self.base.tracking
        named = {
            "registered_model": tracking.registered_model or self.sweep.name,
            "alias": tracking.alias or "best",
        }
        update: dict[str, Any] = {"tracking": tracking.model_copy(update=named)}
        anew = self.sweep.promote == "retrain"
        if anew:
            update |= {"name": f"retrained-{best.name}", "storage_path": str(self.folder)}
        config = config.model_copy(update=update)
        prepared = replace(
            self.prepared,
            config=config,
            references={name: self.prepared.references[name] for name in config.references.ordered},
        )
        lineage = {
            "search": self.sweep.name,
            "search.trial": str(best.number),
            "search.trials": str(len(self.trials)),
            "search.objective": ", ".join(f"{o.metric} ({o.mode})" for o in self.sweep.objective),
            "search.mlflow_run": self.tracker.run_id,
        }
        self.console.print(f"\npromoting trial {best.number}" + (", trained anew" if anew else ""))
        record = self._record_of(prepared, None if anew else best)
        if not record.result:
            train_on_cluster(prepared, record, service, judge, self.console)
        if not record.finished:
            finish(prepared, record, search=lineage)
        self.record.registered = record.registered
        self.record.result |= {"best": best.number}
        self.tracker.set_tags({"search.best": str(best.number), "search.registered": str(record.registered)})
        self.tracker.log(best.step, best.result)
        self.console.print(f"registered as {record.registered}, alias {named['alias']}")

    def _record_of(self, prepared: Prepared, best: TrialRecord | None) -> RunRecord:
        config = prepared.config
        return open_record(
            config.folder,
            RunRecord(
                config=without_secrets(config.model_dump(mode="json")),
                device_type=self.record.device_type,
                identity=prepared.identity,
                pins=prepared.pins,
                counts=self.record.counts,
                mlflow_run=None if best is None else best.mlflow_run,
                mlflow_parent=self.tracker.run_id,
            ),
        )


class _TrackedSearch(Search):
    """A search whose trials have an MLflow run before they start, and which can be cut short."""

    def __init__(self, *arguments: Any, child: Callable[[TrialRecord], str], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._child = child
        self.cut_short = False
        """From here on a trial that ends was ended by us: it stays unfinished in the journal."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial with its child run."""
        asked = super().suggest(trial_id)
        if isinstance(asked, str):
            return asked
        trial = self._trials[asked[NUMBER]]
        trial.mlflow_run = self._child(trial)
        self._trials.write(trial)
        return asked

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """As the search does, unless it was cut short."""
        if not self.cut_short:
            super().on_trial_complete(trial_id, result, error)


def _fit(
    sweep: SweepConfig,
    base: RunConfig,
    space: Space,
    folder: Path,
    shared: Shared,
    search: Search,
    limits: Limits,
    following: Following,
    total: int,
) -> None:
    """Run Tune until every trial has ended, a limit is reached or Ctrl-C is pressed."""
    for name, value in _TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for noisy in ("ray.tune", "ray.tune.schedulers.pbt"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    state = folder / ".tune"
    shutil.rmtree(state, ignore_errors=True)
    first = sweep.objective[0]
    stoppers = [limits]
    if sweep.plateau is not None:
        plateau = sweep.plateau
        stoppers.append(
            TrialPlateauStopper(
                first.metric, plateau.std, num_results=plateau.results, grace_period=plateau.grace
            )
        )
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(
            ray_tune.with_parameters(run_trial, shared=shared),
            PlacementGroupFactory(trial_bundles(base, gpus=shared.gpus)[:1]),
        ),
        tune_config=ray_tune.TuneConfig(
            search_alg=search,
            scheduler=build(
                sweep.scheduler,
                metric=first.metric,
                mode=first.mode,
                max_steps=total,
                every_steps=base.evaluation.every_steps,
                mutations=space.numeric,
                seed=sweep.search.seed,
            ),
            num_samples=-1,
            max_concurrent_trials=shared.at_once,
        ),
        run_config=ray_tune.RunConfig(
            name=state.name,
            storage_path=str(folder),
            verbose=0,
            failure_config=ray_tune.FailureConfig(max_failures=base.parallel.max_failures),
            callbacks=[following],
            stop=CombinedStopper(*stoppers),
        ),
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consider boosting PBT", category=UserWarning)
            tuner.fit()
    finally:
        shutil.rmtree(state, ignore_errors=True)


def _parent(sweep: SweepConfig, prepared: Prepared, record: RunRecord, folder: Path) -> Tracker:
    """The search's own MLflow run, above those of its trials."""
    settings = {name: value for name, value in record.config.items() if name != "run"}
    tracker = Tracker.resume_or_start(
        record.mlflow_run,
        name=sweep.name,
        uri=prepared.tracking_uri,
        folder=folder,
        experiment=prepared.config.tracking.experiment,
        params=settings,
        tags={"search": sweep.name, "search.spaces": ", ".join(sweep.spaces)} | code_tags(),
    )
    record.mlflow_run = tracker.run_id
    record.write(folder)
    tracker.log_files([folder / "sweep.yaml"], under="config")
    return tracker


def _refuse_fruitless(trials: Trials, sweep: SweepConfig) -> None:
    ranked = report.rank(list(trials), sweep.objective)
    if not any(one.rank is not None and one.control_of is None for one in ranked):
        reasons = dict.fromkeys(trial.reason for trial in trials if trial.reason)
        raise RunFailed("no trial gave a result: " + ("; ".join(map(str, reasons)) or "none came to its end"))


def _entropies(service: ReferenceService, prepared: Prepared, rows: np.ndarray) -> np.ndarray:
    """(N,) mean entropy of both responses under the primary reference."""
    primary = prepared.config.references.ordered[0]
    client = ReferenceClient(
        {primary: service.routers[primary]}, {primary: prepared.train.references[primary]}
    )
    client.ask("control", rows)
    scores = client.collect("control")[primary]
    return (scores.chosen_entropy + scores.rejected_entropy) / 2


def _best(trials: Trials, sweep: SweepConfig) -> TrialRecord:
    """The best repeat of the best point; a control is there to be compared with."""
    objective = sweep.objective[0]
    point = next(one for one in report.rank(list(trials), sweep.objective) if one.control_of is None)
    sign = 1 if objective.mode == "max" else -1
    given = [trial for trial in point.trials if trial.ended and objective.metric in trial.result]
    return max(given, key=lambda trial: sign * trial.result[objective.metric])
