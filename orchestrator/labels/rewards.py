"""Reward models as judges: a classifier with one output behind the router that serves references.

A response is scored once and kept in the score store; its reward takes the place of the log-prob.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jinja2
import numpy as np
import numpy.typing as npt

from models.load import read_model_limits
from models.verify import read_class_names
from orchestrator.errors import UsageError
from orchestrator.labels.pairs import format_text
from orchestrator.labels.questions import JUDGING_DATE
from orchestrator.labels.settings import JudgeChoice, LabelSettings
from orchestrator.labels.verdicts import Verdicts, compare_scores
from orchestrator.references.batching import split_into_batches
from orchestrator.references.messages import (
    Floats,
    Ids,
    ScoreKind,
    ScoreRequest,
    Scores,
    ScoringError,
)
from orchestrator.references.replica import Replica
from orchestrator.registry.find import PreparedModel
from preferences.pairs import Message, Pair
from preferences.tokens.rendering import Rendering
from preferences.tokens.tables import RaggedArray, TokenTable


class RewardReplica(Replica):
    """The actor of a reward model: `Replica` with a classifier; a score's `logp` is the reward."""

    def setup(self) -> None:
        """Load the classifier.

        Raises:
            ModelError: it cannot be loaded, or is no classifier.
            ScoringError: the replica has a GPU and torch finds none.
        """
        from models.locate import locate_model

        spec = self._spec
        if spec.secrets is not None:
            spec.secrets.export_to_environment()
        located = locate_model(spec.config)

        import torch

        from models.classifier import load_classifier

        self._device = torch.device("cuda" if spec.num_gpus else "cpu")
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ScoringError(
                f"reward model {spec.name!r}: its replica was given a GPU, but torch finds no CUDA there; "
                "install torch for CUDA on that node"
            )
        if self._device.type == "cpu":
            torch.set_num_threads(max(1, int(spec.num_cpus)))
        dtype = getattr(torch, spec.config.resolve_dtype(self._device.type))
        self._classifier = load_classifier(located, spec.config, dtype=dtype).to(self._device)

    def score(self, request: ScoreRequest) -> tuple[Scores, int]:
        """Return the rewards in the request's order, and how many forward passes they took."""
        texts = [
            np.concatenate([group.prompt, response])
            for group in request.unpack()
            for response in group.responses
        ]
        scores = Scores.unknown(len(texts))
        pad = self._classifier.config.pad_token_id
        # Without a padding token the model reads the last position of every row.
        budget = self._spec.max_tokens_per_batch if pad is not None else 1
        batches = split_into_batches([len(text) for text in texts], budget)
        for batch in batches:
            scores.logps[batch] = self._score_texts([texts[i] for i in batch], pad or 0)
        scores.lengths[:] = [len(text) for text in texts]
        scores.entropies[:] = 0.0
        return scores, len(batches)

    def _score_texts(self, texts: list[Ids], pad: int) -> Any:
        import torch

        ids = torch.full((len(texts), max(map(len, texts))), pad)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.as_tensor(text)
            mask[row, : len(text)] = 1
        with torch.inference_mode():
            logits = self._classifier(
                input_ids=ids.to(self._device), attention_mask=mask.to(self._device)
            ).logits
        return logits[:, 0].double().cpu().numpy()


@dataclass(frozen=True)
class RewardReader:
    """How a reward model reads a prompt with its response: in its chat format, or as one text."""

    choice: JudgeChoice
    model: PreparedModel
    settings: LabelSettings

    replica_class = RewardReplica
    score_kind: ClassVar[ScoreKind] = "reward"

    @property
    def fingerprint(self) -> str:
        """Identity of its rewards; not that of the same weights' log-probs."""
        return hashlib.sha256(f"reward {self.model.fingerprint.digest}".encode()).hexdigest()

    @property
    def positions(self) -> int | None:
        """The longest text in tokens; None without a limit."""
        limits = (
            read_model_limits(self.model.located, self.model.config).positions,
            self.model.tokenizer.model_max_length,
        )
        return min((limit for limit in limits if limit), default=None)

    def build_table(self, pairs: Sequence[Pair]) -> TokenTable:
        """Return a row per pair with an empty prompt: a response holds the tokens of the whole text."""
        empty = RaggedArray.from_rows([[] for _ in pairs])
        chosen = RaggedArray.from_rows([self._encode(pair.prompt, pair.chosen) for pair in pairs])
        rejected = RaggedArray.from_rows([self._encode(pair.prompt, pair.rejected) for pair in pairs])
        return TokenTable(empty, chosen, rejected)

    def find_fitting_pairs(self, table: TokenTable) -> npt.NDArray[np.bool_]:
        """(N,): whether both texts of each pair are within the model's positions."""
        return table.sequence_lengths <= (self.positions or np.inf)

    def refuse_several_outputs(self) -> None:
        """Refuse a classifier of several classes.

        Raises:
            UsageError: it has more outputs than one.
        """
        outputs = len(read_class_names(self.model.located))
        if outputs != 1:
            raise UsageError(
                f"{self.choice.option} {self.choice.model} has {outputs} outputs, and a reward model has "
                "one; give another model, or a language model with --judge"
            )

    def take_pairs(self, table: TokenTable, pairs: npt.NDArray[np.int64]) -> TokenTable:
        """Return the rows of the pairs at these places."""
        return table.take(pairs)

    def read_verdicts(self, chosen: Floats, rejected: Floats) -> Verdicts:
        """Return the verdicts that follow from the rewards of the table's pairs."""
        return Verdicts(compare_scores(chosen, rejected, self.settings.temperature))

    def _encode(self, prompt: str | list[Message], answer: str | list[Message] | None) -> list[int]:
        assert answer is not None
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            is_text = isinstance(prompt, str) and isinstance(answer, str)
            text = f"{prompt}{answer}" if is_text else f"{format_text(prompt)}\n\n{format_text(answer)}"
            return list(tokenizer(text, verbose=False)["input_ids"])
        question = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        reply = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        rendering = Rendering(tokenizer)
        if rendering.writes_date:
            rendering = Rendering(tokenizer, date=JUDGING_DATE)
        try:
            text = rendering.apply_template([*question, *reply], None, add_generation_prompt=False)
        except jinja2.TemplateError as error:
            raise UsageError(
                f"{self.choice.option} {self.choice.model}: its chat template refuses a pair ({error}); "
                "give a reward model that reads such conversations"
            ) from error
        return rendering.encode([text])[0]
