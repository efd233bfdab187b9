"""The file of labelled pairs, with its lineage inside and beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import UsageError
from orchestrator.files import replace_file
from orchestrator.labels.verdicts import Probabilities, Verdicts
from preferences.pairs import Pair

LINEAGE_KEY = b"polyref.labels"
LINEAGE_VERSION = 1
REQUEST = "request"
"""The part of the lineage that decides the labels; the rest describes them."""


def read_lineage(output: Path) -> dict[str, Any] | None:
    """Return the lineage of a file of labels; None if there is no file.

    Raises:
        UsageError: the file is not one that `polyref label` wrote, or a newer polyref did.
    """
    if not output.exists():
        return None
    if not output.is_file():
        raise UsageError(f"--to {output}: is no file, so it is not replaced; name another file")
    try:
        metadata = pq.read_schema(output).metadata or {}
        lineage: dict[str, Any] = json.loads(metadata[LINEAGE_KEY])
        version = int(lineage["version"])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise UsageError(
            f"--to {output}: there is a file already, and polyref label did not write it; name another file"
        ) from error
    if version > LINEAGE_VERSION:
        raise UsageError(f"--to {output}: a newer polyref wrote it; name another file")
    return lineage


def refuse_other_lineage(output: Path, lineage: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Refuse to replace labels that were made differently.

    Raises:
        UsageError: the message names what differs.
    """
    written = lineage.get(REQUEST, {})
    changed = [name for name in {**request, **written} if written.get(name) != request.get(name)]
    if changed:
        raise UsageError(
            f"--to {output}: there are labels already, made with different {', '.join(changed)}; name "
            "another file, or delete this one"
        )


def build_text_table(pairs: Sequence[Pair]) -> pa.Table:
    """Return the columns prompt, chosen, rejected and, if any pair has tools, tools (JSON).

    Raises:
        UsageError: messages cannot be written as Parquet.
    """
    columns: dict[str, Any] = {
        "prompt": [pair.prompt for pair in pairs],
        "chosen": [pair.chosen for pair in pairs],
        "rejected": [pair.rejected for pair in pairs],
    }
    if any(pair.tools for pair in pairs):
        columns["tools"] = [pair.tools and json.dumps(pair.tools) for pair in pairs]
    try:
        table = pa.table(columns)
        pq.ParquetWriter(pa.BufferOutputStream(), table.schema).close()
    except pa.ArrowException as error:
        raise UsageError(
            f"the messages of these pairs cannot be written as Parquet ({error}); keys of messages need the "
            "same kind of value in every row: give arguments of tool calls as JSON text"
        ) from error
    return table


def write_labels(
    output: Path,
    pairs: Sequence[Pair],
    labels: Probabilities,
    verdicts: Mapping[str, Verdicts],
    lineage: Mapping[str, Any],
    *,
    with_human_labels: bool,
) -> None:
    """Write one row per pair, with `chosen` and `rejected` as the source has them.

    Columns: those of `build_text_table`, soft_label = P(chosen is better), human_label if there are any, and
    for each judge `judge_<name>`, `judge_<name>_first` and `judge_<name>_second` (with `chosen` shown first
    and second).
    """
    columns: dict[str, Any] = {"soft_label": labels}
    if with_human_labels:
        columns["human_label"] = [pair.soft_label for pair in pairs]
    for name, verdict in verdicts.items():
        columns[f"judge_{name}"] = verdict.mean
        if verdict.chosen_first is not None:
            columns[f"judge_{name}_first"] = verdict.chosen_first
            columns[f"judge_{name}_second"] = verdict.chosen_second
    table = build_text_table(pairs)
    for name, column in columns.items():
        table = table.append_column(name, pa.array(column))
    metadata = {LINEAGE_KEY: json.dumps(dict(lineage), allow_nan=False)}
    with replace_file(output) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")
