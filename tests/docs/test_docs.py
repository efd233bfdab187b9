"""The pages under docs/ against the code they describe: presets, fields, YAML, Python, links."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from losses.presets import PRESETS, loss_config_from_settings
from models.config import LoraSettings
from orchestrator.cli.explain import explain_field
from orchestrator.config.fields import list_fields
from orchestrator.config.run import build_run_schema, parse_run
from orchestrator.config.sweep import build_sweep_schema
from orchestrator.driver.record import _MAY_CHANGE_PER_REFERENCE, MAY_CHANGE

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
LINKING = [*PAGES, ROOT / "README.md", ROOT / "SECURITY.md"]
BEGIN, END = "<!-- presets: begin -->\n", "<!-- presets: end -->"

# What a section that stands alone in a page needs around it to be a run file.
BARE: dict[str, Any] = {
    "name": "page",
    "policy": {"model": "a-model", "adapter": {"r": 16}},
    "references": {
        "primary": "base",
        "models": {"base": {"model": "a-model"}, "other": {"model": "another"}},
    },
    "data": {"train": "pairs.jsonl", "eval_fraction": 0.05},
    "loss": {"preset": "mrpo"},
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation of the list they may stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def preset_table() -> str:
    """The table of presets: what each sets that `dpo` does not."""
    plain = PRESETS["dpo"].model_dump()
    lines = ["| preset | references | sets |", "|---|---|---|"]
    for name, config in PRESETS.items():
        sets = [
            f"`{field}: {_flow(_difference(value, plain[field]))}`"
            for field, value in config.model_dump().items()
            if value != plain[field]
        ]
        lines.append(f"| `{name}` | {config.min_references} | {', '.join(sets) or 'nothing'} |")
    return "\n".join(lines) + "\n"


def _difference(value: Any, plain: Any) -> Any:
    """Of a stage of another type all of it; of the same stage what differs."""
    if not isinstance(value, dict) or value.get("type") != plain.get("type"):
        return value
    return {key: part for key, part in value.items() if part != plain[key]}


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).split("\n")[0]


def fields(schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """The names of all fields of a schema, those of its sections included."""
    for name, inner in schema.get("properties", {}).items():
        yield name
        yield from fields(inner, definitions)
    if "$ref" in schema:
        yield from fields(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    for key in ("anyOf", "oneOf", "allOf"):
        for option in schema.get(key, ()):
            yield from fields(option, definitions)
    if isinstance(schema.get("additionalProperties"), dict):
        yield from fields(schema["additionalProperties"], definitions)


def test_the_table_of_presets_is_what_the_code_sets() -> None:
    page = (ROOT / "docs" / "losses.md").read_text()
    assert page.partition(BEGIN)[2].partition(END)[0] == preset_table()


def test_every_preset_has_a_source() -> None:
    sources = (ROOT / "docs" / "losses.md").read_text().partition("## Where they come from")[2]
    for name in PRESETS:
        assert f"`{name}`" in sources, name


def test_every_field_of_a_run_file_is_explained() -> None:
    page = (ROOT / "docs" / "run-file.md").read_text()
    schema = build_run_schema()
    for name in sorted({*fields(schema, schema["$defs"]), *LoraSettings.model_fields}):
        assert re.search(rf"`(\w+\.)*{name}[`:]", page), f"{name} is not mentioned in docs/run-file.md"


def test_tables_of_fields_and_settings_are_what_the_generator_writes() -> None:
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_generator_restores_a_page_that_was_changed() -> None:
    write_tables = runpy.run_path(str(ROOT / "docs" / "generate.py"))["write_tables"]
    for name, row in (
        ("run-file.md", "| `pairs_per_step` | `64` | whole number, 1 or more | Pairs of one optimizer step"),
        ("search.md", "| `search.trials` | `null` | whole number or null, 1 or more | Points to try"),
        ("coming-from.md", "| `lora_r`, `lora_rank` | `policy.adapter.r` |  |"),
    ):
        page = (ROOT / "docs" / name).read_text()
        assert page.count(row) == 1
        assert write_tables(page.replace(row, "| another | row |")) == page


def test_every_field_is_in_a_table() -> None:
    """What the pages show is all there is, but for what a section has in common with another."""
    for page, schema in (("run-file.md", build_run_schema()), ("search.md", build_sweep_schema())):
        rows = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
        shown = {row.rpartition(".")[2] for row in rows}
        fields = list_fields(schema)
        top = {field.path for field in fields if field.type == "section" and not field.parent}
        assert {field.name for field in fields} - shown - top == set()


def test_what_explain_prints_is_as_the_page_shows_it() -> None:
    page = (ROOT / "docs" / "run-file.md").read_text()
    shown = re.findall(r"^\$ polyref explain (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert shown
    for name, printed in shown:
        assert "\n".join(explain_field(name)) + "\n" == printed


def test_what_may_change_between_restarts_is_listed() -> None:
    page = (ROOT / "docs" / "run-file.md").read_text()
    listed = page.partition("What may change")[2].partition("\nEverything")[0]
    assert {*re.findall(r"`([\w.]+)`", listed)} == {*MAY_CHANGE, *_MAY_CHANGE_PER_REFERENCE}


def test_default_values_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "run-file.md").read_text()
    config = parse_run(BARE, source="bare")
    sections = {
        "training": [*type(config.training).model_fields],
        "parallel": ["workers", "strategy", "max_failures"],
        "evaluation": ["every_steps", "metric"],
        "placement": ["wait_minutes"],
        "tracking": ["experiment"],
    }
    for section, names in sections.items():
        for name in names:
            row = re.search(rf"^\| (.*`(?:{section}\.)?{name}`.*?) \| (.*?) \|", page, re.MULTILINE)
            assert row is not None, name
            place = [cell.strip("` ").rpartition(".")[2] for cell in row[1].split(",")].index(name)
            written = yaml.safe_load(row[2].strip("`").split(", ")[place])
            expected = getattr(getattr(config, section), name)
            assert float(written) == expected if isinstance(expected, float) else written == expected, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_is_what_the_code_accepts(page: Path) -> None:
    for text in blocks(page, "yaml"):
        content = yaml.safe_load(text)
        assert isinstance(content, dict), text
        if set(content) == {"loss"}:
            loss_config_from_settings(content["loss"])
        parse_run(BARE | content, source=text)
        Draft202012Validator(build_run_schema()).validate(BARE | content)


def test_python_on_losses_prints_what_the_page_says() -> None:
    ran = 0
    for text in blocks(ROOT / "docs" / "losses.md", "python"):
        if "print(" not in text:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(text, {})
        assert printed.getvalue().splitlines() == re.findall(r"print\(.*\) +# (.*)", text)
        ran += 1
    assert ran == 1


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target
