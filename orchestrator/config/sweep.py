"""The sweep file: how a search varies one run file, chooses trials and promotes the best.

This module imports neither torch nor Ray, so that a wrong file is refused in a fraction of a second.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from losses.config import LossConfig
from losses.presets import ALIASES
from orchestrator.config.paths import resolve_path
from orchestrator.config.problems import explain_validation_error, refuse_booleans
from orchestrator.config.run import RunConfig, build_run_schema, parse_run
from orchestrator.config.sections import KL_PREFIX, METRICS, EvaluationConfig, RunName, Section, Seed
from orchestrator.config.yaml import apply_overrides, read_yaml
from orchestrator.errors import UsageError, did_you_mean
from tune_spaces.domains import Choice
from tune_spaces.draft import PRESET_FIELD
from tune_spaces.schedulers import FifoConfig, SchedulerConfig
from tune_spaces.spaces import SPACES, Domain, apply_point, parse_domain

Point = Mapping[str, Any]
"""The run-file fields that a trial changes, by dotted name, and their values."""


_SEARCHABLE = ("loss", "training", "references.use", "policy.adapter")
_NOT_SEARCHED = {
    "training.seed": "set search.repeats instead, which runs every point with several seeds",
    "policy.adapter": "name one of its fields, e.g. policy.adapter.r",
    "loss": "name one of its fields, e.g. loss.preset or loss.beta",
    "training": "name one of its fields, e.g. training.learning_rate",
}


class SearchConfig(Section):
    """How points are chosen, and how often each point is run."""

    algorithm: Literal["random", "grid", "tpe"] = Field(
        default="random",
        description="random: independent draws; grid: every combination once; tpe: Optuna's sampler",
    )
    trials: int | None = Field(
        default=None,
        ge=1,
        description="points to try; null only with grid: all of them. Repeats and controls come on top",
        examples=[32],
    )
    repeats: int = Field(default=1, ge=1, description="seeds per point", examples=[3])
    controls: bool = Field(
        default=False,
        description="add the matched control of each soft or dispersed point: the same loss without either, "
        "which pulls as hard at the start",
    )
    seed: Seed = Field(default=0, description="seed of what is drawn")

    @model_validator(mode="after")
    def _require_trials(self) -> "SearchConfig":
        """Refuse a search without a number of trials, unless it is a grid, which is finite."""
        if self.trials is None and self.algorithm != "grid":
            raise ValueError(
                f"trials must say how many points a {self.algorithm} search tries, e.g. trials: 16"
            )
        return self


class Objective(Section):
    """A metric and its direction, by default that of the known metric, and min for `eval/kl/<reference>`."""

    model_config = ConfigDict(json_schema_extra={"required": ["metric"]})

    metric: str = Field(
        description="one of the metrics that a run can be judged by, or `eval/kl/<reference>`",
        examples=["eval/accuracy"],
    )
    mode: Literal["max", "min"] = Field(
        description="whether more or less is better; left out: what the metric means"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_mode(cls, values: Any) -> Any:
        """Accept a metric's name alone, refuse an unknown one, and fill in its direction."""
        values = {"metric": values} if isinstance(values, str) else values
        metric = values.get("metric") if isinstance(values, Mapping) else None
        if not isinstance(metric, str):
            return values
        if metric not in METRICS and not metric.startswith(KL_PREFIX):
            raise ValueError(
                f"metric {metric!r} is unknown{did_you_mean(metric, [*METRICS, KL_PREFIX + '<reference>'])}"
            )
        return {"mode": METRICS.get(metric, "min"), **values}


class PlateauConfig(Section):
    """When to stop a trial whose metric no longer moves, by the standard deviation of its last results."""

    std: float = Field(
        default=0.005, gt=0, description="the standard deviation below which the objective no longer moves"
    )
    results: int = Field(default=4, ge=2, description="last evaluations that it is taken over")
    grace: int = Field(default=4, ge=1, description="evaluations before a trial may be stopped")


def _wrap_objective(value: Any) -> Any:
    """Return a single objective as a list of one."""
    return value if isinstance(value, list | tuple) else [value]


_WrappedObjective = BeforeValidator(
    _wrap_objective, json_schema_input_type=str | Objective | tuple[str | Objective, ...]
)


class SweepFile(Section):
    """A sweep file as the user writes it."""

    name: RunName = Field(
        description="letters, digits, `.`, `_`, `-`; the search's folder is `<storage_path>/<name>`",
        examples=["which-loss"],
    )
    run: dict[str, Any] = Field(
        description="the run file that every trial starts from: its path, relative to the sweep file, or "
        "its content; overridden by `run.<field>=value`",
        examples=["run.yaml"],
    )
    spaces: tuple[str, ...] = Field(
        default=(), description="named spaces: what is searched", examples=[["losses", "optimizer"]]
    )
    space: dict[str, Any] = Field(
        default_factory=dict,
        description="dotted field of the run file: domain, or a value that is set",
        examples=[{"training.learning_rate": {"loguniform": [1.0e-6, 1.0e-4]}}],
    )
    search: SearchConfig = Field(description="how points are chosen, and how often each point is run")
    scheduler: SchedulerConfig = Field(default=FifoConfig(), description="which trials are stopped early")
    plateau: PlateauConfig | None = Field(
        default=None,
        description="stop a trial whose objective no longer moves; null: none is",
        examples=[{"std": 0.005}],
    )
    objective: Annotated[tuple[Objective, ...], _WrappedObjective, Field(min_length=1)] = Field(
        default=(Objective(metric="eval/accuracy", mode="max"),),
        description="what trials are ranked by: a metric, {metric: ..., mode: max}, or a list of them",
        examples=["eval/label_nll"],
    )
    max_concurrent: int | None = Field(
        default=None, ge=1, description="trials at a time; null: as many as fit", examples=[4]
    )
    max_failures: int | None = Field(
        default=None,
        ge=0,
        description="more failed trials than this end the search; null: none do",
        examples=[5],
    )
    time_budget: float | None = Field(
        default=None,
        gt=0,
        le=525_600,
        description="minutes until this call ends the search; the same command resumes it",
        examples=[120],
    )
    promote: Literal["best", "retrain"] | None = Field(
        default="best",
        description="best: export and register the best trial; retrain: train its settings anew; null: "
        "nothing",
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> "SweepFile":
        """Refuse unknown spaces, an empty space, and several objectives without TPE."""
        for name in self.spaces:
            if name not in SPACES:
                raise ValueError(f"spaces: there is no space {name!r}{did_you_mean(name, SPACES)}")
        if not self.spaces and not self.space:
            raise ValueError(f"nothing to search; name spaces ({', '.join(SPACES)}) or fields under space")
        if len(self.objective) > 1 and self.search.algorithm != "tpe":
            raise ValueError("several objectives need search.algorithm: tpe")
        return self


class SweepConfig(SweepFile):
    """A sweep file whose run file and domains are parsed."""

    base: RunConfig = Field(
        exclude=True, description="the run file that trials start from, without drawn fields"
    )
    domains: Mapping[str, Domain] = Field(exclude=True, description="the fields under space")


def load_sweep(
    file: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> SweepConfig:
    """Read a sweep file and its run file, and apply overrides (`search.trials=4 run.training.epochs=2`).

    The content of a sweep file does as well; a run file that it names is then relative to the working folder.

    Raises:
        UsageError: one message naming the file and the line or the field, and the remedy.
    """
    if isinstance(file, Mapping):
        content, name, folder = dict(file), "sweep", Path()
    else:
        content = read_yaml(file, what="sweep file (name, run, spaces, search, ...)")
        name, folder = str(file), Path(file).parent
    # Which run file is read comes first, and then overrides of the fields in it.
    run_overrides = [text for text in overrides if text.startswith("run=")]
    content = apply_overrides(content, run_overrides)
    run, run_source = content.get("run"), f"{name}: run"
    if isinstance(run, str):
        run_file = resolve_path(run, field=f"{name}: run", base=folder)
        run_source = str(run_file)
        content["run"] = read_yaml(run_file)
    elif run is None:
        raise UsageError(f"{name}: run is required and missing; name the run file that trials start from")
    field_overrides = [text for text in overrides if text not in run_overrides]
    return parse_sweep(apply_overrides(content, field_overrides), source=name, run_source=run_source)


def parse_sweep(content: Mapping[str, Any], *, source: str, run_source: str | None = None) -> SweepConfig:
    """Validate a sweep whose `run` is the content of a run file; messages name the files by their sources."""
    try:
        file = SweepFile.model_validate(content)
    except ValidationError as error:
        raise UsageError(explain_validation_error(error, source=source, model=SweepFile)) from None
    refuse_booleans({**content, "run": {}}, file, source=source)
    base = parse_run(_set_evaluation_metric(file, file.run), source=run_source or f"{source}: run")
    domains = {}
    for field, value in file.space.items():
        _refuse_unsearchable(field, f"{source}: space.{field}")
        try:
            domains[field] = parse_domain(value)
            _refuse_alias(field, domains[field])
        except ValueError as error:
            raise UsageError(f"{source}: space.{field}: {error}") from None
    fields = {name: getattr(file, name) for name in SweepFile.model_fields}
    sweep = SweepConfig(**fields, base=base, domains=domains)
    for objective in sweep.objective:
        _refuse_unmeasured(sweep, objective.metric, source)
    _refuse_unsuitable_run(sweep, source)
    return sweep


def build_trial_run(sweep: SweepConfig, point: Point, *, repeat: int = 0, name: str = "trial") -> RunConfig:
    """Build a trial's run: the run file with the point's fields, and the seed of its repeat.

    A drawn `loss.preset` replaces the run file's whole loss, whose other fields belong to another loss.

    Raises:
        UsageError: the point makes no valid run.
    """
    trial_fields: dict[str, Any] = {"name": name, "training.keep_last": 1}
    trial_fields["training.seed"] = sweep.base.training.seed + repeat
    if sweep.scheduler.type == "pbt":  # it copies checkpoints from one trial to another after evaluations
        trial_fields["training.save_every"] = sweep.base.evaluation.every_steps
    return parse_run(
        apply_point(_set_evaluation_metric(sweep, sweep.run), {**point, **trial_fields}),
        source=f"trial {name}",
    )


def build_sweep_schema() -> dict[str, Any]:
    """Build the JSON Schema of the sweep file for editors; `run` is a path or a run file's content."""
    schema, run = SweepFile.model_json_schema(), build_run_schema()
    schema["$defs"] = {**run.pop("$defs"), **schema["$defs"]}
    written = schema["properties"]["run"]
    schema["properties"]["run"] = {
        "anyOf": [{"type": "string"}, run],
        **{key: written[key] for key in ("description", "examples")},
    }
    return schema


def _set_evaluation_metric(sweep: SweepFile, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run file's content with the search's first objective as its evaluation metric."""
    metric = sweep.objective[0].metric
    evaluation = run.get("evaluation") or {}
    if not isinstance(evaluation, Mapping):  # refused where the run is parsed
        return dict(run)
    evaluation = dict(evaluation)
    if metric in METRICS:
        evaluation["metric"] = metric
    if metric.endswith("_at_kl"):
        evaluation.setdefault("keep", "best")
    return {**run, "evaluation": evaluation}


def _refuse_unsearchable(field: str, where: str) -> None:
    """Refuse a field under `space` that a run file does not have, or that trials must share."""
    section: Any = RunConfig
    for name in field.split("."):
        models = list(_find_model_classes(section))
        known = [known_name for model in models for known_name in model.model_fields]
        if LossConfig in models:
            known.append("preset")
        if name not in known:
            raise UsageError(f"{where}: unknown field{did_you_mean(name, known)}")
        section = tuple(model.model_fields[name].annotation for model in models if name in model.model_fields)
    if field in _NOT_SEARCHED:
        raise UsageError(f"{where}: cannot be searched; {_NOT_SEARCHED[field]}")
    if not any(field == root or field.startswith(f"{root}.") for root in _SEARCHABLE):
        raise UsageError(
            f"{where}: cannot be searched; loss.*, training.*, references.use and policy.adapter.* can. "
            "Trials share data, models and placement, so that one reference service scores for all"
        )


def _refuse_alias(field: str, domain: Domain) -> None:
    """Refuse another trainer's name among searched presets, as a loss has one name in spaces and rankings."""
    values = domain.values if isinstance(domain, Choice) else (getattr(domain, "value", None),)
    for name in map(str, values) if field == PRESET_FIELD else ():
        if name in ALIASES:
            raise ValueError(f"preset {name} is {ALIASES[name]} here; write {ALIASES[name]}")


def _find_model_classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """Iterate over the pydantic models in an annotation, such as the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in annotation if isinstance(annotation, tuple) else get_args(annotation):
        yield from _find_model_classes(inner)


def _refuse_unmeasured(sweep: SweepConfig, metric: str, source: str) -> None:
    """Refuse an objective that the run file's evaluation does not measure."""
    base = sweep.base
    if not metric.startswith(KL_PREFIX):
        keep = "best" if metric.endswith("_at_kl") else "last"
        settings = base.evaluation.model_dump() | {"metric": metric, "keep": keep}
        try:
            EvaluationConfig.model_validate(settings)
        except ValidationError as error:
            raise UsageError(
                explain_validation_error(
                    error, source=f"{source}: objective {metric}", model=EvaluationConfig
                )
            ) from None
    elif base.evaluation.sampling is None:
        raise UsageError(
            f"{source}: objective {metric} needs samples of the policy; "
            "set evaluation.sampling in the run file"
        )
    elif metric.removeprefix(KL_PREFIX) != base.references.primary:
        raise UsageError(
            f"{source}: objective {metric}: trials have only the primary reference in common; "
            f"measure KL to it: {KL_PREFIX}{base.references.primary}"
        )


def _refuse_unsuitable_run(sweep: SweepConfig, source: str) -> None:
    """Refuse a search whose trials could not be compared, or could not run under its scheduler."""
    base = sweep.base
    if base.data.eval is None and base.data.eval_fraction is None and base.data.eval_split is None:
        raise UsageError(
            f"{source}: trials are compared on held-out pairs; set data.eval or data.eval_fraction"
        )
    _refuse_incomparable_objectives(sweep, source)
    if sweep.scheduler.type == "pbt":
        _refuse_unsuitable_for_pbt(sweep, source)
    if base.loss.completions_only:
        raise UsageError(f"{source}: a search compares preference losses, and preset sft reads no pairs")


def _refuse_incomparable_objectives(sweep: SweepConfig, source: str) -> None:
    """Refuse objectives in the units of a loss if the search compares losses."""
    loss_fields = {"losses", "references", "dispersion", "soft_labels"} & set(sweep.spaces)
    loss_fields |= {field for field in sweep.space if field.startswith(("loss.", "references."))}
    for objective in sweep.objective:
        if loss_fields and objective.metric in ("eval/loss", "eval/rewards/margins"):
            raise UsageError(
                f"{source}: objective {objective.metric} is in the units of each loss, so that trials of "
                f"different losses cannot be compared by it ({', '.join(sorted(loss_fields))} searched); "
                "judge by eval/accuracy, eval/label_nll or eval/margin_at_kl"
            )


def _refuse_unsuitable_for_pbt(sweep: SweepConfig, source: str) -> None:
    """Refuse what population based training cannot do: keep the best weights, several workers, repeats."""
    if sweep.base.evaluation.keep == "best":
        raise UsageError(
            f"{source}: scheduler pbt copies the last weights of a trial to others; it needs "
            "evaluation.keep: last, and no objective at a KL budget"
        )
    if sweep.base.parallel.workers > 1:
        raise UsageError(
            f"{source}: scheduler pbt copies checkpoints between trials; it needs parallel.workers: 1"
        )
    if sweep.search.repeats > 1 or sweep.search.controls:
        raise UsageError(
            f"{source}: scheduler pbt changes a trial while it runs, so that repeats and controls of a "
            "point mean nothing; set search.repeats: 1 and search.controls: false, or another scheduler"
        )
