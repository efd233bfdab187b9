"""Sweep files that are shipped, and those in the pages: parsed, drawn from, their schedulers made."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from losses.presets import PRESETS
from orchestrator.config.sweep import SweepConfig, SweepFile, build_trial_run, load_sweep, parse_sweep
from orchestrator.search.searcher import sample_points
from tune_spaces.losses import FAMILIES
from tune_spaces.schedulers import AshaConfig, PbtConfig, build_scheduler
from tune_spaces.spaces import SPACES, Space

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
PAGE = ROOT / "docs" / "search.md"
BEGIN, END = "<!-- spaces: begin -->\n", "<!-- spaces: end -->"
STEPS = 1000
RUN: dict[str, Any] = {
    "name": "page",
    "policy": {"model": "a-model", "adapter": {"r": 16}},
    "references": {"primary": "base", "models": {"base": {"model": "a-model"}, "other": {"model": "b"}}},
    "data": {"train": "pairs.jsonl", "eval_fraction": 0.1},
    "loss": {"preset": "mrpo"},
}


def space_of(sweep: SweepConfig) -> Space:
    return Space(sweep.spaces, sweep.domains, sweep.base.references.ordered, sweep.run["loss"])


def check(sweep: SweepConfig) -> None:
    """50 points make valid trials, and the scheduler has something to do."""
    space = space_of(sweep)
    for point in sample_points(space, 50, seed=1):
        build_trial_run(sweep, point)
    if sweep.search.algorithm == "grid":
        assert len(list(space.iterate_grid())) > 1
    build_scheduler(
        sweep.scheduler,
        metric=sweep.objective[0].metric,
        mode=sweep.objective[0].mode,
        max_steps=STEPS,
        every_steps=sweep.base.evaluation.every_steps,
        mutations=space.numeric_domains,
        seed=0,
    )


def space_table() -> str:
    """What each named space draws, for a run with two references."""
    lines = ["| space | field | drawn from | when |", "|---|---|---|---|"]
    for name in SPACES:
        for row in Space([name], {}, ("base", "other"), {"preset": "dpo"}).list_rows():
            domain = row.domain.replace(" | ", ", ")
            if row.field == "loss.preset":
                assert domain == ", ".join(FAMILIES)
                domain = f"{len(FAMILIES)} families"
            when = ", ".join(f"`{one}`" if one in PRESETS else one for one in row.when.split(", "))
            lines.append(f"| `{name}` | `{row.field}` | {domain} | {when} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def test_example_sweeps_are_shipped() -> None:
    assert len(FILES) >= 5
    sweeps = [load_sweep(path) for path in FILES]
    assert {sweep.search.algorithm for sweep in sweeps} == {"random", "grid", "tpe"}
    assert {type(sweep.scheduler) for sweep in sweeps} >= {AshaConfig, PbtConfig}
    assert any(sweep.search.controls and sweep.search.repeats > 1 for sweep in sweeps)
    assert any(len(sweep.objective) > 1 for sweep in sweeps)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_sweep_can_be_searched(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.name == path.stem
    check(sweep)


def test_the_examples_have_the_points_that_their_comments_say() -> None:
    dispersion, references = (
        load_sweep(ROOT / f"configs/sweeps/{n}.yaml") for n in ("dispersion", "references")
    )
    assert len(list(space_of(dispersion).iterate_grid())) == 6
    assert len(list(space_of(references).iterate_grid())) == 25


def pages() -> Iterator[Any]:
    for text in re.findall(r"^```yaml sweep\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        yield pytest.param(yaml.safe_load(text), id="page")
    for text in re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    ):
        content = yaml.safe_load(text)
        if "search" in content:
            yield pytest.param(content, id="readme")


@pytest.mark.parametrize("content", list(pages()))
def test_a_sweep_in_a_page_can_be_searched(content: dict[str, Any]) -> None:
    check(parse_sweep(content | {"run": RUN}, source="page"))


def test_both_pages_show_a_sweep() -> None:
    assert {case.id for case in pages()} == {"page", "readme"}


def test_the_table_of_spaces_is_what_they_draw() -> None:
    assert {*FAMILIES} == {*PRESETS} - {"sft"}
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0] == space_table()


def test_every_field_of_a_sweep_file_is_explained_with_its_default() -> None:
    page = PAGE.read_text().partition("## Fields")[2].partition("\n## ")[0]
    sweep = parse_sweep(
        {"name": "page", "run": RUN, "spaces": ["losses"], "search": {"trials": 1}}, source="page"
    )
    search = {f"search.{name}": getattr(sweep.search, name) for name in type(sweep.search).model_fields}
    others = {name: getattr(sweep, name) for name in SweepFile.model_fields if name != "search"}
    own = {
        "name": "required",
        "run": "required",
        "spaces": [],
        "search.trials": None,
        "objective": "eval/accuracy",
    }
    for field, value in (search | others | own).items():
        row = re.search(rf"^\| `{field}` \| (.*?) \|", page, re.MULTILINE)
        assert row is not None, field
        value = value.model_dump() if field == "scheduler" else value
        assert yaml.safe_load(row[1].strip("`")) == value, field


def test_settings_of_schedulers_are_those_of_the_page() -> None:
    page = PAGE.read_text()
    for said, settings in (("`asha`:", AshaConfig()), ("`pbt`:", PbtConfig())):
        text = page.partition(f"- {said}")[2].partition("\n- ")[0]
        for name, value in settings.model_dump(exclude={"type"}).items():
            shown = name if value is None else rf"{name}:\s+{value:g}"
            assert re.search(rf"`{shown}`", text), name
