"""The command `tune`: from a sweep file to a ranked table, pictures and a registered model.

One reference service serves all trials, so that a response is scored once per reference however many losses look
at it. The journal (`trials.Trials`) is the whole state of a search; Ray Tune's own is made anew at every start.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import yaml
from ray import tune as ray_tune
from ray.tune import PlacementGroupFactory
from ray.tune.stopper import CombinedStopper, TrialPlateauStopper
from rich.console import Console
from rich.table import Table

from orchestrator import report, sweep_plots
from orchestrator.cluster import connected, nodes, secrets
from orchestrator.config import ReferenceConfig, RunConfig, RunFailed, UsageError
from orchestrator.follow import Following, Limits
from orchestrator.matching import control_of, matched_beta
from orchestrator.mlflow_client import without_secrets
from orchestrator.placement import has_gpus, trial_bundles, trial_slots
from orchestrator.prepare import Prepared, with_resolved_paths
from orchestrator.progress import plain_console
from orchestrator.record import MAY_CHANGE, RunRecord, locked, open_record, read_record, remove_run
from orchestrator.references.client import ReferenceClient
from orchestrator.references.service import ROUTER_CPUS, ReferenceService
from orchestrator.rewards import Judge
from orchestrator.scoring import (
    CPU_BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    judging,
    report_scores,
    score_split,
    serve,
    served_tables,
    warm,
)
from orchestrator.search import Search, sampled
from orchestrator.sweep import Point, SweepConfig
from orchestrator.tracking import Tracker, code_tags
from orchestrator.train import finish, prepared_run, train_on_cluster
from orchestrator.trial import MLFLOW_RUN, NUMBER, REPEAT, Shared, run_trial, trial_config
from orchestrator.trials import TrialRecord, Trials
from orchestrator.worker import calibration_rows, total_steps
from tune_spaces.schedulers import build
from tune_spaces.spaces import Space

CHECKED_POINTS = 200
"""Points drawn before anything starts, each of which must make a valid run."""
_SWEEP_MAY_CHANGE = (
    *(f"run.{field}" for field in MAY_CHANGE if field != "evaluation"),
    "search.trials",
    "max_concurrent",
    "max_failures",
    "time_budget",
    "promote",
)
_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal and MLflow have it all
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that gives up reports why, and no metric
    "TUNE_WARN_THRESHOLD_S": "30",
}


def tune(sweep: SweepConfig, *, fresh: bool = False, retry_failed: bool = False) -> RunRecord:
    """Search, rank and promote; or go on where an earlier call was killed or ran out of time.

    Raises:
        UsageError: the input is wrong, or not even one trial fits the cluster.
        RunFailed: no trial gave a result, or too many failed.
    """
    console = plain_console()
    base = _base(sweep)
    folder = Path(base.storage_path) / sweep.name
    space = _space(sweep, base)
    _refuse_bad_points(sweep, base, space)
    before = None if fresh else read_record(folder)
    with locked(folder):
        of_base = None if before is None else replace(before, config=before.config["run"])
        prepared = prepared_run(base, console, of_base)
        _refuse_unlabelled(sweep, prepared)
        with connected(wait_minutes=base.placement.wait_minutes):
            slots = _slots(sweep, base)
            prepared = prepared.on("cuda" if has_gpus(nodes()) else "cpu")
            record = _open(sweep, prepared, folder, fresh=fresh)
            trials = Trials(folder / "trials")
            if retry_failed:
                _retry(trials)
            return _Sweeping(sweep, space, prepared, record, trials, folder, console).run(slots)


def dry_run(sweep: SweepConfig, *, samples: int = 5) -> None:
    """Print the space, some of its points, the placement, and what the references would have to score."""
    console = plain_console()
    base = _base(sweep)
    space = _space(sweep, base)
    _refuse_bad_points(sweep, base, space)
    console.print(_space_table(space))
    console.print(f"\n{samples} of its points:")
    for point in sampled(space, samples, seed=sweep.search.seed):
        console.print("  " + ", ".join(f"{field}={value}" for field, value in point.items()))
    prepared = prepared_run(base, console, None)
    _refuse_unlabelled(sweep, prepared)
    with connected(wait_minutes=base.placement.wait_minutes):
        slots = _slots(sweep, base)
        console.print(f"\n{slots} trial(s) at a time beside the references, each {_asks(base)}")
        with serve(prepared.on("cuda" if has_gpus(nodes()) else "cpu")) as service:
            console.print(_forwards_table(service, prepared))


class _Sweeping:
    """A search on a connected cluster, from its first trial to the registered model."""

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
                self._report()
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

    def _try(self, search: "_TrackedSearch", service: ReferenceService, judge: Judge | None, slots: int) -> Limits:
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

    def _report(self) -> None:
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
            update |= {"name": "retrained", "storage_path": str(self.folder)}
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
    """A search whose trials have an MLflow run before they start, and which can be told that it is cut short."""

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
        return asked | {MLFLOW_RUN: trial.mlflow_run, REPEAT: trial.repeat}

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
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
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
        tuner.fit()
    finally:
        shutil.rmtree(state, ignore_errors=True)


def _base(sweep: SweepConfig) -> RunConfig:
    """The sweep's run file with paths resolved and every reference served.

    One replica scores the policy's own start for all trials, where each trial would score it for itself.
    """
    base = with_resolved_paths(sweep.base, base=Path.cwd())
    policy = base.policy
    start = {name: getattr(policy, name) for name in type(policy).__mro__[1].model_fields}
    models = {
        name: ReferenceConfig(**start) if reference.in_process else reference
        for name, reference in base.references.models.items()
    }
    base = base.model_copy(update={"references": base.references.model_copy(update={"models": models})})
    base._preset = sweep.base.preset
    return base


def _space(sweep: SweepConfig, base: RunConfig) -> Space:
    loss = sweep.run.get("loss") or {}
    return Space(sweep.spaces, sweep.domains, tuple(base.references.ordered), loss)


def _refuse_bad_points(sweep: SweepConfig, base: RunConfig, space: Space) -> None:
    """Draw many points, each of which must make a valid run; a grid must be one."""
    if sweep.search.algorithm == "grid":
        next(space.grid())
    for point in sampled(space, CHECKED_POINTS, seed=sweep.search.seed):
        try:
            trial_config(sweep, base, point, repeat=0, name="trial")
        except UsageError as error:
            said = ", ".join(f"{field}={value}" for field, value in point.items())
            raise UsageError(
                f"{sweep.name}: the space has a point that makes no valid run ({said}):\n{error}\n"
                "Narrow a field under space, or leave a named space out"
            ) from None


def _refuse_unlabelled(sweep: SweepConfig, prepared: Prepared) -> None:
    """What compares soft labels is pointless where every label is 1."""
    assert prepared.held_out is not None
    if prepared.train.soft or prepared.held_out.soft:
        return
    wanted = [o.metric for o in sweep.objective if o.metric == "eval/label_nll"]
    wanted += [f"space {name}" for name in sweep.spaces if name == "soft_labels"]
    if wanted:
        raise UsageError(
            f"{sweep.name}: {', '.join(wanted)} needs soft labels, and the data has none: give rows a soft_label or "
            "vote counts, or search and judge by something else"
        )


def _slots(sweep: SweepConfig, base: RunConfig) -> int:
    fit = trial_slots(base, nodes(), routers=ROUTER_CPUS * len(base.references.models))
    return min(fit, sweep.max_concurrent or fit)


def _asks(base: RunConfig) -> str:
    bundles = trial_bundles(base, gpus=has_gpus(nodes()))
    return " + ".join(
        ", ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in bundles
    )


def _open(sweep: SweepConfig, prepared: Prepared, folder: Path, *, fresh: bool) -> RunRecord:
    if fresh:
        remove_run(folder)
    run = prepared.config.model_dump(mode="json")
    settings = sweep.model_dump(mode="json") | {"run": run}
    record = open_record(
        folder,
        RunRecord(
            config=without_secrets(settings),
            device_type=prepared.policy.device_type,
            identity=prepared.identity,
            pins=prepared.pins,
            counts=dict(prepared.counts),
        ),
        may_change=_SWEEP_MAY_CHANGE,
    )
    (folder / "sweep.yaml").write_text(yaml.safe_dump(record.config, sort_keys=False))
    return record


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


def _retry(trials: Trials) -> None:
    for trial in trials:
        if trial.status == "failed":
            trial.status, trial.reason = "pending", None
            trials.write(trial)


def _refuse_fruitless(trials: Trials, sweep: SweepConfig) -> None:
    if not any(sweep.objective[0].metric in trial.result for trial in trials if trial.status != "failed"):
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
    with_result = [
        trial for trial in point.trials if trial.status != "failed" and objective.metric in trial.result
    ]
    return max(with_result, key=lambda trial: sign * trial.result[objective.metric])


def _space_table(space: Space) -> Table:
    table = Table("field", "domain", "when", box=None, title="the space", title_justify="left")
    for row in space.table():
        table.add_row(row.field, row.domain, row.when)
    return table


def _forwards_table(service: ReferenceService, prepared: Prepared) -> Table:
    """Per reference: the responses in the data, those the store misses, and about how many batches they make."""
    parts = [part for part in (prepared.train, prepared.held_out) if part is not None]
    table = Table("reference", "responses", "to score", "batches, about", box=None, title_justify="left")
    table.title = "the references' forward passes, whatever the number of trials"
    for name, model in prepared.references.items():
        rows = [part.references[name] for part in parts]
        missing = sum(service.missing({name: one})[name] for one in rows)
        responses = sum(2 * len(one) for one in rows)
        tokens = sum(int(one.pair_lengths.sum()) for one in rows)
        budget = GPU_BATCH_TOKENS if model.device_type == "cuda" else CPU_BATCH_TOKENS
        batches = math.ceil(tokens / budget * missing / max(responses, 1))
        table.add_row(name, f"{responses:,}", f"{missing:,}", f"{batches:,}")
    return table
