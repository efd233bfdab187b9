"""What `polyref label` was asked to do. Imports neither torch nor transformers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.config.paths import resolve_path
from orchestrator.config.problems import build_source
from orchestrator.config.run import load_run
from orchestrator.errors import UsageError
from orchestrator.labels.templates import JudgingTemplate
from preferences.config import SourceConfig

DEFAULT_STORAGE = "runs"


@dataclass(frozen=True)
class JudgeChoice:
    """A judge that was named on the command line.

    Attributes:
        name: its column is `judge_<name>`.
        model: hub id, folder, `models:/name@alias`, or the endpoint's model.
        weight: of its probability in the soft label, relative to the others'.
        kind: a language model, a reward model, or a model behind an endpoint.
    """

    name: str
    model: str
    weight: float
    kind: Literal["judge", "reward", "endpoint"]

    @property
    def option(self) -> str:
        """The option that named it, for messages."""
        return {"judge": "--judge", "reward": "--reward", "endpoint": "--judge-model"}[self.kind]


@dataclass(frozen=True)
class EndpointSettings:
    """How an OpenAI-compatible endpoint is asked.

    Attributes:
        url: its base URL, e.g. http://127.0.0.1:8000/v1.
        votes: answers sampled per question; 0 reads log-probs instead.
        rate_limit: most requests per minute, None for no limit.
        concurrency: open requests.
        timeout_s: how long one answer may take.
        retries: how often a request is repeated after 429, 5xx or a lost connection.
    """

    url: str
    votes: int = 0
    rate_limit: float | None = None
    concurrency: int = 8
    timeout_s: float = 120.0
    retries: int = 6


@dataclass(frozen=True)
class LabelSettings:
    """What to label, with which judges, and where to.

    Attributes:
        sources: the pairs.
        storage_path: where scores and answers are kept, and the default registry is.
        tracking_uri: MLflow server of `models:/` names; None for that of `storage_path`.
        output: the Parquet file to write.
        judges: at least one, with different names.
        template: of the question.
        answers: the two one-token answers.
        temperature: the difference of log-probs or rewards is divided by it.
        endpoint: None without one.
        limit: most pairs.
        replicas: copies of each local judge.
        on_bad_row: what to do with a row that cannot be used.
    """

    sources: tuple[SourceConfig, ...]
    storage_path: str
    tracking_uri: str | None
    output: Path
    judges: tuple[JudgeChoice, ...]
    template: JudgingTemplate
    answers: tuple[str, str] = ("A", "B")
    temperature: float = 1.0
    endpoint: EndpointSettings | None = None
    limit: int | None = None
    replicas: int = 1
    on_bad_row: Literal["stop", "skip"] = "stop"

    def list_judges(self, kind: Literal["judge", "reward", "endpoint"]) -> list[JudgeChoice]:
        """Return the judges of one kind."""
        return [judge for judge in self.judges if judge.kind == kind]


@dataclass(frozen=True)
class SourceSettings:
    """The pairs that SOURCE names, and where what is computed for them is stored."""

    sources: tuple[SourceConfig, ...]
    storage_path: str
    tracking_uri: str | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"


def read_source(
    source: str, *, split: str | None, subset: str | None, storage_path: str | None
) -> SourceSettings:
    """Read what SOURCE names: a run file's training data, or a file, folder, URI or hub data set.

    Raises:
        UsageError: the run file is wrong.
    """
    if not source.endswith((".yaml", ".yml")):
        chosen = {name: value for name, value in (("split", split), ("subset", subset)) if value is not None}
        return SourceSettings(
            (build_source("SOURCE", source=source, **chosen),), _resolve_path(storage_path or DEFAULT_STORAGE)
        )
    if split is not None or subset is not None:
        raise UsageError(
            f"--split and --subset are for a data set; set data.split and data.subset in {source}"
        )
    config = load_run(source)
    return SourceSettings(
        config.data.train_sources,
        _resolve_path(storage_path or config.storage_path),
        config.tracking.uri,
        config.data.on_bad_row,
    )


def _resolve_path(storage: str) -> str:
    """Make a path absolute: actors have other working folders."""
    return storage if "://" in storage else str(resolve_path(storage, field="storage_path"))


def parse_judges(
    judges: Sequence[str], rewards: Sequence[str], endpoint_model: str | None
) -> tuple[JudgeChoice, ...]:
    """Parse `MODEL` and `MODEL=WEIGHT`, and give each judge a name of its own.

    Raises:
        UsageError: there is no judge, or a weight is no positive number.
    """
    named = [("judge", text) for text in judges] + [("reward", text) for text in rewards]
    named += [("endpoint", endpoint_model)] if endpoint_model else []
    if not named:
        raise UsageError(
            "no judge is named; give --judge MODEL, --reward MODEL, or --judge-url and --judge-model"
        )
    choices: list[JudgeChoice] = []
    for kind, text in named:
        model, weight = _split_weight(text)
        name = _choose_name(model, {choice.name for choice in choices})
        choices.append(JudgeChoice(name, model, weight, kind))  # type: ignore[arg-type]
    return tuple(choices)


def parse_answers(text: str) -> tuple[str, str]:
    """Parse `A,B`.

    Raises:
        UsageError: it is not two different words.
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) != 2 or not all(words) or words[0] == words[1]:
        raise UsageError(f"--answers {text!r}: give two different answers, e.g. --answers A,B")
    return words[0], words[1]


def check_output(path: str) -> Path:
    """Return the path of the Parquet file to write.

    Raises:
        UsageError: the name does not end with .parquet.
    """
    output = resolve_path(path, field="--to")
    if output.suffix != ".parquet":
        raise UsageError(f"--to {path}: labels are written as Parquet; name a file that ends with .parquet")
    return output


def _split_weight(text: str) -> tuple[str, float]:
    model, separator, number = text.rpartition("=")
    if not separator:
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0  # a name with an equals sign
    if not 0 < weight < float("inf") or not model:
        raise UsageError(f"{text}: a judge's weight must be above 0; e.g. MODEL=2.0")
    return model, weight


def _choose_name(model: str, taken: set[str]) -> str:
    """Name a judge as its column is called: the last part of its model's name, numbered if taken."""
    last = model.removeprefix("models:/").rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    base = re.sub(r"[^\w.-]+", "-", last).strip("-") or "judge"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name
