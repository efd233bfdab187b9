"""Questions to a judge: a pair in both orders, as texts and as the tokens that a local judge reads."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import jinja2
import numpy as np
import numpy.typing as npt

from models.load import read_model_limits
from orchestrator.errors import UsageError
from orchestrator.labels.pairs import format_text
from orchestrator.labels.settings import JudgeChoice, LabelSettings
from orchestrator.labels.verdicts import ORDERS, Verdicts, compare_scores
from orchestrator.references.messages import Floats, ScoreKind
from orchestrator.references.replica import Replica
from orchestrator.registry.find import PreparedModel
from preferences.pairs import Pair
from preferences.tokens.rendering import Rendering
from preferences.tokens.tables import RaggedArray, TokenTable
from preferences.tokens.truncation import add_prompt_prefix

JUDGING_DATE = datetime.date(2025, 1, 1)
"""Today's date to a chat template that writes one: the same every day, so that answers are found again."""
TEMPLATE_KWARGS = {"enable_thinking": False}
"""Arguments of a judge's chat template: a judge answers with its first token."""
PLAIN_ENDING = "\n\nAnswer:"
"""What follows the question where a judge has no chat template."""


def render_questions(pairs: Sequence[Pair], settings: LabelSettings) -> list[str]:
    """Return two questions for each pair: `chosen` shown first, then `chosen` shown second."""
    questions = []
    for pair in pairs:
        assert pair.rejected is not None
        prompt, chosen, rejected = (format_text(text) for text in (pair.prompt, pair.chosen, pair.rejected))
        for first, second in ((chosen, rejected), (rejected, chosen)):
            questions.append(settings.template.render(prompt, first, second, settings.answers))
    return questions


@dataclass(frozen=True)
class JudgeReader:
    """How a language model reads questions, and the tokens of its two answers."""

    choice: JudgeChoice
    model: PreparedModel
    settings: LabelSettings

    replica_class = Replica
    score_kind: ClassVar[ScoreKind] = "log-prob"

    @property
    def fingerprint(self) -> str:
        """Identity of its answers."""
        return self.model.fingerprint.digest

    @cached_property
    def rendering(self) -> Rendering:
        """The judge's tokenizer and chat template."""
        rendering = Rendering(self.model.tokenizer, template_kwargs=TEMPLATE_KWARGS)
        return replace(rendering, date=JUDGING_DATE) if rendering.writes_date else rendering

    @property
    def has_template(self) -> bool:
        """Whether the judge is asked in its chat format."""
        return bool(self.model.tokenizer.chat_template)

    @cached_property
    def positions(self) -> int | None:
        """The longest question with its answer, in tokens; None without a limit."""
        return read_model_limits(self.model.located, self.model.config).positions

    def wrap_question(self, question: str) -> str:
        """Return the whole text that the judge reads before its answer.

        Raises:
            UsageError: the chat template refuses a conversation of one question.
        """
        if not self.has_template:
            return question + PLAIN_ENDING
        messages = [{"role": "user", "content": question}]
        try:
            return self.rendering.apply_template(messages, None, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise UsageError(
                f"{self.choice.option} {self.choice.model}: its chat template refuses a question ({error}); "
                "give a judge that answers chat messages"
            ) from error

    @cached_property
    def answer_ids(self) -> tuple[int, int]:
        """The token of each answer, as it follows a question.

        Raises:
            UsageError: the answers are no single, different tokens of the judge's.
        """
        end, answers = self.wrap_question("?"), self.settings.answers
        spaced = tuple(f" {answer}" for answer in answers)
        for candidates in (answers, spaced) if self.has_template else (spaced, answers):
            ids = [self.rendering.encode_response(end, text) for text in candidates]
            single = all(len(one) == 1 and one[0] != self.model.tokenizer.unk_token_id for one in ids)
            if single and ids[0] != ids[1]:
                return ids[0][0], ids[1][0]
        raise UsageError(
            f"{self.choice.option} {self.choice.model}: {answers[0]!r} and {answers[1]!r} are not two "
            "single, different tokens of this judge; name two that are, e.g. --answers 1,2"
        )

    def build_table(self, pairs: Sequence[Pair]) -> TokenTable:
        """Return ORDERS rows per pair, one per question: `chosen` is answer one, `rejected` answer two."""
        texts = [self.wrap_question(question) for question in render_questions(pairs, self.settings)]
        prompts = RaggedArray.from_rows(
            [
                add_prompt_prefix(self.rendering, ids, is_templated=self.has_template)
                for ids in self.rendering.encode(texts)
            ]
        )
        first, second = (RaggedArray.from_rows([[token]] * len(prompts)) for token in self.answer_ids)
        return TokenTable(prompts, first, second)

    def find_fitting_pairs(self, table: TokenTable) -> npt.NDArray[np.bool_]:
        """(N,): whether both questions of each pair, with an answer, are within the judge's positions."""
        return table.sequence_lengths.reshape(-1, ORDERS).max(axis=1) <= (self.positions or np.inf)

    def take_pairs(self, table: TokenTable, pairs: npt.NDArray[np.int64]) -> TokenTable:
        """Return the rows of the pairs at these places."""
        return table.take((pairs[:, None] * ORDERS + np.arange(ORDERS)).reshape(-1))

    def read_verdicts(self, first: Floats, second: Floats) -> Verdicts:
        """Return the verdicts that follow from the log-probs of both answers to the table's questions."""
        first = compare_scores(first, second, self.settings.temperature)
        return Verdicts.from_first_answers(first)
