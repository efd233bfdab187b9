"""Rewards of sampled responses: from a user's function, or from a text classifier as a Ray actor."""

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
from orchestrator.cluster.worker_environment import SealedSecrets
from orchestrator.config.functions import REWARD_EXAMPLE, REWARD_FIELD, import_function
from orchestrator.config.paths import resolve_if_present
from orchestrator.config.sections import RewardConfig
from orchestrator.errors import RunFailed, UsageError, did_you_mean

REWARD_SECTION = "evaluation.sampling.reward"
TEXTS_PER_BATCH = 16
MAX_RESTARTS = 3
LOAD_TIMEOUT_S, SCORE_TIMEOUT_S = 3600.0, 3600.0


class RewardScorer(Protocol):
    """Gives each response a number, larger for better. Can be pickled and sent to a worker."""

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return one finite number for each response to its prompt.

        Raises:
            RunFailed: there is no such number.
        """
        ...

    def close(self) -> None:
        """Free what `start_reward_scorer` started; the driver calls it once no worker needs scores."""
        ...


def start_reward_scorer(config: RewardConfig, *, start_timeout_s: float) -> RewardScorer:
    """Start the reward scorer of a run file and wait until it is ready.

    Args:
        config: the run file's section.
        start_timeout_s: how long a reward model may wait for a node with room; loading it is not counted.

    Raises:
        UsageError: there is no such function or model, or the model has no such reward.
        RunFailed: no node had room for the reward model, or it died.
    """
    if config.function is not None:
        return load_reward_function(config.function)
    bundle = build_replica_bundle(config.resources, ClusterProfile.from_nodes(list_node_resources()))
    needs = ", ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())
    num_cpus, num_gpus = bundle.pop("CPU", 0), bundle.pop("GPU", 0)
    secrets = SealedSecrets.seal(os.environ)
    actor = (
        ray.remote(RewardModelActor)
        .options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            resources=bundle or None,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
        .remote(
            _resolve_model_path(config),
            gpu=num_gpus > 0,
            cpus=num_cpus,
            secrets=secrets,
        )
    )
    scorer = RewardModelClient(actor, str(config.model), secrets)
    try:
        _wait_for_answer(scorer.name, actor.get_pid.remote(), start_timeout_s)
        _wait_for_answer(scorer.name, actor.load_model.remote(), LOAD_TIMEOUT_S, "load its model")
    except GetTimeoutError:
        scorer.close()
        raise RunFailed(
            f"{REWARD_SECTION}.model: no node had room for it ({needs}) within {start_timeout_s:g} s; free "
            f"resources, or ask for less with {REWARD_SECTION}.resources"
        ) from None
    except BaseException:
        scorer.close()
        raise
    return scorer


def check_reward_model(config: RewardConfig) -> None:
    """Check a reward model's files and the class that it is to give, without loading its weights.

    Raises:
        UsageError: the model cannot be found or is no such classifier.
    """
    from models.load import load_tokenizer, locate_model
    from models.verify import read_class_names, verify_weights

    resolved = _resolve_model_path(config)
    settings = ModelConfig(model=str(resolved.model), revision=resolved.revision)
    try:
        located = locate_model(settings)
        verify_weights(located, settings, is_classifier=True)
        load_tokenizer(located, settings)
    except ModelError as error:
        raise UsageError(f"{REWARD_SECTION}.model: {error}") from error
    find_reward_class(read_class_names(located), config.label)


def load_reward_function(path: str) -> RewardScorer:
    """Load the function `package.module:function`, (prompts, responses) -> one number for each response.

    Modules are searched for in the working folder too. The function runs in the process that calls `score`.

    Raises:
        UsageError: there is no such module or function, or it cannot be imported or called.
    """
    folder = str(Path.cwd())
    _import_reward_function(path, folder)
    return RewardFunction(path, folder)


def _import_reward_function(path: str, folder: str) -> Callable[[list[str], list[str]], Iterable[Any]]:
    return import_function(path, folder, field=REWARD_FIELD, example=REWARD_EXAMPLE)


@dataclass(frozen=True)
class RewardFunction:
    """A reward function by its name; every worker that calls `score` imports it itself.

    `folder` is the working folder of the command, because a worker may have another.
    """

    path: str
    folder: str

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Call the function and check what it returns."""
        source = f"{REWARD_SECTION}.function {self.path}"
        function = _import_reward_function(self.path, self.folder)
        try:
            return _check_rewards(source, function(list(prompts), list(responses)), responses)
        except RunFailed:
            raise
        except Exception as error:  # a user's function may raise anything
            raise RunFailed(f"{source} failed: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Do nothing: there is no process to stop."""


@dataclass(frozen=True)
class RewardModelClient:
    """A handle of the actor that serves a reward model."""

    actor: Any
    name: str
    secrets: SealedSecrets
    """Kept for the actor, which reads them when it loads its model."""

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Have the actor score the responses and check what it returns."""
        answer = self.actor.score.remote(list(prompts), list(responses))
        rewards = _wait_for_answer(self.name, answer, SCORE_TIMEOUT_S, f"score {len(responses)} responses")
        return _check_rewards(f"{REWARD_SECTION}.model {self.name}", rewards, responses)

    def close(self) -> None:
        """Stop the actor."""
        ray.kill(self.actor)


class RewardModelActor:
    """The actor of a text classifier, which reads prompt and response as one text.

    With one output its value is the reward, with several the probability of the class `label`. The
    constructor loads nothing, so that an error in loading is raised to the caller of `load_model`.
    """

    def __init__(
        self, config: RewardConfig, *, gpu: bool, cpus: float, secrets: SealedSecrets | None = None
    ) -> None:
        self._config, self._gpu, self._cpus, self._secrets = config, gpu, cpus, secrets
        self._model: Any = None

    def get_pid(self) -> int:
        """Return the process id; an answer also shows that the actor has its resources."""
        return os.getpid()

    def load_model(self) -> None:
        """Load the model; its weights are read from safetensors alone, and code in its repository is not run.

        Raises:
            ModelError: the model cannot be found or loaded, or is no classifier.
            UsageError: it has no class `label`.
        """
        from models.locate import locate_model

        if self._secrets is not None:
            self._secrets.export_to_environment()
        settings = ModelConfig(model=str(self._config.model), revision=self._config.revision)
        located = locate_model(settings)  # before the slow imports: a missing model is reported at once

        import torch

        from models.classifier import load_classifier
        from models.load import load_tokenizer

        self._device = torch.device("cuda" if self._gpu else "cpu")
        if not self._gpu:
            torch.set_num_threads(max(1, int(self._cpus)))
        self._tokenizer = load_tokenizer(located, settings)
        self._tokenizer.truncation_side = "left"  # the response is on the right and must not be cut
        model = load_classifier(located, settings, dtype="auto" if self._gpu else torch.float32)
        self._class = find_reward_class(model.config.id2label, self._config.label)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = model.to(self._device).eval()

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return one number for each response."""
        if self._model is None:  # Ray restarted the actor
            self.load_model()
        # A tokenizer may return no tokens at all for an empty text.
        texts = [prompt + response or " " for prompt, response in zip(prompts, responses, strict=True)]
        size = TEXTS_PER_BATCH if self._tokenizer.pad_token_id is not None else 1
        return [
            reward
            for start in range(0, len(texts), size)
            for reward in self._score_batch(texts[start : start + size])
        ]

    def _score_batch(self, texts: list[str]) -> list[float]:
        """Return the reward of each text, all computed in one forward pass."""
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
        is_multi_label = self._model.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if is_multi_label else logits.softmax(dim=-1)
        return probabilities[:, self._class].tolist()


def find_reward_class(names: Mapping[int, str], label: str | int | None) -> int | None:
    """Return the index of the class whose probability is the reward, or None if the model has one output.

    Args:
        names: class names by index.
        label: the name or index of a class.

    Raises:
        UsageError: the model has several classes and `label` is none of them, or one output and a `label`.
    """
    if len(names) == 1:
        if label is not None:
            raise UsageError(
                f"{REWARD_SECTION}.label: the model has one output, which is the reward; leave label out"
            )
        return None
    classes = ", ".join(f"{index} ({name})" for index, name in sorted(names.items()))
    if label is None:
        raise UsageError(
            f"{REWARD_SECTION}.label is missing: the model has {len(names)} classes, {classes}; set it to "
            "the one whose probability is the reward"
        )
    matches = [index for index, name in names.items() if label in (index, name)]
    if not matches:
        hint = did_you_mean(label, names.values()) if isinstance(label, str) else f"; it has {classes}"
        raise UsageError(f"{REWARD_SECTION}.label: the model has no class {label!r}{hint}")
    return matches[0]


def _check_rewards(source: str, rewards: Iterable[Any], responses: list[str]) -> list[float]:
    """Return the rewards as numbers, one for each response; `source` names their scorer in errors."""
    try:
        numbers = [float(reward) for reward in rewards]
    except (TypeError, ValueError):
        raise RunFailed(
            f"{source} gave {rewards!r:.80}, where one number for each response is wanted"
        ) from None
    if len(numbers) != len(responses):
        raise RunFailed(
            f"{source} gave {len(numbers)} numbers for {len(responses)} responses; it must give one for each"
        )
    for number, response in zip(numbers, responses, strict=True):
        if not math.isfinite(number):
            raise RunFailed(f"{source} gave {number} for the response {response!r:.80}; it must be finite")
    return numbers


def _resolve_model_path(config: RewardConfig) -> RewardConfig:
    """Make the path of a local model absolute in the command's process: actors have other working folders."""
    model = resolve_if_present(str(config.model), field=f"{REWARD_SECTION}.model")
    return config.model_copy(update={"model": model})


def _wait_for_answer(name: str, answer: Any, timeout: float, task: str = "") -> Any:
    """Return the actor's answer, or raise its error as one that names the model.

    Without a `task` to name in the message, GetTimeoutError is raised as it is.
    """
    try:
        return ray.get(answer, timeout=timeout)
    except GetTimeoutError:
        if not task:
            raise
        raise RunFailed(f"{REWARD_SECTION}.model {name} did not {task} within {timeout:g} s") from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UsageError | ModelError):
            raise UsageError(f"{REWARD_SECTION}.model: {cause}") from error
        raise RunFailed(f"{REWARD_SECTION}.model {name}: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        first = str(error).strip().splitlines()[0]
        raise RunFailed(
            f"{REWARD_SECTION}.model {name} died, most often because memory ran out. Ray says: {first}"
        ) from error
