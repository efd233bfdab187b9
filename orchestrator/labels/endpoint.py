"""A judge behind an OpenAI-compatible chat endpoint: one token per question, with log-probs or by votes."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from orchestrator.errors import RunFailed, UsageError
from orchestrator.files import cache_folder
from orchestrator.labels.answers import AnswerFile, digest_question
from orchestrator.labels.questions import render_questions
from orchestrator.labels.settings import EndpointSettings, JudgeChoice, LabelSettings
from orchestrator.labels.verdicts import Probabilities, Verdicts, compare_scores
from orchestrator.redaction import redact
from orchestrator.tracking.progress import ProgressMeter
from orchestrator.tracking.progress_lines import RESPONSES
from preferences.pairs import Pair

if TYPE_CHECKING:
    from openai import OpenAI

KEY_VARIABLE = "OPENAI_API_KEY"
NO_KEY = "none"
"""Sent where KEY_VARIABLE is not set: servers of one's own ask for no key, and the client insists on one."""
TOP_LOGPROBS = 20
"""As many of the likeliest tokens are requested: the most that the interface allows."""


NO_ANSWER = (None, None)
UNANSWERABLE_CODES = ("context_length_exceeded", "content_filter")
"""Codes of refusals that concern one question alone: it has no answer."""


class _Unanswerable(Exception):
    """The endpoint refuses one question, which is too long for it or filtered."""


class RateLimiter:
    """Spaces requests of all threads evenly, at most `per_minute` of them in a minute; None for no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait_for_turn(self, *_: object) -> None:
        """Sleep until the next request may be sent."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._interval
        time.sleep(max(0.0, turn - time.monotonic()))


@dataclass(frozen=True)
class Question:
    """One request: its text, and the digest that its answer is kept under."""

    text: str
    key: str


class EndpointJudge:
    """Asks one model behind an endpoint.

    Args:
        choice: the model.
        settings: the endpoint, the answers and the temperature.

    Raises:
        UsageError: the package `openai` is not installed.
    """

    def __init__(self, choice: JudgeChoice, settings: LabelSettings) -> None:
        assert settings.endpoint is not None
        self.choice, self._settings, self._endpoint = choice, settings, settings.endpoint
        self._client = _build_client(self._endpoint)

    def ask(self, pairs: Sequence[Pair], console: Console) -> Verdicts:
        """Ask all questions whose answers are not in the file, and return the verdicts.

        A verdict is NaN where the judge gave neither of the two answers.

        Raises:
            UsageError: the endpoint cannot be reached, refuses the key or the model, or gives no log-probs.
            RunFailed: it failed again and again; answers so far are kept.
        """
        texts = render_questions(pairs, self._settings)
        questions = [self._make_question(t, vote) for t in texts for vote in range(self._endpoint.votes or 1)]
        with AnswerFile(self._find_answer_file()) as answers:
            missing = {q.key: q for q in questions if q.key not in answers}
            self._ask_missing(list(missing.values()), answers, console)
            known = len({q.key for q in questions}) - len(missing)
            console.print(f"{self.choice.name}: {known:,} answers from the store, {len(missing):,} asked")
            rows = [answers.get_answer(question.key) for question in questions]
        if self._endpoint.votes:
            return Verdicts.from_first_answers(
                count_votes(rows, self._endpoint.votes, self._settings.answers)
            )
        scores = np.array(rows, dtype=np.float64).reshape(-1, 2)
        return Verdicts.from_first_answers(
            compare_scores(scores[:, 0], scores[:, 1], self._settings.temperature)
        )

    def _make_question(self, text: str, vote: int) -> Question:
        mode = "vote" if self._endpoint.votes else "logprobs"
        return Question(text, digest_question(text, self._settings.answers, mode, vote))

    def _find_answer_file(self) -> Path:
        """Return the file of this endpoint's and model's answers."""
        storage, url = self._settings.storage_path, redact(self._endpoint.url).rstrip("/")
        folder = cache_folder("answers") if "://" in storage else Path(storage) / "answers"
        return folder / f"{digest_question(url, self.choice.model)}.jsonl"

    def _ask_missing(self, questions: Sequence[Question], answers: AnswerFile, console: Console) -> None:
        if not questions:
            return
        # The first alone: a wrong address, key or model is reported at once, and is not retried.
        answers.add_answer(questions[0].key, self._ask_first(questions[0]))
        total = len(questions)
        with (
            ThreadPoolExecutor(self._endpoint.concurrency) as threads,
            ProgressMeter(console, RESPONSES, "asking ") as meter,
        ):
            pending: dict[Future[Any], Question] = {}
            waiting = iter(questions[1:])
            done = 1
            try:
                while True:
                    while len(pending) < self._endpoint.concurrency and (q := next(waiting, None)):
                        pending[threads.submit(self._ask_question, self._client, q)] = q
                    if not pending:
                        break
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        answers.add_answer(pending.pop(future).key, future.result())
                        done += 1
                    meter.update(self.choice.name, done, total)
            except BaseException:
                _keep_finished(pending, answers)
                raise

    def _ask_first(self, question: Question) -> Any:
        import openai

        try:
            return self._ask_question(self._client.with_options(max_retries=0), question, first=True)
        except (openai.RateLimitError, openai.InternalServerError, openai.APITimeoutError):
            return self._ask_question(self._client, question)

    def _ask_question(self, client: "OpenAI", question: Question, *, first: bool = False) -> Any:
        """Return the log-probs of both answers (none if neither is among the likeliest), or a vote."""
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if self._endpoint.votes:
            options = {}
        try:
            with self._translate_errors(first=first):
                completion = client.chat.completions.create(
                    model=self.choice.model,
                    messages=[{"role": "user", "content": question.text}],
                    max_tokens=1,
                    temperature=1.0,
                    **options,
                )
        except _Unanswerable:
            return None if self._endpoint.votes else NO_ANSWER
        return self._read_vote(completion) if self._endpoint.votes else self._read_logprobs(completion)

    def _read_vote(self, completion: Any) -> str | None:
        word = (completion.choices[0].message.content or "").strip() if completion.choices else ""
        return word if word in self._settings.answers else None

    def _read_logprobs(self, completion: Any) -> tuple[float, float] | tuple[None, None]:
        logprobs = completion.choices[0].logprobs if completion.choices else None
        if logprobs is not None and logprobs.content == []:  # it answered with no token at all
            return NO_ANSWER
        if logprobs is None or not logprobs.content or not logprobs.content[0].top_logprobs:
            raise UsageError(
                f"--judge-url {redact(self._endpoint.url)}: it returns no log-probs for {self.choice.model}; "
                "give --votes 8 to sample answers and count them"
            )
        likeliest = [(top.token, top.logprob) for top in logprobs.content[0].top_logprobs]
        return read_answer_logprobs(likeliest, self._settings.answers)

    @contextmanager
    def _translate_errors(self, *, first: bool) -> Iterator[None]:
        """Turn the client's errors into ours, whose message has the remedy and never the key.

        Of the first request, errors that may pass are not translated: it is repeated then.
        """
        import openai

        place = f"--judge-url {redact(self._endpoint.url)}"
        try:
            yield
        except openai.AuthenticationError as error:
            raise UsageError(
                f"{place}: the key is refused (401); set {KEY_VARIABLE} to a valid one"
            ) from error
        except openai.PermissionDeniedError as error:
            raise UsageError(
                f"{place}: the key may not use {self.choice.model} (403); give another key or --judge-model"
            ) from error
        except openai.NotFoundError as error:
            raise UsageError(
                f"{place}: there is no chat endpoint or no model {self.choice.model} (404); the address "
                "usually ends with /v1"
            ) from error
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if error.code in UNANSWERABLE_CODES or "context length" in str(error):
                raise _Unanswerable from error
            raise UsageError(
                f"{place}: the request is refused: {_describe(error)}; if log-probs are the reason, give "
                "--votes 8"
            ) from error
        except openai.APIConnectionError as error:
            if first and isinstance(error, openai.APITimeoutError):
                raise
            if first:
                raise UsageError(
                    f"{place}: nothing answers there ({_describe(error.__cause__ or error)}); start the "
                    "server, or correct the address"
                ) from error
            raise RunFailed(
                f"{place}: the connection was lost ({_describe(error)}); the same command resumes from the "
                "answers so far"
            ) from error
        except openai.APIStatusError as error:
            if first and (error.status_code == 429 or error.status_code >= 500):
                raise
            raise RunFailed(
                f"{place}: it fails again and again (status {error.status_code}: {_describe(error)}); the "
                "same command resumes from the answers so far; --rate-limit asks more slowly"
            ) from error


def _build_client(endpoint: EndpointSettings) -> "OpenAI":
    try:
        import openai
    except ImportError as error:
        raise UsageError(
            f"--judge-url needs the package openai ({error}); pip install polyref[endpoints]"
        ) from error
    limiter = RateLimiter(endpoint.rate_limit)
    return openai.OpenAI(
        base_url=endpoint.url,
        api_key=os.environ.get(KEY_VARIABLE) or NO_KEY,
        max_retries=endpoint.retries,
        timeout=endpoint.timeout_s,
        # Called for every request that is sent, repeated ones included.
        http_client=openai.DefaultHttpxClient(event_hooks={"request": [limiter.wait_for_turn]}),
    )


def _describe(error: BaseException) -> str:
    """Return the first line of an error without the key, which some servers repeat in it."""
    text = redact(str(error)).strip() or type(error).__name__
    key = os.environ.get(KEY_VARIABLE)
    return (text.replace(key, "***") if key else text).splitlines()[0][:300]


def _keep_finished(pending: dict[Future[Any], Question], answers: AnswerFile) -> None:
    """Keep the answers that still arrive, of requests that were open when another failed."""
    for future, question in pending.items():
        if not future.cancel() and future.exception() is None:
            answers.add_answer(question.key, future.result())


def read_answer_logprobs(
    tokens: Sequence[tuple[str, float]], answers: tuple[str, str]
) -> tuple[float, float] | tuple[None, None]:
    """Return the log-probs of both answers among the likeliest tokens, blanks around them ignored.

    An answer that is not among them counts as the least likely of them, which is more than it has; without
    either answer there is no verdict.
    """
    found = []
    for answer in answers:
        matching = [logprob for token, logprob in tokens if token.strip() == answer]
        found.append(float(np.logaddexp.reduce(matching)) if matching else None)
    if found[0] is None and found[1] is None:
        return NO_ANSWER
    least = min(logprob for _, logprob in tokens)
    first, second = (least if logprob is None else logprob for logprob in found)
    return first, second


def count_votes(rows: Sequence[str | None], votes: int, answers: tuple[str, str]) -> Probabilities:
    """Return the first answer's share of each question's votes for either: (Q,), NaN without such a vote.

    `rows` are the votes question by question, `votes` of each.
    """
    table = np.array(rows, dtype=object).reshape(-1, votes)
    first, second = ((table == answer).sum(axis=1) for answer in answers)
    with np.errstate(invalid="ignore"):
        return np.asarray(first / (first + second), dtype=np.float64)
