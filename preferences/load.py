"""Load the pairs that settings name: as texts, or tokenised, mixed, and split into train and eval."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from preferences.config import SourceConfig
from preferences.mixture import Digests, draw_mixture, hold_out_prompts
from preferences.pairs import BadRow, DataError, Pair
from preferences.reading.recognition import understand_source
from preferences.reading.rows import build_pairs
from preferences.reading.sources import read_rows
from preferences.split import SplitFiles, TokenizedSplit, digest_rows
from preferences.tokens.fitting import POLICY_NAME, Readers
from preferences.tokens.pair_files import BuiltFile, FileSettings, describe_skipped, open_pair_file
from preferences.tokens.tables import Rows


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """The texts of a source's pairs in its order, and the rows left out, counted by reason."""

    pairs: Sequence[Pair]
    skipped: Counter[str]

    @property
    def swapped(self) -> int:
        """Number of pairs whose responses were swapped: most people preferred the source's `rejected`."""
        return sum(pair.swapped for pair in self.pairs)

    @property
    def has_soft_labels(self) -> bool:
        """Whether people disagreed about any pair."""
        return any(pair.soft_label < 1.0 for pair in self.pairs)


def load_pairs(
    source: SourceConfig, *, completions_only: bool = False, on_bad_row: Literal["stop", "skip"] = "stop"
) -> LoadedPairs:
    """Read and check the texts of every row of a source.

    `completions_only` reads prompts with one good response each, for `sft`: the `chosen` one of a pair.
    Raises `DataError` for a source that cannot be used, and for the first bad row unless `on_bad_row` is
    `skip`.
    """
    source = understand_source(source).source
    pairs: list[Pair] = []
    skipped: Counter[str] = Counter()
    for place, row in read_rows(source):
        try:
            if isinstance(row, BadRow):
                raise row
            pairs += build_pairs(row, place, source, completions_only=completions_only)
        except BadRow as bad:
            if on_bad_row == "stop":
                raise
            skipped[bad.reason] += 1
    if not pairs:
        reason = describe_skipped(skipped) or "holds no rows; check data.train and data.eval"
        raise DataError(f"{source.source}: {reason}")
    return LoadedPairs(pairs, skipped)


@dataclass(frozen=True)
class LoadedSource:
    """What was read of one source of a split.

    Attributes:
        source: the source and how its rows were read.
        rows: rows read.
        pairs: those that all models can read.
        skipped: pairs and rows left out, by reason.
        first_skipped: the first of them, by reason: its place, and what is wrong where that is known.
        understood: the `data:` section that says what was understood of the columns; empty for field names.
    """

    source: SourceConfig
    rows: int
    pairs: int
    skipped: Mapping[str, int]
    first_skipped: Mapping[str, str]
    understood: str


@dataclass(frozen=True)
class LoadedSplit:
    """A split with what is recorded of it.

    Attributes:
        split: the tokenised rows.
        digest: of what the pairs say, in order.
        token_digests: of the token ids that each model reads, by its name.
        counts: rows kept, swapped, truncated, skipped by reason, per source if there are several, and those
            examined for a token that would reach from prompt to response, and found to have one.
        notices: lines about the data that someone should read before training.
        sources: what was read of each source.
    """

    split: TokenizedSplit
    digest: str
    token_digests: Mapping[str, str]
    counts: Mapping[str, Any]
    notices: Sequence[str]
    sources: Sequence[LoadedSource]


def load_splits(
    readers: Readers,
    *,
    completions_only: bool,
    seed: int,
    folder: Path,
    progress: Callable[[str, int], None] | None = None,
) -> tuple[LoadedSplit, LoadedSplit | None]:
    """Load the training pairs, and the held-out pairs if the settings name any, as every model reads them.

    A pair is left out for all models when it cannot be tokenised for one (`on_bad_row`), or is too long for
    one (`on_long_row`): longer than `max_prompt_length` or `max_length` in the policy's tokens, or than a
    model's positions. With `eval_fraction`, whole prompts are held out: no prompt is in both splits.

    Args:
        readers: the models, and the settings that name the sources.
        completions_only: whether rejected responses are left out.
        seed: of the choice of held-out prompts, and of pairs where not all of a source's are taken.
        folder: where files of tokenised pairs are kept.
        progress: called with a source's name and the rows read of it.

    Raises:
        DataError: a source or a pair cannot be used, or none is left.
    """
    loader = _SplitLoader(readers, completions_only, folder, progress)
    parts = loader.open_parts(readers.config.train_sources, seed=seed)
    fraction = readers.config.eval_fraction
    if fraction is not None:
        prompts = np.concatenate([part.read_digests("prompt") for part in parts])
        held_out = hold_out_prompts(prompts, fraction, seed=seed)
        bounds = np.cumsum([len(part.rows) for part in parts])[:-1]
        masks = list(zip(parts, np.split(held_out, bounds), strict=True))
        train = [part.take(np.flatnonzero(~mask)) for part, mask in masks]
        evaluation = [part.take(np.flatnonzero(mask)) for part, mask in masks]
        return loader.join_parts(train, counted=parts), loader.join_parts(evaluation, counted=())
    sources = readers.config.eval_sources
    evaluation = loader.open_parts(sources, seed=seed) if sources else []
    return (
        loader.join_parts(parts, counted=parts),
        loader.join_parts(evaluation, counted=evaluation) if evaluation else None,
    )


@dataclass(frozen=True)
class _Part:
    """The pairs taken of one source: `rows` of its file; `skipped` counts those left out by reason."""

    source: SourceConfig
    file: BuiltFile
    rows: Rows
    skipped: Counter[str]
    understood: str

    def describe(self) -> LoadedSource:
        report, pairs = self.file.report, self.file.pairs
        first = pairs.find_first_problems() | report.first_skipped
        return LoadedSource(self.source, report.rows, len(self.rows), self.skipped, first, self.understood)

    def take(self, indices: Rows) -> "_Part":
        return replace(self, rows=self.rows[indices])

    def read(self, column: str) -> npt.NDArray[Any]:
        return self.file.pairs.read_column(column)[self.rows]

    def read_digests(self, what: str | int) -> Digests:
        """Return the digests of the pairs, their prompts, or their tokens in a rendering."""
        name = f"digest_{what}" if isinstance(what, int) else f"{what}_digest"
        return self.file.pairs.read_digests(name)[self.rows]


@dataclass(frozen=True)
class _SplitLoader:
    """What `load_splits` needs for every source."""

    readers: Readers
    completions_only: bool
    folder: Path
    progress: Callable[[str, int], None] | None

    def open_parts(self, sources: Sequence[SourceConfig], *, seed: int) -> list[_Part]:
        """Read sources, and take of each the pairs that the mixture draws from those that all models read."""
        parts = [self._open_part(source) for source in sources]
        drawn = draw_mixture(sources, [part.read_digests("pair") for part in parts], seed=seed)
        return [part.take(rows) for part, rows in zip(parts, drawn, strict=True)]

    def _open_part(self, source: SourceConfig) -> _Part:
        understanding = understand_source(source)
        source = understanding.source
        settings = FileSettings(source, self.readers.tokenization, self.completions_only)
        progress = self.progress and partial(self.progress, source.name or source.source)
        built = open_pair_file(settings, self.folder, progress=progress)
        rows, skipped = self.readers.find_fitting_pairs(built.pairs, source.source)
        return _Part(source, built, rows, built.report.skipped + skipped, understanding.text)

    def join_parts(self, parts: Sequence[_Part], *, counted: Sequence[_Part]) -> LoadedSplit:
        """Join the pairs of sources to a split; `counted` are those whose skipped rows it counts."""
        firsts = np.cumsum([0, *(len(part.file.pairs) for part in parts)])
        for part in parts:
            if len(part.rows) and not part.read("weight").any():
                raise DataError(
                    f"{part.source.source}: all weights ({part.source.weight}, data.weight) are 0, so there "
                    "is nothing to train on or to judge by"
                )
        soft_labels, weights = (
            np.concatenate([part.read(column) for part in parts]) for column in ("soft_label", "weight")
        )
        files = SplitFiles(
            paths=tuple(part.file.path for part in parts),
            checksums=tuple(part.file.checksum for part in parts),
            rows=np.concatenate([part.rows + first for part, first in zip(parts, firsts, strict=False)]),
            policy=self.readers.numbers[POLICY_NAME],
            references=self.readers.reference_numbers,
            soft_labels=soft_labels,
            source_names=tuple(part.source.name or "" for part in parts),
            source_index=np.repeat(np.arange(len(parts), dtype=np.int16), [len(part.rows) for part in parts]),
            weights=None if (weights == 1).all() else weights,
        )
        digests = {
            number: digest_rows(np.concatenate([part.read_digests(number) for part in parts]))
            for number in set(self.readers.numbers.values())
        }
        return LoadedSplit(
            split=files.open(),
            digest=digest_rows(np.concatenate([part.read_digests("pair") for part in parts])),
            token_digests={name.removeprefix("the "): digests[k] for name, k in self.readers.numbers.items()},
            counts=self._count(parts, counted),
            notices=[line for part in counted for line in self._describe_boundaries(part)],
            sources=[part.describe() for part in counted],
        )

    def _count(self, parts: Sequence[_Part], counted: Sequence[_Part]) -> dict[str, Any]:
        reports = [part.file.report for part in counted]
        counts: dict[str, Any] = {
            "pairs": sum(len(part.rows) for part in parts),
            "swapped": sum(int(part.read("swapped").sum()) for part in parts),
            "truncated": sum(int(part.read("truncated").sum()) for part in parts),
            "boundary_examined": sum(report.examined for report in reports),
            "boundary_merged": sum(
                len({place for places in report.boundary_merges.values() for place in places})
                for report in reports
            ),
            "skipped": dict(sum((part.skipped for part in counted), Counter())),
        }
        if len(parts) > 1:
            counts["sources"] = {part.source.name: len(part.rows) for part in parts}
        return counts

    def _describe_boundaries(self, part: _Part) -> Iterator[str]:
        """Describe the examined pairs of which a token would reach from the prompt into the response."""
        report = part.file.report
        for number, name in enumerate(self.readers.tokenization.renderings):
            places = report.boundary_merges.get(str(number))
            if places:
                yield (
                    f"{len(places)} of {report.examined} examined pairs, such as {places[0]}, have a token "
                    f"of {name} that reaches from the prompt into the response when both are one text; they "
                    "are tokenised apart: end prompts without a blank, and begin responses with it"
                )
