"""The tokenised rows of one split."""

from dataclasses import dataclass

import numpy as np

from preferences.tokenize import TokenTable


@dataclass(frozen=True)
class TokenizedSplit:
    """The rows of one split, as every worker holds them.

    Attributes:
        policy: token ids under the policy's tokenizer and template, N rows.
        references: the same rows under each served reference's own.
        soft_labels: (N,) probability that chosen beats rejected.
        sources: (N,) file and line of each row, to name it in a message.
        paired: whether rows have a rejected response.
        soft: whether the data has labels other than 1.
    """

    policy: TokenTable
    references: dict[str, TokenTable]
    soft_labels: np.ndarray
    sources: tuple[str, ...]
    has_pairs: bool
    has_soft_labels: bool

    def __len__(self) -> int:
        return len(self.soft_labels)
