"""Judges of sampled responses: a function of the user's, or a model that classifies text, as a Ray actor."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from models.config import ModelConfig, ModelError
from orchestrator.cluster.nodes import list_node_resources
from orchestrator.cluster.placement import ClusterProfile, build_replica_bundle
from orchestrator.cluster.worker_environment import collect_secrets
from orchestrator.config.functions import REWARD_EXAMPLE, REWARD_FIELD, import_function
from orchestrator.config.sections import RewardConfig
from orchestrator.errors import RunFailed, UsageError, did_you_mean

FIELD = "evaluation.sampling.reward"
BATCH_TEXTS = 16
RESTARTS = 3


class RewardScorer(Protocol):
    """Gives a response a number, larger for better. Can be sent to a worker."""

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One finite number for each response behind its prompt; RunFailed where there is none."""
        ...

    def close(self) -> None:
        """Free what `start_judge` started; the driver calls it, once no worker will ask again."""
        ...


def start_reward_scorer(config: RewardConfig, *, start_timeout_s: float) -> RewardScorer:
    """The judge of a run file, ready to be asked.

    Args:
        config: the run file's section.
        start_timeout_s: how long a reward model may wait for a place; loading it is not counted.

    Raises:
        UsageError: there is no such function or model, or the model gives no reward as asked.
        RunFailed: the reward model found no place, or died.
    """
    if config.function is not None:
        return load_reward_function(config.function)
    bundle = build_replica_bundle(config.resources, ClusterProfile.from_nodes(list_node_resources()))
    needs = ", ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())
    num_cpus, num_gpus = bundle.pop("CPU", 0), bundle.pop("GPU", 0)
    actor = (
        ray.remote(RewardModelActor)
        .options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            resources=bundle or None,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        .remote(
            _resolve_model_path(config),
            gpu=num_gpus > 0,
            cpus=num_cpus,
            environment=collect_secrets(os.environ),
        )
    )
    judge = RewardModelClient(actor, str(config.model))
    try:
        _wait_for_answer(judge.name, actor.pid.remote(), start_timeout_s)
        _wait_for_answer(judge.name, actor.setup.remote())
    except GetTimeoutError:
        judge.close()
        raise RunFailed(
            f"{FIELD}.model: no node had room for it ({needs}) within {start_timeout_s:g} s; free resources, "
            f"or ask for less with {FIELD}.resources"
        ) from None
    except BaseException:
        judge.close()
        raise
    return judge


def load_reward_function(path: str) -> RewardScorer:
    """The function `package.module:function`, (prompts, responses) -> one number for each response.

    Modules are looked for in the working folder too. It is called in the process that asks.

    Raises:
        UsageError: there is no such module or function, or it cannot be imported or called.
    """
    folder = os.getcwd()
    _import_reward_function(path, folder)
    return RewardFunction(path, folder)


def _import_reward_function(path: str, folder: str) -> Callable[[list[str], list[str]], Iterable[Any]]:
    return import_function(path, folder, field=REWARD_FIELD, example=REWARD_EXAMPLE)


@dataclass(frozen=True)
class RewardFunction:
    """A function by its name: the worker that asks imports it itself.

    `folder` is the working folder of the command, which is not a worker's everywhere.
    """

    path: str
    folder: str

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        who, function = f"{FIELD}.function {self.path}", _import_reward_function(self.path, self.folder)
        try:
            return _check_rewards(who, function(list(prompts), list(responses)), responses)
        except RunFailed:
            raise
        except Exception as error:  # whatever a function of the user's may raise
            raise RunFailed(f"{who} failed: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Nothing was started."""


@dataclass(frozen=True)
class RewardModelClient:
    """A reward model by its actor."""

    actor: Any
    name: str

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        rewards = _wait_for_answer(self.name, self.actor.score.remote(list(prompts), list(responses)))
        return _check_rewards(f"{FIELD}.model {self.name}", rewards, responses)

    def close(self) -> None:
        ray.kill(self.actor)


class RewardModelActor:
    """The actor: a text classifier's score of prompt and response as one text.

    With one output its value is the reward, with several the probability of the class `label`. The
    constructor is cheap, so that a failure to load reaches whoever called `setup`.
    """

    def __init__(
        self, config: RewardConfig, *, gpu: bool, cpus: float, environment: Mapping[str, str]
    ) -> None:
        self._config, self._gpu, self._cpus, self._environment = config, gpu, cpus, dict(environment)
        self._model: Any = None

    def pid(self) -> int:
        """Process id; an answer also says that the actor has its resources."""
        return os.getpid()

    def setup(self) -> None:
        """Load the model; its weights are read from safetensors alone, and code that it brings is not run.

        Raises:
            ModelError: the model cannot be found or loaded.
            UsageError: it is no classifier, or has no class such as `label`.
        """
        from models.locate import first_line, locate

        os.environ.update(self._environment)
        settings = ModelConfig(model=str(self._config.model), revision=self._config.revision)
        located = locate(settings)  # before the slow imports: what is missing is told soon
        if located.kind != "folder":
            raise UsageError(f"{settings.model} is no whole model; merge the adapter, or give another model")

        import torch
        from transformers import AutoModelForSequenceClassification

        from models.load import load_tokenizer

        self._device = torch.device("cuda" if self._gpu else "cpu")
        if not self._gpu:
            torch.set_num_threads(max(1, int(self._cpus)))
        self._tokenizer = load_tokenizer(located, settings)
        self._tokenizer.truncation_side = "left"  # what is judged stands on the right
        try:
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                located.path,
                use_safetensors=True,
                dtype="auto" if self._gpu else torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{settings.model} could not be loaded: {first_line(error)}") from error
        if loaded["missing_keys"]:
            raise UsageError(
                f"{settings.model} is no classifier: it has no weights {min(loaded['missing_keys'])}; give a "
                "model that was trained for sequence classification"
            )
        self._class = find_reward_class(model.config.id2label, self._config.label)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = model.to(self._device).eval()

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One number for each response."""
        if self._model is None:  # Ray restarted the actor
            self.setup()
        # A tokenizer may make nothing at all of an empty text.
        texts = [prompt + response or " " for prompt, response in zip(prompts, responses, strict=True)]
        size = BATCH_TEXTS if self._tokenizer.pad_token_id is not None else 1
        return [
            reward
            for start in range(0, len(texts), size)
            for reward in self._score_batch(texts[start : start + size])
        ]

    def _score_batch(self, texts: list[str]) -> list[float]:
        import torch

        positions = getattr(self._model.config, "max_position_embeddings", None)
        inputs = self._tokenizer(
            texts,
            return_tensors="pt",
            padding=len(texts) > 1,
            truncation=True,
            max_length=min(self._tokenizer.model_max_length, positions or self._tokenizer.model_max_length),
        )
        with torch.inference_mode():
            logits = self._model(**inputs.to(self._device)).logits.double()
        if self._class is None:
            return logits[:, 0].tolist()
        several = self._model.config.problem_type == "multi_label_classification"
        chances = logits.sigmoid() if several else logits.softmax(dim=-1)
        return chances[:, self._class].tolist()


def find_reward_class(names: Mapping[int, str], label: str | int | None) -> int | None:
    """The class whose probability is the reward, or None where the model has one output.

    Raises:
        UsageError: `label` names none of several classes, or one of a single output.
    """
    if len(names) == 1:
        if label is not None:
            raise UsageError(f"{FIELD}.label: the model has one output, which is the reward; leave label out")
        return None
    shown = ", ".join(f"{index} ({name})" for index, name in sorted(names.items()))
    if label is None:
        raise UsageError(
            f"{FIELD}.label is missing: the model has {len(names)} classes, {shown}; set it to the one whose "
            "probability is the reward"
        )
    found = [index for index, name in names.items() if label in (index, name)]
    if not found:
        hint = did_you_mean(label, names.values()) if isinstance(label, str) else f"; it has {shown}"
        raise UsageError(f"{FIELD}.label: the model has no class {label!r}{hint}")
    return found[0]


def _check_rewards(who: str, rewards: Iterable[Any], responses: list[str]) -> list[float]:
    """The rewards as numbers, one for each response."""
    try:
        numbers = [float(reward) for reward in rewards]
    except (TypeError, ValueError):
        raise RunFailed(f"{who} gave {rewards!r:.80}, where one number for each response is wanted") from None
    if len(numbers) != len(responses):
        raise RunFailed(
            f"{who} gave {len(numbers)} numbers for {len(responses)} responses; it must give one for each"
        )
    for number, response in zip(numbers, responses, strict=True):
        if not math.isfinite(number):
            raise RunFailed(f"{who} gave {number} for the response {response!r:.80}; it must be finite")
    return numbers


def _resolve_model_path(config: RewardConfig) -> RewardConfig:
    """A relative folder made absolute here, where it was given: actors work in other folders."""
    path = Path(str(config.model)).expanduser()
    return config.model_copy(update={"model": str(path.resolve())}) if path.exists() else config


def _wait_for_answer(name: str, answer: Any, timeout: float | None = None) -> Any:
    """The actor's answer, or its error as one that says which model."""
    try:
        return ray.get(answer, timeout=timeout)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UsageError | ModelError):
            raise UsageError(f"{FIELD}.model: {cause}") from error
        raise RunFailed(f"{FIELD}.model {name}: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        first = str(error).strip().splitlines()[0]
        raise RunFailed(
            f"{FIELD}.model {name} died, most often because memory ran out. Ray says: {first}"
        ) from error
