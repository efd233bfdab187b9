"""The command `init`: a run file for somebody's data, with a comment on each choice."""

import os
import re
from pathlib import Path

import yaml

from losses.config import LossConfig
from losses.presets import preset as find_preset
from orchestrator.config.run import load_run
from orchestrator.errors import UsageError
from orchestrator.files import replace_text
from orchestrator.storage.probe import refuse_unwritable_file
from preferences.config import SourceConfig
from preferences.pairs import BadRow
from preferences.reading.recognition import Understanding, understand_source
from preferences.reading.rows import build_pairs
from preferences.reading.sources import read_chunks

LOOKED_AT = 1000
"""Rows whose labels decide the loss, if none is named."""


def write_run_file(source: SourceConfig, path: Path, *, model: str, preset: str | None) -> list[str]:
    """Write a run file for a source; return lines that say what was found and what to do next.

    Raises:
        UsageError: the file exists, or no row can be used.
        DataError: the source cannot be read, or its columns leave a question open.
        LossError: there is no such preset.
    """
    if os.path.lexists(path):
        raise UsageError(f"{path} exists, and is not replaced; name another file with --to")
    refuse_unwritable_file(path, "--to")
    if preset is not None:
        find_preset(preset)
    understanding = understand_source(source)
    soft, rows = _count_soft_labels(understanding.source, completions_only=preset == "sft")
    chosen = preset or ("gdpo" if soft else "dpo")
    text = _format_run_file(source, understanding, model, chosen, soft=soft, rows=rows)
    replace_text(path, text)
    try:
        load_run(str(path))
    except UsageError:
        path.unlink()
        raise
    return [
        f"{path}: preset {chosen}, for {soft} of the first {rows} pairs people disagreed"
        if soft
        else f"{path}: preset {chosen}; no label below 1 among the first {rows} pairs",
        f"next: polyref data show {path}; polyref check {path}; polyref train {path}",
    ]


def _count_soft_labels(source: SourceConfig, *, completions_only: bool) -> tuple[int, int]:
    """Count the pairs people disagreed about among the first rows that can be used, and those pairs.

    Raises:
        UsageError: none can be used.
    """
    soft = pairs = 0
    first_problem = ""
    for chunk in read_chunks(source):
        for place, row in chunk.parse_checked_rows(source):
            try:
                if isinstance(row, BadRow):
                    raise row
                made = build_pairs(row, place, source, completions_only=completions_only)
            except BadRow as bad:
                first_problem = first_problem or f"; {bad.place}: {bad.detail}"
                continue
            pairs += len(made)
            soft += sum(pair.soft_label < 1 for pair in made)
        if pairs >= LOOKED_AT:
            break
    if not pairs:
        raise UsageError(f"{source.source}: no row can be used{first_problem}")
    return soft, pairs


def _format_run_file(
    source: SourceConfig, understanding: Understanding, model: str, preset: str, *, soft: int, rows: int
) -> str:
    name = re.sub(r"[^A-Za-z0-9-]+", "-", Path(source.source.partition(".")[0]).name).strip("-") or "run"
    loss = find_preset(preset)
    lines = [
        f"# Written for {source.source}. Every field: polyref explain, or docs/run-file.md.",
        f"name: {name}-{preset.replace('_', '-')}",
        "",
        "# The model to train. Without `adapter` all of its weights are trained.",
        "policy:",
        f"  model: {_quote(model)}",
        "  adapter: {r: 16, alpha: 32}",
        "",
        *_format_references(model, loss),
        "data:",
        f"  train: {_quote(source.source)}",
    ]
    lines += [f"  split: {_quote(source.split)}"] if source.split != "train" else []
    lines += [f"  subset: {_quote(source.subset)}"] if source.subset is not None else []
    if understanding.text:
        lines += ["  # what the columns mean:", *understanding.text.splitlines()[1:]]
    lines += [
        "  eval_fraction: 0.05         # held out by prompt; or eval: another source",
        "  max_length: 1024            # tokens of a prompt with one response; longer pairs are left out",
        "  max_prompt_length: 512",
        "  on_bad_row: stop            # or skip: leave rows out that cannot be used, and count them",
        "",
        f"# {soft} of the first {rows} pairs have a label below 1. docs/losses.md lists the presets.",
        "loss:",
        f"  preset: {preset}",
        f"  beta: {loss.beta:g}",
        "",
        "training:",
        "  epochs: 1",
        "  pairs_per_step: 64",
        "  tokens_per_microbatch: 8192 # lower it if memory runs out: the step stays the same",
        f"  learning_rate: {2e-5 if preset == 'sft' else 5e-6:.1e}",
        "",
        "evaluation:",
        "  every_steps: 50",
        "",
        "tracking:",
        f"  registered_model: {name}    # polyref models list",
        "",
        "storage_path: ./runs          # runs, scores, registry; on a cluster a shared folder or s3://",
        "",
    ]
    return "\n".join(lines)


def _format_references(model: str, loss: LossConfig) -> list[str]:
    """Return the references that the loss needs: the policy's own start, and another where it takes two."""
    if loss.min_references == 0:
        return []
    lines = [
        "# Frozen models that the policy is compared with. `model: policy` is the policy's own start: the",
        "# adapter leaves it as it is, so it takes no memory of its own.",
        "references:",
        "  primary: start",
        "  models:",
        "    start: {model: policy}",
    ]
    if loss.min_references > 1 or loss.references.combine not in ("single", "none"):
        lines.append(f"    other: {{model: {_quote(model)}}}   # name another model here")
    return [*lines, ""]


def _quote(value: str) -> str:
    """Return a text as YAML has it, in quotes where it needs them."""
    return yaml.safe_dump(value, width=10_000).removesuffix("...\n").strip()
