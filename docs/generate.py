"""Write the tables of fields and of other trainers' settings into the pages, from what the code says of them.

python docs/generate.py            # write them
python docs/generate.py --check    # are the pages as they would be written?

A table is between comments such as `<!-- fields of the run file: training -->` and `<!-- end -->`. Without a
section it is of the fields at the top; several share one as in `parallel, evaluation`; and `without policy`
leaves out what that section has too.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.config.fields import FileField, list_fields, list_fields_of
from orchestrator.config.other_trainers import COUNTERPARTS
from orchestrator.config.run import build_run_schema
from orchestrator.config.sweep import build_sweep_schema

PAGES = ("run-file.md", "search.md", "coming-from.md")
_BLOCK = re.compile(
    r"(<!-- (fields of the (?:run|sweep) file|settings)(?:: ([^>]*))? -->\n)(.*?)(<!-- end -->)", re.S
)
_SEE = {
    "storage_path": "[storage](cluster.md#storage)",
    "policy.chat_template": "[models](models.md#code-that-a-model-brings)",
    "references.mode": "[references](references.md#live-or-precomputed)",
    "references.audit": "[references](references.md#an-audit-of-stored-scores)",
    "references.models.NAME.resources": "[resources](#resources)",
    "data.train": "[sources](#a-source)",
    "data.eval": "[held-out sets](#held-out-sets)",
    "data.columns": "[data](data.md#columns)",
    "data.label": "[labels](#labels)",
    "data.on_long_row": "[data](data.md#length)",
    "data.allow_hard_labels": "[data](data.md#soft-labels-and-votes)",
    "data.train.N.share": "[mixtures](data.md#mixtures)",
    "loss.preset": "[losses](losses.md#presets)",
    "loss.link.function": "[losses](losses.md#a-link-of-your-own)",
    "parallel.strategy": "[strategies](#strategies)",
    "parallel.resources": "[resources](#resources)",
    "evaluation.metric": "[what an evaluation measures](#what-an-evaluation-measures)",
    "evaluation.set": "[held-out sets](#held-out-sets)",
    "evaluation.sampling": "[sampling](#sampling)",
    "tracking.uri": "[registry](registry.md)",
    "spaces": "[spaces](#spaces)",
    "space": "[domains](#spaces)",
    "search.algorithm": "[algorithms](#algorithms)",
    "search.controls": "[controls](#repeats-and-controls)",
    "scheduler": "[stopping early](#stopping-early)",
    "objective": "[objectives](#objectives)",
    "promote": "[promotion](#promotion)",
}
"""What a page says at length about a field, by its path."""


def format_fields(fields: Sequence[FileField], sections: str) -> str:
    """Format the fields of sections as a table; the whole file's own, where no section is named."""
    wanted, _, without = sections.partition(" without ")
    paths = [path.strip() for path in wanted.split(",")]
    left_out = {field.name for field in list_fields_of(fields, without)} if without else set()
    lines = ["| field | default | values | meaning |", "|---|---|---|---|"]
    for path in paths:
        for field in list_fields_of(fields, path):
            if field.name in left_out or (not path and _is_plain_section(field)):
                continue
            name = field.name if len(paths) == 1 else field.path
            lines.append(
                f"| {' | '.join(_escape_cell(cell) for cell in (f'`{name}`', *_format_cells(field)))} |"
            )
    return "\n".join(lines) + "\n"


def format_settings() -> str:
    """Format the settings of other trainers as a table."""
    lines = ["| theirs | here | |", "|---|---|---|"]
    for counterpart in COUNTERPARTS:
        names, fields = (
            ", ".join(f"`{name}`" for name in group) for group in (counterpart.names, counterpart.fields)
        )
        lines.append(f"| {names} | {fields} | {_escape_cell(counterpart.remark)} |")
    return "\n".join(lines) + "\n"


def write_tables(page: str) -> str:
    """Return a page with its tables written anew."""
    files = {"run": list_fields(build_run_schema()), "sweep": list_fields(build_sweep_schema())}

    def write_block(block: re.Match[str]) -> str:
        begin, kind, sections, _, end = block.groups()
        if kind == "settings":
            return f"{begin}{format_settings()}{end}"
        fields = files["run" if "run" in kind else "sweep"]
        return f"{begin}{format_fields(fields, (sections or '').strip())}{end}"

    return _BLOCK.sub(write_block, page)


def _is_plain_section(field: FileField) -> bool:
    """Whether a field is a section whose fields, and nothing else, say what it is."""
    return field.type == "section" and field.default in (None, "{}")


def _format_cells(field: FileField) -> tuple[str, str, str]:
    """Return a field's default, values and meaning."""
    default = "required" if field.default is None else field.default
    values = ", ".join(part for part in (field.type, field.limits) if part)
    if field.path == "loss.preset":  # more than a table shows well
        values = "a preset's name"
    meaning = field.description
    if field.name == "type" and field.variants:
        default = ""
    elif field.variants:
        meaning = f"With type {' or '.join(f'`{kind}`' for kind in field.variants)}: {meaning}"
    if field.path in _SEE:
        meaning = f"{meaning}. See {_SEE[field.path]}"
    return (default if default in ("", "required") else f"`{default}`"), values, meaning


def _escape_cell(cell: str) -> str:
    return cell.replace("|", "\\|")


def main() -> int:
    """Write the pages, or say which are not as they would be written."""
    parser = argparse.ArgumentParser(description="Write the tables of fields into the pages.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    stale = 0
    for name in PAGES:
        path = Path(__file__).parent / name
        page = path.read_text()
        written = write_tables(page)
        if written == page:
            continue
        if check:
            print(f"docs/{name} is not what the code says; run python docs/generate.py", file=sys.stderr)
            stale = 1
        else:
            path.write_text(written)
    return stale


if __name__ == "__main__":
    sys.exit(main())
