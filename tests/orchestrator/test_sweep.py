"""The sweep file: what it refuses and in which words, the runs it makes of a point, and matched controls."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losses.presets import preset
from orchestrator.config.sweep import (
    SweepConfig,
    SweepFile,
    build_sweep_schema,
    build_trial_run,
    load_sweep,
    parse_sweep,
)
from orchestrator.errors import UsageError
from orchestrator.search.controls import build_control, match_beta

RUN: dict[str, Any] = {
    "name": "base-run",
    "policy": {"model": "some/model", "adapter": {"r": 16}},
    "references": {
        "primary": "base",
        "models": {"other": {"model": "another/model"}, "base": {"model": "some/model"}},
    },
    "data": {"train": "train.jsonl", "eval_fraction": 0.1},
    "loss": {"preset": "mrpo", "beta": 0.3, "soft_label": {"type": "geometric"}},
    "training": {"seed": 7},
    "storage_path": "runs",
}
SAMPLING = {"sampling": {"prompts": 8, "kl_budget": 4}}
SWEEP: dict[str, Any] = {"name": "a-sweep", "run": RUN, "spaces": ["losses"], "search": {"trials": 2}}

LABELS = np.array([0.6, 0.9, 1.0])
ENTROPIES = np.array([0.3, 0.5, 0.4])


def sweep(run: dict[str, Any] | None = None, **sections: Any) -> SweepConfig:
    return parse_sweep(SWEEP | {"run": RUN | (run or {})} | sections, source="s.yaml")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"serch": {"trials": 2}}, ["s.yaml: serch: unknown field", "did you mean 'search'"]),
        ({"search": {"trails": 2}}, ["s.yaml: search.trails: unknown field", "'trials'"]),
        ({"search": {}}, ["s.yaml: search", "how many points a random search", "trials: 16"]),
        ({"search": {"algorithm": "bayes", "trials": 2}}, ["search.algorithm", "'tpe'", "'bayes'"]),
        ({"spaces": ["loses"]}, ["no space 'loses'", "did you mean 'losses'"]),
        ({"spaces": []}, ["nothing to search", "losses, references, dispersion", "under space"]),
        ({"scheduler": {"type": "asha", "grace": 4}}, ["scheduler.asha", "'grace'", "'grace_steps'"]),
        ({"scheduler": {"type": "hyperband"}}, ["scheduler", "'hyperband'", "'asha'"]),
        ({"objective": "eval/acuracy"}, ["objective.0", "'eval/acuracy'", "did you mean 'eval/accuracy'"]),
        ({"objective": ["eval/accuracy", "eval/margin"]}, ["several objectives need", "algorithm: tpe"]),
        ({"objective": []}, ["objective", "at least 1"]),
        ({"promote": "bset"}, ["promote", "'best' or 'retrain'", "'bset'"]),
        ({"plateau": {"metric": "eval/loss"}}, ["plateau.metric: unknown field", "std, results, grace"]),
        ({"time_budget": 0}, ["time_budget", "greater than 0", "got 0"]),
    ],
)
def test_a_typo_or_a_wrong_setting_is_refused(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as refusal:
        sweep(**sections)
    for word in words:
        assert word in str(refusal.value), word


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("loss.bta", 0.1, ["unknown field", "did you mean 'beta'"]),
        ("loss.link.alpa", 14, ["unknown field", "did you mean 'alpha'"]),
        ("references.usee", ["base"], ["unknown field", "did you mean 'use'"]),
        ("policy.adapter.rank", 4, ["unknown field", "known are r, alpha"]),
        ("training.seed", {"choice": [0, 1]}, ["cannot be searched", "search.repeats"]),
        ("policy.adapter", None, ["cannot be searched", "policy.adapter.r"]),
        ("loss", {"preset": "dpo"}, ["cannot be searched", "loss.preset"]),
        ("loss.preset", {"choice": ["gdpo", "sigmoid"]}, ["preset sigmoid is dpo here; write dpo"]),
        ("training", {}, ["cannot be searched", "training.learning_rate"]),
        ("policy.model", "a/model", ["cannot be searched", "one reference service scores for all"]),
        ("data.max_length", 64, ["cannot be searched", "loss.*, training.*, references.use"]),
        ("references.models", {}, ["cannot be searched"]),
        ("evaluation.every_steps", 5, ["cannot be searched"]),
        ("loss.beta", {"loguniform": [0, 1]}, ["must start above 0", "or uniform"]),
        ("loss.beta", {"logunifrm": [0.1, 1]}, ["unknown domain", "did you mean 'loguniform'"]),
        ("loss.beta", {"uniform": [1, 0.1]}, ["must rise", "low < high"]),
        ("loss.beta", {"choice": 0.1}, ["takes a list", "{choice: [0.1]}"]),
    ],
)
def test_a_field_that_cannot_be_searched_is_named_with_the_remedy(
    field: str, value: Any, words: list[str]
) -> None:
    with pytest.raises(UsageError) as refusal:
        sweep(space={field: value})
    for word in (f"s.yaml: space.{field}: ", *words):
        assert word in str(refusal.value), word


@pytest.mark.parametrize(
    ("run", "sections", "words"),
    [
        ({}, {"objective": "eval/kl/base"}, ["eval/kl/base needs samples", "set evaluation.sampling"]),
        (
            {"evaluation": SAMPLING},
            {"objective": "eval/kl/other"},
            ["only the primary reference in common", "eval/kl/base"],
        ),
        ({}, {"objective": "eval/reward"}, ["needs a reward", "evaluation.sampling.reward"]),
        ({}, {"objective": "eval/margin_at_kl"}, ["needs a budget", "evaluation.sampling.kl_budget"]),
        (
            {"evaluation": SAMPLING | {"keep": "last"}},
            {"objective": "eval/margin_at_kl"},
            ["set evaluation.keep: best"],
        ),
        (
            {"evaluation": SAMPLING},
            {
                "objective": ["eval/accuracy", "eval/reward_at_kl"],
                "search": {"algorithm": "tpe", "trials": 2},
            },
            ["s.yaml: objective eval/reward_at_kl", "needs a reward"],
        ),
        ({"data": {"train": "t.jsonl"}}, {}, ["held-out pairs", "data.eval_fraction"]),
        ({"loss": {"preset": "sft"}}, {}, ["preference losses", "preset sft reads no pairs"]),
        ({"loss": {"preset": "mrppo"}}, {}, ["s.yaml: run: loss", "did you mean 'mrpo'"]),
        ({"parallel": {"workers": 2}}, {"scheduler": {"type": "pbt"}}, ["pbt", "parallel.workers: 1"]),
        (
            {},
            {"scheduler": {"type": "pbt"}, "search": {"trials": 2, "repeats": 2}},
            ["pbt", "search.repeats: 1"],
        ),
        (
            {},
            {"scheduler": {"type": "pbt"}, "search": {"trials": 2, "controls": True}},
            ["pbt", "search.controls: false"],
        ),
    ],
)
def test_what_the_run_file_cannot_give_is_refused(
    run: dict[str, Any], sections: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UsageError) as refusal:
        sweep(run, **sections)
    for word in words:
        assert word in str(refusal.value), word


# ---------------------------------------------------------------- the file


def test_the_run_file_lies_beside_the_sweep_file_and_overrides_reach_both(tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "run.yaml").write_text(json.dumps(RUN))
    file = tmp_path / "sweeps" / "sweep.yaml"
    file.write_text(json.dumps(SWEEP | {"run": "../run.yaml", "search": {"trials": 9}}))
    read = load_sweep(file, ["search.trials=2", "run.training.epochs=2", "time_budget=5"])
    assert (read.search.trials, read.base.training.epochs, read.time_budget) == (2, 2, 5)
    assert read.base.preset == "mrpo"
    with pytest.raises(UsageError, match=r"run\.yaml: training\.epoch: unknown field.*'epochs'"):
        load_sweep(file, ["run.training.epoch=2"])


def test_a_run_file_that_is_missing_is_named(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(SWEEP | {"run": "gone.yaml"}))
    with pytest.raises(UsageError, match=r"gone\.yaml: no such file"):
        load_sweep(file)
    file.write_text(json.dumps({key: value for key, value in SWEEP.items() if key != "run"}))
    with pytest.raises(UsageError, match=r"sweep\.yaml: run is required"):
        load_sweep(file)


def test_an_objective_has_a_direction_of_its_own() -> None:
    read = sweep(
        {"evaluation": SAMPLING},
        objective=["eval/label_nll", "eval/kl/base", {"metric": "eval/margin", "mode": "min"}],
        search={"algorithm": "tpe", "trials": 2},
    )
    assert [(o.metric, o.mode) for o in read.objective] == [
        ("eval/label_nll", "min"),
        ("eval/kl/base", "min"),
        ("eval/margin", "min"),
    ]
    assert [(o.metric, o.mode) for o in sweep().objective] == [("eval/accuracy", "max")]


def test_the_schema_has_the_fields_of_the_file() -> None:
    schema = build_sweep_schema()
    assert set(schema["properties"]) == set(SweepFile.model_fields)
    assert {"type": "string"} in schema["properties"]["run"]["anyOf"]


def test_reading_a_sweep_file_imports_neither_torch_nor_ray() -> None:
    heavy = ("torch", "ray", "optuna", "transformers", "mlflow")
    code = f"import sys, orchestrator.config.sweep; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- the run that a trial is


def test_a_drawn_loss_replaces_the_run_files() -> None:
    drawn = build_trial_run(sweep(), {"loss.preset": "dpo", "references.use": ["base"]})
    assert (drawn.preset, drawn.loss) == ("dpo", preset("dpo"))
    assert drawn.references.ordered == ["base"]


def test_drawn_fields_without_a_loss_are_merged_over_the_run_files() -> None:
    drawn = build_trial_run(
        sweep(), {"loss.beta": 0.7, "training.learning_rate": 1e-4, "policy.adapter.r": 4}
    )
    expected = preset("mrpo", beta=0.7, soft_label={"type": "geometric"})
    assert (drawn.preset, drawn.loss) == ("mrpo", expected)
    assert drawn.references.ordered == ["base", "other"]
    assert drawn.training.learning_rate == 1e-4
    assert drawn.policy.adapter is not None
    assert drawn.policy.adapter.r == 4


def test_repeats_differ_in_the_seed_alone() -> None:
    runs = [build_trial_run(sweep(), {"loss.beta": 0.2}, repeat=repeat, name="0003") for repeat in range(3)]
    assert [run.training.seed for run in runs] == [7, 8, 9]
    same = [run.model_dump() | {"training": run.training.model_dump() | {"seed": 0}} for run in runs]
    assert same[0] == same[1] == same[2]


def test_a_trial_keeps_one_checkpoint() -> None:
    run = build_trial_run(sweep(), {}, name="0003")
    assert (run.name, run.training.keep_last) == ("0003", 1)
    assert run.training.save_every == 200
    population = sweep({"evaluation": {"every_steps": 25}}, scheduler={"type": "pbt"})
    assert build_trial_run(population, {}).training.save_every == 25  # what a population hands around


def test_a_trial_is_judged_by_the_first_objective() -> None:
    assert build_trial_run(sweep(objective="eval/margin"), {}).evaluation.metric == "eval/margin"
    at_kl = build_trial_run(sweep({"evaluation": SAMPLING}, objective="eval/margin_at_kl"), {}).evaluation
    assert (at_kl.metric, at_kl.keep) == ("eval/margin_at_kl", "best")


def test_a_point_that_makes_no_run_is_refused_by_its_trial() -> None:
    with pytest.raises(UsageError, match=r"trial 0004: .*combine is single"):
        build_trial_run(sweep(), {"loss.preset": "dpo"}, name="0004")


# ---------------------------------------------------------------- controls


def beta_of(name: str, *, labels: Any = LABELS, **settings: Any) -> float | None:
    return match_beta(preset(name, **settings), soft_labels=labels, entropies=ENTROPIES)


def test_dpo_matches_itself_whatever_its_references_and_labels() -> None:
    assert beta_of("dpo", beta=0.37) == 0.37
    assert beta_of("mrpo", beta=0.37) == 0.37
    assert beta_of("simpo", beta=2.5, margin=0.8) == 2.5  # the margin is no part of the pull


@pytest.mark.parametrize("name", ["gdpo", "cdpo"])
def test_soft_labels_shrink_the_pull_by_the_mean_of_2p_less_1(name: str) -> None:
    assert beta_of(name, beta=0.2) == pytest.approx(0.2 * np.mean(2 * LABELS - 1), rel=1e-3)


def test_a_dispersion_scales_the_pull_by_its_mean() -> None:
    scales = -0.29 * np.log(ENTROPIES)
    fixed = {"dispersion": {"phi_star": 0.29}}
    assert beta_of("mallows_theta", beta=0.2, **fixed) == pytest.approx(0.2 * scales.mean(), rel=1e-3)
    auto = {"dispersion": {"phi_star": "auto"}}
    assert beta_of("mallows_theta", beta=0.2, **auto) == pytest.approx(0.2, rel=1e-3)
    both = beta_of("mallows_theta", beta=0.2, soft_label={"type": "geometric"}, **fixed)
    assert both == pytest.approx(0.2 * np.mean((2 * LABELS - 1) * scales), rel=1e-3)


def test_mallows_phi_is_matched_by_the_slope_of_its_loss() -> None:
    beta, smoothing, step = 0.2, 0.5, 1e-5

    def chance(t: float, lam: float) -> float:
        """g(t) for t > 0, by Kendall's tau."""
        return (t + 1) / -math.expm1(-lam * (t + 1)) - t / -math.expm1(-lam * t)

    def loss(h: float, lam: float) -> float:
        """-log of the cubic through 1/2 that has g's value and slope at the edge of smoothing."""
        gain = chance(smoothing, lam) - 0.5
        slope = (chance(smoothing + step, lam) - chance(smoothing - step, lam)) / (2 * step)
        linear = (3 * gain - slope * smoothing) / (2 * smoothing)
        cubic = (slope * smoothing - gain) / (2 * smoothing**3)
        t = beta * h
        return -math.log(0.5 + linear * t + cubic * t**3)

    scales = -0.29 * np.log(ENTROPIES)
    slopes = [(loss(step, lam) - loss(-step, lam)) / (2 * step) for lam in scales]
    assert beta_of("mallows_phi", beta=beta) == pytest.approx(-2 * np.mean(slopes), rel=1e-3)


def test_other_links_are_matched_with_themselves() -> None:
    pull = np.mean(2 * LABELS - 1)
    soft = {"soft_label": {"type": "geometric"}}
    assert beta_of("hinge", beta=0.2, **soft) == pytest.approx(0.2 * pull, rel=1e-3)  # slope beta
    assert beta_of("gipo", beta=0.2) == pytest.approx(0.2 / pull, rel=1e-3)  # slope 1 / beta
    control = build_control({"loss.preset": "gipo"}, preset("gipo"), 0.3)
    assert control is not None
    assert control["loss.link"] == {"type": "ipo"}


def test_a_control_is_dpo_with_all_else_as_it_was() -> None:
    loss = preset("mrpo", beta=0.3, soft_label={"type": "geometric"}, sft_weight=0.5)
    point = {"loss.preset": "mrpo", "loss.beta": 0.3, "training.learning_rate": 1e-4}
    control = build_control(point, loss, 0.2)
    assert control is not None
    assert control["training.learning_rate"] == 1e-4
    assert build_trial_run(sweep(), control).loss == preset(
        "dpo", beta=0.2, sft_weight=0.5, references=loss.references.model_dump()
    )


def test_what_has_neither_soft_labels_nor_dispersion_needs_no_control() -> None:
    assert build_control({"loss.preset": "ipo"}, preset("ipo"), 0.1) is None
    assert beta_of("gdpo", labels=np.full(len(LABELS), 0.5)) is None  # labels that pull nowhere
    assert build_control({"loss.preset": "gdpo"}, preset("gdpo"), None) is None
