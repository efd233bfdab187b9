"""A pair as the texts that one model reads: its chat template, its beginning and end of a turn."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from preferences.pairs import BadRow, DataError, Message, Pair, shared_length


@dataclass(frozen=True, eq=False)
class Rendering:
    """How one model reads a pair.

    `chat_template` overrides the tokenizer's own; `template_kwargs` go to it. `max_positions` is the longest
    prompt with response, in tokens, that the model can take; None when it has no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_positions: int | None = None

    @cached_property
    def beginning(self) -> list[int]:
        """What the tokenizer's own rule puts before a text (BOS, or nothing)."""
        bare = self.encode(["a"])[0]
        ruled: list[int] = self.tokenizer("a", verbose=False)["input_ids"]
        if not bare:
            return ruled[:1] if ruled[:1] == [self.tokenizer.bos_token_id] else []
        return next(ruled[:i] for i in range(len(ruled)) if ruled[i : i + len(bare)] == bare)

    @cached_property
    def end(self) -> int:
        """The token that ends a response which does not end itself."""
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token to end a response with; set its eos_token")
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def ends(self) -> dict[int, str]:
        """Tokens that end a turn when they stand last: EOS, and special tokens such as `<|eot_id|>`."""
        never = {self.tokenizer.unk_token_id, self.tokenizer.bos_token_id} - {self.end}
        special = {
            number: token.content
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special and number not in never
        }
        return {**special, self.end: str(self.tokenizer.eos_token)}

    @cached_property
    def identity(self) -> str:
        """Equal for two renderings that turn every pair into the same tokens."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        parts = [
            fast.to_str() if fast is not None else str(id(self.tokenizer)),
            self.tokenizer.eos_token_id,
            self.beginning,
            self.chat_template or self.tokenizer.chat_template,
            dict(self.template_kwargs),
            self.tokenizer.special_tokens_map,  # templates read bos_token and the like
        ]
        return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it stands: nothing put before or after it."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return list(encoded["input_ids"])

    def apply_template(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        *,
        to_be_answered: bool,
        **kwargs: Any,
    ) -> str:
        """The conversation in the model's markup."""
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.chat_template,
                add_generation_prompt=to_be_answered,
                tokenize=False,
                **{**kwargs, **self.template_kwargs},
            )
        )


@dataclass(frozen=True, slots=True)
class Texts:
    """What is tokenised, the prompt apart from the responses.

    `marked_up`: the chat template has put what belongs before the prompt, so BOS is not added.
    `ended`: for each response, whether it ends with an end-of-turn token (not when it was cut).
    """

    prompt: str
    marked_up: bool
    responses: tuple[str, ...]
    ended: tuple[bool, ...]


def responses_of(pair: Pair) -> list[str | list[Message]]:
    """The one or two responses of a pair."""
    return [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]


def render(pair: Pair, rendering: Rendering, name: str, kwargs: Mapping[str, Any]) -> Texts:
    """The texts of a pair for the model `name`.

    Plain text is left as it is. For messages the prompt is the template's rendering up to where the answer
    begins, and a response is what the template adds to it for the final assistant turn, without the blanks
    behind the end-of-turn token and with one such token only.

    Some templates open the answer otherwise when they ask for one than when they record one (`<think>`):
    as in TRL, the prompt then ends where the two part. If they part before the answer's opening, the template
    rewrites earlier turns and no prompt can be told from a response: `BadRow`.
    """
    responses = responses_of(pair)
    if isinstance(pair.prompt, str):
        return Texts(pair.prompt, False, tuple(str(text) for text in responses), (True,) * len(responses))
    if not (rendering.chat_template or rendering.tokenizer.chat_template):
        raise DataError(
            f"{pair.source}: the pair is a conversation, and the tokenizer of {name} has no chat template; "
            f"set chat_template for {name}, or give prompt and responses as plain text"
        )
    try:
        prompt = rendering.apply_template(pair.prompt, pair.tools, to_be_answered=True, **kwargs)
        wholes = [
            rendering.apply_template([*pair.prompt, *answer], pair.tools, to_be_answered=False, **kwargs)
            for answer in responses
            if not isinstance(answer, str)
        ]
        if not all(whole.startswith(prompt) for whole in wholes):
            bare = rendering.apply_template(pair.prompt, pair.tools, to_be_answered=False, **kwargs)
            for whole in wholes:
                prompt = prompt[: shared_length(prompt, whole)]
            if not prompt.startswith(bare):
                raise BadRow(
                    pair.source,
                    "unsuited to the chat template",
                    f"the chat template of {name} changes the prompt's turns once they are answered, so the "
                    f"response cannot be told apart; set another chat_template for {name}",
                )
    except (jinja2.TemplateError, TypeError) as error:
        raise BadRow(
            pair.source,
            "unsuited to the chat template",
            f"the chat template of {name} refuses the messages ({error})",
        ) from error
    answers = tuple(_one_end(whole[len(prompt) :], rendering) for whole in wholes)
    return Texts(prompt, True, answers, (True,) * len(answers))


def _one_end(answer: str, rendering: Rendering) -> str:
    """Without blanks behind the end of the turn, and without an EOS behind another end of the turn."""
    answer = answer.rstrip()
    ends = tuple(rendering.ends.values())
    eos = rendering.ends[rendering.end]
    while answer.endswith(eos) and (shorter := answer.removesuffix(eos).rstrip()).endswith(ends):
        answer = shorter
    return answer
