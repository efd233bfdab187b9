"""The search spaces: every point makes a valid run, and a space lists beforehand what it can draw."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest

from losses.presets import PRESETS
from orchestrator.config.run import RunConfig, parse_run
from tune_spaces.domains import Choice, Domain, LogUniform, RandInt, SpaceError, parse_domain
from tune_spaces.losses import FAMILIES
from tune_spaces.spaces import SPACES, Space, apply_point

NAMES = ("base", "movie", "large")
SUBSETS = [names for size in range(len(SPACES) + 1) for names in combinations(SPACES, size)]


class Sampler:
    """Draws at random, and records the domain of every name that is drawn."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.domains: dict[str, Domain] = {}

    def __call__(self, name: str, domain: Domain, /) -> Any:
        assert self.domains.setdefault(name, domain) == domain, f"{name} has two domains"
        if isinstance(domain, Choice):
            return self.random.choice(domain.values)
        if isinstance(domain, RandInt):
            return self.random.randint(domain.low, domain.high)
        if isinstance(domain, LogUniform):
            return math.exp(self.random.uniform(math.log(domain.low), math.log(domain.high)))
        return self.random.uniform(domain.low, domain.high)


def make_base_run(loss: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {
        "name": "base",
        "policy": {"model": "some/model"},
        "references": {"primary": "base", "models": {name: {"model": name} for name in NAMES[:count]}},
        "data": {"train": "train.jsonl"},
        "loss": loss,
    }


def build_run(loss: Mapping[str, Any], count: int, point: Mapping[str, Any]) -> RunConfig:
    return parse_run(apply_point(make_base_run(loss, count), point), source="trial")


def make_space(names: Any, count: int = 1, loss: Mapping[str, Any] | None = None, **fields: Any) -> Space:
    domains = {name.replace("__", "."): parse_domain(value) for name, value in fields.items()}
    return Space(names, domains, NAMES[:count], loss or {"preset": "dpo"})


def list_base_losses(count: int) -> list[dict[str, Any]]:
    """Losses of run files which between them set something in every stage."""
    if count == 1:
        theta = {"preset": "mallows_theta", "dispersion": {"phi_star": "auto"}}
        return [{"preset": "dpo"}, theta, {"preset": "simpo"}]
    weights = dict.fromkeys(NAMES[:count], 1.0)
    several = {"combine": "geometric", "weights": weights, "trust_region": 0.2}
    phi = {"preset": "mallows_phi", "link": {"smoothing": 0.3}, "soft_label": {"type": "mixture"}}
    return [{**phi, "references": several}, PRESETS["mrpo"].model_dump(), {"preset": "cpo"}]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_point_makes_a_valid_run(count: int) -> None:
    """All combinations of named spaces, over losses of all sorts; and each field's domain is listed."""
    for names in SUBSETS:
        for loss in list_base_losses(count)[
            : 1 if "losses" in names else None
        ]:  # a drawn loss replaces the base run's
            drawn_from, sampler = make_space(names, count, loss), Sampler(count)
            listed = {(row.field, row.domain) for row in drawn_from.list_rows()}
            for _ in range(6):
                point = drawn_from.draw_point(sampler)
                run = build_run(loss, count, point)
                assert json.loads(json.dumps(point)) == point
                assert run.references.ordered[0] == "base"
                assert set(drawn_from.numeric_domains) <= set(point)
            assert {(name.split(" [")[0], str(domain)) for name, domain in sampler.domains.items()} <= listed


def test_a_base_run_with_several_references_and_no_losses_space_keeps_them() -> None:
    loss = {"preset": "multi_dpo"}
    point = make_space(["optimizer"], 3, loss).draw_point(Sampler(0))
    assert build_run(loss, 3, point).references.ordered == list(NAMES)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_family_is_offered_where_its_references_are(count: int) -> None:
    values = next(
        row for row in make_space(["losses"], count).list_rows() if row.field == "loss.preset"
    ).domain
    offered = set(values.split(" | "))
    several = {name for name in FAMILIES if PRESETS[name].references.combine in ("harmonic", "geometric")}
    free = {"simpo", "orpo", "cpo"}
    assert free <= offered
    assert set(FAMILIES) - offered == (set(FAMILIES) - free, several | {"multi_dpo"}, set())[count]
    assert set(FAMILIES) == set(PRESETS) - {"sft"}


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if PRESETS[name].references.combine == "single"]
)
def test_a_family_of_one_reference_uses_the_primary(family: str) -> None:
    point = make_space(["losses"], 3, loss__preset=family).draw_point(Sampler(1))
    assert point["references.use"] == ["base"]
    assert build_run({"preset": "dpo"}, 3, point).preset == family


def test_any_loss_can_read_several_references() -> None:
    several = make_space(["losses", "references"], 3, loss__preset="gdpo", references__use=list(NAMES))
    run = build_run({"preset": "dpo"}, 3, several.draw_point(Sampler(0)))
    assert run.loss.references.combine in ("harmonic", "geometric", "multi_loss")
    assert (run.loss.soft_label.type, run.references.ordered) == ("geometric", list(NAMES))


def test_dispersion_is_none_theta_or_phi() -> None:
    draws = [make_space(["dispersion"]).draw_point(Sampler(seed)) for seed in range(40)]
    runs = [build_run({"preset": "dpo"}, 1, point).loss for point in draws]
    assert {(loss.dispersion.type, loss.link.type) for loss in runs} == {
        ("none", "sigmoid"),
        ("entropy", "sigmoid"),
        ("entropy", "mallows_phi"),
    }
    assert {
        loss.needs_calibration for loss in runs if loss.link.type == "sigmoid" and loss.needs_entropy
    } == {True}


def test_a_field_that_is_narrowed_has_one_name_in_all_cases() -> None:
    sampler = Sampler(0)
    narrow = make_space(
        ["losses"], loss__preset={"choice": ["dpo", "simpo"]}, loss__beta={"uniform": [0.1, 0.2]}
    )
    points = [narrow.draw_point(sampler) for _ in range(20)]
    assert set(sampler.domains) == {"loss.preset", "loss.beta", "loss.margin [simpo]"}
    assert {point["loss.preset"] for point in points} == {"dpo", "simpo"}
    assert all(0.1 <= point["loss.beta"] <= 0.2 for point in points)
    assert list(narrow.numeric_domains) == ["loss.beta"]
    assert [(row.field, row.when) for row in narrow.list_rows()] == [
        ("loss.preset", ""),
        ("loss.beta", ""),
        ("loss.margin", "simpo"),
    ]


def test_a_narrowed_field_of_one_family_is_not_added_to_the_others() -> None:
    narrow = make_space(["losses"], loss__preset={"choice": ["nca", "simpo"]}, loss__margin=0.5)
    points = [narrow.draw_point(Sampler(seed)) for seed in range(10)]
    assert {(point["loss.preset"], point.get("loss.margin")) for point in points} == {
        ("nca", None),
        ("simpo", 0.5),
    }
    assert ("loss.margin", "0.5", "simpo") in {
        (row.field, row.domain, row.when) for row in narrow.list_rows()
    }


def test_added_fields_are_drawn_and_a_fixed_value_is_not() -> None:
    sampler = Sampler(0)
    point = make_space([], training__epochs={"randint": [1, 3]}, loss__beta=0.3).draw_point(sampler)
    assert list(sampler.domains) == ["training.epochs"]
    assert point["loss.beta"] == 0.3
    assert point["training.epochs"] in (1, 2, 3)


@pytest.mark.parametrize("names", [[], ["losses"], ["losses", "references"]])
def test_losses_get_the_references_of_the_sweep_file_that_they_can_read(names: list[str]) -> None:
    uses = {"grid": [["base"], ["base", "movie"], ["base", "large"]]}
    narrow = make_space(names, 3, loss__preset={"grid": ["simpo", "mrpo"]}, references__use=uses)
    points, sampler = [], Sampler(0)
    for _ in range(20):
        points.append(narrow.draw_point(sampler))
        build_run({"preset": "dpo"}, 3, points[-1])
    used = {(point["loss.preset"], *point["references.use"]) for point in points}
    assert used == {("simpo", "base"), ("mrpo", "base", "movie"), ("mrpo", "base", "large")}


def test_a_family_for_several_references_is_refused_if_the_sweep_file_gives_one() -> None:
    narrow = make_space(
        ["losses", "references"], 2, loss__preset="mrpo", references__use={"choice": [["base"]]}
    )
    with pytest.raises(SpaceError, match=r"references\.use .* base: no value is for several references"):
        narrow.list_rows()


def test_a_grid_has_every_combination_once() -> None:
    grid = make_space(
        ["losses", "soft_labels"],
        loss__preset={"grid": ["dpo", "gdpo", "simpo"]},
        loss__beta={"choice": [0.1, 0.2]},
        loss__margin={"grid": [0, 0.3]},
        training__epochs={"randint": [1, 3]},
    )
    points = [json.dumps(point) for point in grid.iterate_grid()]
    # dpo: 2 betas x 3 soft labels; gdpo keeps its own: 2; simpo: 2 betas x 2 margins x 3; all x 3 epochs.
    assert len(points) == len(set(points)) == (6 + 2 + 12) * 3


def test_a_grid_of_a_range_is_refused_with_the_remedy() -> None:
    with pytest.raises(SpaceError, match=r"loss\.beta .*continuous.*loss\.beta: \{grid"):
        make_space(["losses"], loss__preset="dpo").iterate_grid()


def test_an_unknown_space_names_the_nearest() -> None:
    with pytest.raises(SpaceError, match="did you mean 'losses'"):
        make_space(["loses"])


def test_an_unknown_family_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(SpaceError, match="did you mean 'gdpo'"):
        make_space(["losses"], loss__preset={"choice": ["dpo", "gdppo"]}).list_rows()


def test_a_drawn_type_replaces_its_section_and_a_drawn_preset_the_whole_loss() -> None:
    content = {"loss": {"beta": 0.3, "dispersion": {"type": "entropy", "phi_star": "auto"}}, "name": "x"}
    assert apply_point(content, {"loss.dispersion.type": "none"}) == {
        "loss": {"beta": 0.3, "dispersion": {"type": "none"}},
        "name": "x",
    }
    drawn = {"loss.dispersion.value": 2.0, "loss.dispersion.type": "constant", "loss.preset": "dpo"}
    assert apply_point(content, drawn)["loss"] == {
        "preset": "dpo",
        "dispersion": {"type": "constant", "value": 2.0},
    }
    section = {"loss.link.alpha": 3.0, "loss.link": {"type": "ropo"}}
    assert apply_point(content, section)["loss"]["link"] == {"type": "ropo", "alpha": 3.0}
    assert content["loss"]["dispersion"] == {"type": "entropy", "phi_star": "auto"}


def test_the_table_shows_cases_that_share_a_domain_in_one_line() -> None:
    rows = make_space(["losses"], loss__preset={"choice": ["dpo", "hinge", "simpo"]}).list_rows()
    assert [(row.field, row.domain, row.when) for row in rows] == [
        ("loss.preset", "dpo | hinge | simpo", ""),
        ("loss.beta", "0.01 to 1, log", "dpo, hinge"),
        ("loss.beta", "1 to 20, log", "simpo"),
        ("loss.margin", "0 to 1", "simpo"),
    ]


def test_spaces_import_nothing_heavy() -> None:
    code = (
        "import sys, tune_spaces.spaces, tune_spaces.schedulers;"
        "print(*{'torch', 'ray', 'optuna', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
