"""The sweep file: which runs a search makes of one run file, how it looks for them and what it keeps.

Nothing here imports torch or Ray, so that a file is refused in a fraction of a second.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from losses.config import LossConfig
from orchestrator.config.problems import explain_validation_error
from orchestrator.config.run import RunConfig, parse_run
from orchestrator.config.sections import KL, METRICS, EvaluationConfig, Section
from orchestrator.config.yaml import apply_overrides, read_yaml
from orchestrator.errors import UsageError, did_you_mean
from tune_spaces.schedulers import FifoConfig, SchedulerConfig
from tune_spaces.spaces import SPACES, Domain, apply_point, parse_domain

Point = Mapping[str, Any]
"""Dotted run-file fields and their values: what a trial changes."""


_SEARCHABLE = ("loss", "training", "references.use", "policy.adapter")
_NOT_SEARCHED = {
    "training.seed": "set search.repeats instead, which runs every point with several seeds",
    "policy.adapter": "name one of its fields, e.g. policy.adapter.r",
    "loss": "name one of its fields, e.g. loss.preset or loss.beta",
    "training": "name one of its fields, e.g. training.learning_rate",
}


class SearchConfig(Section):
    """How points are chosen, and how often each is run."""

    algorithm: Literal["random", "grid", "tpe"] = "random"
    trials: int | None = Field(
        default=None, ge=1, description="points to try; repeats and controls come on top"
    )
    repeats: int = Field(default=1, ge=1, description="seeds per point")
    controls: bool = Field(
        default=False, description="a DPO of matched beta for each soft or dispersed point"
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ends(self) -> "SearchConfig":
        if self.trials is None and self.algorithm != "grid":
            raise ValueError(
                f"trials must say how many points a {self.algorithm} search tries, e.g. trials: 16"
            )
        return self


class Objective(Section):
    """A metric and which way is better; both known metrics and `eval/kl/<reference>` have a direction."""

    metric: str
    mode: Literal["max", "min"]

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        values = {"metric": values} if isinstance(values, str) else values
        metric = values.get("metric") if isinstance(values, Mapping) else None
        if not isinstance(metric, str):
            return values
        if metric not in METRICS and not metric.startswith(KL):
            raise ValueError(
                f"metric {metric!r} is none{did_you_mean(metric, [*METRICS, KL + '<reference>'])}"
            )
        return {"mode": METRICS.get(metric, "min"), **values}


class PlateauConfig(Section):
    """Stop a trial whose metric no longer moves: its standard deviation over the last results."""

    std: float = Field(default=0.005, gt=0)
    results: int = Field(default=4, ge=2)
    grace: int = Field(default=4, ge=1, description="evaluations before a trial may be stopped")


def _wrap_objective(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class SweepFile(Section):
    """A sweep file as it is written."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run: dict[str, Any] = Field(
        description="the run file that every trial starts from: its path, or its content"
    )
    spaces: tuple[str, ...] = ()
    space: dict[str, Any] = Field(default_factory=dict, description="dotted run-file field: domain or value")
    search: SearchConfig
    scheduler: SchedulerConfig = FifoConfig()
    plateau: PlateauConfig | None = None
    objective: Annotated[tuple[Objective, ...], BeforeValidator(_wrap_objective), Field(min_length=1)] = (
        Objective(metric="eval/accuracy", mode="max"),
    )
    max_concurrent: int | None = Field(default=None, ge=1, description="default: as many as fit")
    max_failures: int | None = Field(
        default=None, ge=0, description="failed trials that end the search when exceeded"
    )
    time_budget: float | None = Field(default=None, gt=0, description="minutes of this call")
    promote: Literal["best", "retrain"] | None = "best"

    @model_validator(mode="after")
    def _makes_sense(self) -> "SweepFile":
        for name in self.spaces:
            if name not in SPACES:
                raise ValueError(f"spaces: there is no space {name!r}{did_you_mean(name, SPACES)}")
        if not self.spaces and not self.space:
            raise ValueError(f"nothing to search; name spaces ({', '.join(SPACES)}) or fields under space")
        if len(self.objective) > 1 and self.search.algorithm != "tpe":
            raise ValueError("several objectives need search.algorithm: tpe")
        return self


class SweepConfig(SweepFile):
    """A sweep file with the run file that its trials start from and its domains parsed."""

    base: RunConfig = Field(exclude=True, description="the run file without any drawn field")
    domains: Mapping[str, Domain] = Field(exclude=True, description="the fields under space")


def load_sweep(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file and the run file it names, apply overrides (`search.trials=4 run.training.epochs=2`).

    Raises:
        UsageError: one message naming the file and the line or the field, and the remedy.
    """
    content = read_yaml(path, what="sweep file (name, run, spaces, search, ...)")
    early = [text for text in overrides if text.startswith("run=")]
    content = apply_overrides(content, early)
    run, run_source = content.get("run"), f"{path}: run"
    if isinstance(run, str):
        run_file = Path(path).parent / Path(run).expanduser()
        run_source = str(run_file)
        content["run"] = read_yaml(run_file)
    elif run is None:
        raise UsageError(f"{path}: run is required and missing; name the run file that trials start from")
    late = [text for text in overrides if text not in early]
    return parse_sweep(apply_overrides(content, late), source=str(path), run_source=run_source)


def parse_sweep(content: Mapping[str, Any], *, source: str, run_source: str | None = None) -> SweepConfig:
    """Validate a sweep whose `run` is the content of a run file; the sources name them in messages."""
    try:
        file = SweepFile.model_validate(content)
    except ValidationError as error:
        raise UsageError(explain_validation_error(error, source=source, of=SweepFile)) from None
    base = parse_run(_set_evaluation_metric(file, file.run), source=run_source or f"{source}: run")
    domains = {}
    for field, value in file.space.items():
        _refuse_unsearchable(field, f"{source}: space.{field}")
        try:
            domains[field] = parse_domain(value)
        except ValueError as error:
            raise UsageError(f"{source}: space.{field}: {error}") from None
    fields = {name: getattr(file, name) for name in SweepFile.model_fields}
    sweep = SweepConfig(**fields, base=base, domains=domains)
    _refuse_unmeasured(sweep, source)
    return sweep


def build_trial_run(sweep: SweepConfig, point: Point, *, repeat: int = 0, name: str = "trial") -> RunConfig:
    """The run that a trial is: the run file with the point's fields put in, in a folder of the search.

    A drawn `loss.preset` replaces the run file's whole loss, whose other fields belong to another loss.

    Raises:
        UsageError: the point makes no valid run.
    """
    own: dict[str, Any] = {"name": name, "training.keep_last": 1}
    own["training.seed"] = sweep.base.training.seed + repeat
    if sweep.scheduler.type == "pbt":  # what it copies from one trial to another is a checkpoint
        own["training.save_every"] = sweep.base.evaluation.every_steps
    return parse_run(
        apply_point(_set_evaluation_metric(sweep, sweep.run), {**point, **own}), source=f"trial {name}"
    )


def build_sweep_schema() -> dict[str, Any]:
    """JSON Schema of the sweep file, for editors; `run` is a path or a run file's content."""
    schema = SweepFile.model_json_schema()
    schema["properties"]["run"] = {"anyOf": [{"type": "string"}, {"type": "object"}]}
    return schema


def _set_evaluation_metric(sweep: SweepFile, run: Mapping[str, Any]) -> dict[str, Any]:
    """The run file's content, judged by the search's first objective."""
    metric = sweep.objective[0].metric
    evaluation = dict(run.get("evaluation") or {})
    if metric in METRICS:
        evaluation["metric"] = metric
    if metric.endswith("_at_kl"):
        evaluation.setdefault("keep", "best")
    return {**run, "evaluation": evaluation}


def _refuse_unsearchable(field: str, where: str) -> None:
    section: Any = RunConfig
    for part in field.split("."):
        models = list(_find_model_classes(section))
        options = [name for model in models for name in model.model_fields]
        if LossConfig in models:
            options.append("preset")
        if part not in options:
            raise UsageError(f"{where}: unknown field{did_you_mean(part, options)}")
        section = tuple(model.model_fields[part].annotation for model in models if part in model.model_fields)
    if field in _NOT_SEARCHED:
        raise UsageError(f"{where}: cannot be searched; {_NOT_SEARCHED[field]}")
    if not any(field == root or field.startswith(f"{root}.") for root in _SEARCHABLE):
        raise UsageError(
            f"{where}: cannot be searched; loss.*, training.*, references.use and policy.adapter.* can. "
            "Trials share data, models and placement, so that one reference service scores for all"
        )


def _find_model_classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models in an annotation, such as the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in annotation if isinstance(annotation, tuple) else get_args(annotation):
        yield from _find_model_classes(inner)


def _refuse_unmeasured(sweep: SweepConfig, source: str) -> None:
    base = sweep.base
    for objective in sweep.objective:
        reference = objective.metric.removeprefix(KL)
        if not objective.metric.startswith(KL):
            _refuse_unmeasurable(base, objective.metric, source)
        elif base.evaluation.sampling is None:
            raise UsageError(
                f"{source}: objective {objective.metric} needs samples of the policy; "
                "set evaluation.sampling in the run file"
            )
        elif reference != base.references.primary:
            raise UsageError(
                f"{source}: objective {objective.metric}: trials have only the primary reference in common; "
                f"measure KL to it: {KL}{base.references.primary}"
            )
    if base.data.eval is None and base.data.eval_fraction is None and base.data.eval_split is None:
        raise UsageError(
            f"{source}: trials are compared on held-out pairs; set data.eval or data.eval_fraction"
        )
    of_loss = {"losses", "references", "dispersion", "soft_labels"} & set(sweep.spaces)
    of_loss |= {field for field in sweep.space if field.startswith(("loss.", "references."))}
    for objective in sweep.objective:
        if of_loss and objective.metric in ("eval/loss", "eval/rewards/margins"):
            raise UsageError(
                f"{source}: objective {objective.metric} is in the units of each loss, so that trials of "
                f"different losses cannot be compared by it ({', '.join(sorted(of_loss))} searched); "
                "judge by eval/accuracy, eval/label_nll or eval/margin_at_kl"
            )
    if sweep.scheduler.type == "pbt":
        if base.evaluation.keep == "best":
            raise UsageError(
                f"{source}: scheduler pbt hands on the last weights of a trial; it needs "
                "evaluation.keep: last, and no objective at a KL budget"
            )
        if base.parallel.workers > 1:
            raise UsageError(
                f"{source}: scheduler pbt hands checkpoints around; it needs parallel.workers: 1"
            )
        if sweep.search.repeats > 1 or sweep.search.controls:
            raise UsageError(
                f"{source}: scheduler pbt changes a trial while it runs, so that repeats and controls of a "
                "point mean nothing; set search.repeats: 1 and search.controls: false, or another scheduler"
            )
    if base.loss.completions_only:
        raise UsageError(f"{source}: a search compares preference losses, and preset sft reads no pairs")


def _refuse_unmeasurable(base: RunConfig, metric: str, source: str) -> None:
    keep = "best" if metric.endswith("_at_kl") else "last"
    settings = base.evaluation.model_dump() | {"metric": metric, "keep": keep}
    try:
        EvaluationConfig.model_validate(settings)
    except ValidationError as error:
        raise UsageError(
            explain_validation_error(error, source=f"{source}: objective {metric}", of=EvaluationConfig)
        ) from None
