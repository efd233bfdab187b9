"""The models that read a run's pairs: renderings that they share, and pairs that fit all of them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from preferences.config import DataConfig
from preferences.pairs import DataError
from preferences.tokens.rendering import Rendering
from preferences.tokens.tables import PairFile
from preferences.tokens.tokenize import TokenizationSettings

POLICY_NAME = "the policy"
"""What messages call the policy; a reference is called `reference <name>`."""


@dataclass(frozen=True)
class Readers:
    """The models that read a run's pairs, and the settings that bound what they read.

    Attributes:
        config: the data settings.
        policy: what the policy reads.
        references: what each reference reads, by name.
    """

    config: DataConfig
    policy: Rendering
    references: Mapping[str, Rendering]

    @cached_property
    def models(self) -> dict[str, Rendering]:
        """What each model reads, by its name in messages, the policy first."""
        return {POLICY_NAME: self.policy} | {
            f"reference {name}": rendering for name, rendering in self.references.items()
        }

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each model's rendering, by its name in messages; equal renderings share one."""
        identities = list(dict.fromkeys(rendering.identity for rendering in self.models.values()))
        return {name: identities.index(rendering.identity) for name, rendering in self.models.items()}

    @property
    def reference_numbers(self) -> dict[str, int]:
        """The number of each reference's rendering, by the reference's name."""
        return {name: self.numbers[f"reference {name}"] for name in self.references}

    @cached_property
    def tokenization(self) -> TokenizationSettings:
        """How pairs are tokenised for all of the models."""
        renderings: dict[str, Rendering] = {}
        vocabularies: dict[int, tuple[str, int]] = {}
        for name, rendering in self.models.items():
            number, size = self.numbers[name], rendering.vocabulary
            if number == len(renderings):
                renderings[name] = rendering
            if size is not None and (number not in vocabularies or size < vocabularies[number][1]):
                vocabularies[number] = (name, size)
        return TokenizationSettings(
            renderings=renderings,
            template_kwargs=self.config.chat_template_kwargs,
            truncate_to=self._find_limits(POLICY_NAME) if self.config.on_long_row == "truncate" else None,
            on_bad_row=self.config.on_bad_row,
            vocabularies=vocabularies,
        )

    def find_fitting_pairs(self, pairs: PairFile, source: str) -> tuple[npt.NDArray[np.int64], Counter[str]]:
        """Find the pairs that all models can read; `source` is what messages call the file.

        Returns:
            Their places, and how many others there are, by reason.

        Raises:
            DataError: none is left, or a pair is too long for a model and `on_long_row` is `stop`.
        """
        skipped = pairs.count_problems()
        fits = ~pairs.has_problem
        for name, number in self.numbers.items():
            limits = self._find_limits(name)
            if limits is None:
                continue
            table = pairs.read_tokens(number)
            lengths, prompt_lengths = table.sequence_lengths, table.prompt_lengths
            long = np.flatnonzero(fits & ((lengths > limits[0]) | (prompt_lengths > limits[1])))
            if len(long) and self.config.on_long_row == "stop":
                first = int(long[0])
                raise DataError(
                    f"{pairs.places[first]}: too long for {name}: {lengths[first]} tokens, "
                    f"{prompt_lengths[first]} of them the prompt, and {limits[0]} fit, {limits[1]} of them "
                    "the prompt; raise data.max_length and data.max_prompt_length as far as the model has "
                    "positions, or set data.on_long_row to skip or truncate"
                )
            fits[long] = False
            skipped += Counter({f"too long for {name}": len(long)})
        if not fits.any():
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
            raise DataError(
                f"{source}: no pair is left of {len(pairs)} ({reasons}); raise data.max_length, or see the "
                "first one in full with data.on_long_row: stop and data.on_bad_row: stop"
            )
        return np.flatnonzero(fits), skipped

    def _find_limits(self, name: str) -> tuple[int, int] | None:
        """Return the most tokens of a prompt with response, and of a prompt; None if a model has no limit."""
        positions = self.models[name].max_positions
        if name == POLICY_NAME:
            max_length = min(self.config.max_length, positions or self.config.max_length)
            return max_length, min(self.config.max_prompt_length, max_length - 1)
        return None if positions is None else (positions, positions)
