"""The command `data show`: what polyref reads of a run's data or of a source, and what it leaves out."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config.run import RunConfig
from orchestrator.driver.prepare import PreparedRun, prepare_run
from orchestrator.errors import UsageError
from orchestrator.tracking.progress import RowCounter
from preferences.config import SourceConfig
from preferences.pairs import BadRow, Message, Pair
from preferences.reading.recognition import understand_source
from preferences.reading.rows import build_pairs
from preferences.reading.sources import read_chunks
from preferences.split import TokenizedSplit

LOSS_MARKS = ("«", "»")
"""Around the text of the tokens that the loss is on."""
LABEL_BINS = np.linspace(0.5, 1, 6)
LONGEST_TEXT = 2_000
_BAR_WIDTH = 30


def show_run_data(config: RunConfig, *, pairs: int, console: Console) -> None:
    """Print what a run reads of its data: counts, labels, lengths, and the first pairs as its policy does.

    Rows that would stop the run are counted, as those are that it would leave out.

    Raises:
        UsageError, ModelError, DataError: the models or the data cannot be read at all.
    """
    data, stops = config.data, []
    if data.on_bad_row == "stop":
        stops.append("a row that cannot be used")
    if data.on_long_row == "stop":
        stops.append("a row that is too long")
    lenient = {"on_bad_row": "skip"} | ({"on_long_row": "skip"} if data.on_long_row == "stop" else {})
    lenient_config = config.model_copy(update={"data": data.model_copy(update=lenient)})
    with RowCounter(console, "tokenising") as counter:
        prepared = prepare_run(lenient_config, progress=counter.update)
    for name, split in (("train", prepared.train), ("eval", prepared.eval)):
        if split is not None:
            _show_split(name, split, prepared, pairs, console)
    for line in prepared.notices:
        console.print(line)
    left_out = sum(sum(s.skipped.values()) for sources in prepared.sources.values() for s in sources)
    if stops and left_out:
        console.print(f"the run stops at {' and at '.join(stops)}: see data.on_bad_row and data.on_long_row")


def _show_split(
    name: str, split: TokenizedSplit, prepared: PreparedRun, pairs: int, console: Console
) -> None:
    counts, sources = prepared.counts[name], prepared.sources.get(name, ())
    console.print(f"{name}: {counts['pairs']:,} pairs, {counts['swapped']:,} swapped", style="bold")
    for source in sources:
        console.print(f"  {source.source.name}: {source.pairs:,} pairs of {source.rows:,} rows")
        if source.understood:
            console.print(f"  {source.source.name} is read as\n{source.understood}")
        _print_skipped(source.skipped, source.first_skipped, console)
    if split.has_pairs:
        _print_labels(split.soft_labels, console)
    columns = {"prompt": split.policy.prompt_lengths, "chosen": split.policy.chosen_lengths}
    if split.has_pairs:
        columns["rejected"] = split.policy.rejected_lengths
    _print_lengths("tokens of the policy", columns, console)
    tokenizer = prepared.policy.tokenizer
    for row in range(min(pairs, len(split))):
        pair = split.policy[row]
        console.print(f"{split.places[row]}, label {split.soft_labels[row]:.3g}", style="bold")
        _print_text("prompt", tokenizer.decode(pair.prompt), console)
        for side, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if ids is not None:
                _print_text(side, mark_scored_tokens(ids, tokenizer), console)
    console.print()


def mark_scored_tokens(ids: npt.NDArray[np.int32], tokenizer: Any) -> str:
    """Return the text of a response, with `LOSS_MARKS` around what the loss is on."""
    borders = np.flatnonzero(np.diff(ids < 0)) + 1
    parts = []
    for part in np.split(ids, borders):
        text = str(tokenizer.decode(np.where(part < 0, ~part, part)))
        parts.append(text if part[0] < 0 else f"{LOSS_MARKS[0]}{text}{LOSS_MARKS[1]}")
    return "".join(parts)


@dataclass
class _SourceSummary:
    """What is counted while the rows of a source are read as texts."""

    rows: int = 0
    swapped: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)
    labels: list[float] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    first_pairs: list[Pair] = field(default_factory=list)

    def add_pair(self, pair: Pair, shown: int) -> None:
        self.swapped += pair.swapped
        self.labels.append(pair.soft_label)
        texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for name, text in texts.items():
            if text is not None:
                self.lengths.setdefault(name, []).append(len(_format_text(text)))
        if len(self.first_pairs) < shown:
            self.first_pairs.append(pair)


def show_source(source: SourceConfig, *, pairs: int, console: Console) -> None:
    """Print what polyref reads of a source without a model: counts, labels, lengths and the first pairs.

    Raises:
        DataError: the source cannot be read, or its columns are not understood.
        UsageError: no row can be used.
    """
    understanding = understand_source(source)
    if understanding.text:
        console.print(f"{source.source}: read as\n{understanding.text}")
    source = understanding.source
    with RowCounter(console, "reading") as counter:
        summary = _summarize_source(source, pairs, counter)
    console.print(
        f"{source.source}: {len(summary.labels):,} pairs of {summary.rows:,} rows, "
        f"{summary.swapped:,} swapped",
        style="bold",
    )
    _print_skipped(summary.skipped, summary.first_skipped, console)
    if not summary.labels:
        first = "".join(f"; {problem}" for problem in list(summary.first_skipped.values())[:1])
        raise UsageError(f"{source.source}: no row can be used{first}")
    if "rejected" in summary.lengths:
        _print_labels(np.array(summary.labels), console)
    columns = {name: np.array(lengths) for name, lengths in summary.lengths.items()}
    _print_lengths("characters", columns, console)
    for pair in summary.first_pairs:
        console.print(f"{pair.source}, label {pair.soft_label:.3g}", style="bold")
        texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for name, text in texts.items():
            if text is not None:
                _print_text(name, _format_text(text), console)


def _summarize_source(source: SourceConfig, shown: int, progress: RowCounter) -> _SourceSummary:
    summary = _SourceSummary()
    for chunk in read_chunks(source):
        for place, row in chunk.parse_checked_rows(source):
            try:
                if isinstance(row, BadRow):
                    raise row
                # A row without a rival is a supervised one.
                only = "completion" in row and "chosen" not in row
                for pair in build_pairs(row, place, source, completions_only=only):
                    summary.add_pair(pair, shown)
            except BadRow as bad:
                summary.skipped[bad.reason] += 1
                summary.first_skipped.setdefault(bad.reason, f"{bad.place}: {bad.detail}")
        summary.rows += len(chunk)
        progress.update(source.source, summary.rows)
    return summary


def _print_skipped(skipped: Mapping[str, int], first: Mapping[str, str], console: Console) -> None:
    for reason, count in sorted(skipped.items(), key=lambda item: -item[1]):
        place = f" (first: {first[reason]})" if reason in first else ""
        console.print(f"  {count:,} left out: {reason}{place}")


def _print_labels(labels: npt.NDArray[np.float64], console: Console) -> None:
    """Print how many labels are in each of five bins, ties and certain ones apart."""
    inside = labels[(labels > 0.5) & (labels < 1)]
    bins = np.histogram(inside, LABEL_BINS)[0]
    names = [f"{low:.1f} to {high:.1f}" for low, high in pairwise(LABEL_BINS)]
    rows = [("0.5, a tie", int((labels == 0.5).sum())), *zip(names, bins.tolist(), strict=True)]
    rows.append(("1, certain", int((labels == 1).sum())))
    table = Table("label", "pairs", "", box=None, padding=(0, 2, 0, 2))
    for name, count in rows:
        table.add_row(name, f"{count:,}", "█" * round(_BAR_WIDTH * count / len(labels)))
    console.print(table)


def _print_lengths(unit: str, columns: Mapping[str, npt.NDArray[Any]], console: Console) -> None:
    table = Table(unit, "least", "median", "95 %", "most", box=None, padding=(0, 2, 0, 2))
    for name, lengths in columns.items():
        quantiles = np.quantile(lengths, (0, 0.5, 0.95, 1))
        table.add_row(name, *(f"{round(value):,}" for value in quantiles))
    console.print(table)


def _print_text(name: str, text: str, console: Console) -> None:
    """Print a text behind its name, every line of it indented."""
    shown = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ... ({len(text):,} characters)"
    for line_name, line in zip(_name_first_line(name), shown.splitlines() or [""], strict=False):
        console.print(Text(f"{line_name:>10} | {line}"))


def _name_first_line(name: str) -> Iterator[str]:
    yield name
    while True:
        yield ""


def _format_text(text: str | Sequence[Message]) -> str:
    """Return a text, or a conversation with a line before each turn that names its role."""
    if isinstance(text, str):
        return text
    return "\n".join(f"[{message['role']}]\n{message['content']}" for message in text)
