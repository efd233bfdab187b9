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

    def digest_tokens(self) -> dict[str, str]:
        """Return digests of the token ids that the policy and each reference read."""
        digests: dict[int, str] = {}
        tables = {"policy": self.policy} | {f"reference {n}": t for n, t in self.references.items()}
        for table in tables.values():
            if id(table) not in digests:  # models with one tokenizer and template share a table
                digests[id(table)] = table.digest()
        return {name: digests[id(table)] for name, table in tables.items()}

    def __len__(self) -> int:
        return len(self.soft_labels)
