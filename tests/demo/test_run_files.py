"""The demonstration's two run files are valid, and fit the rows that are made for them."""

from pathlib import Path

import pytest

import orchestrator.demo
from orchestrator.config.run import RunConfig, load_run
from orchestrator.demo.assets import fetch_human_ratings
from orchestrator.demo.ratings import build_preference_rows, read_movie_reviews

FOLDER = Path(orchestrator.demo.__file__).parent


@pytest.fixture(scope="module")
def reference() -> RunConfig:
    return load_run(FOLDER / "reference.yaml")


@pytest.fixture(scope="module")
def policy() -> RunConfig:
    return load_run(FOLDER / "policy.yaml")


def test_one_pass_over_exactly_the_rows_that_are_made(reference: RunConfig, policy: RunConfig) -> None:
    rows = build_preference_rows(read_movie_reviews(fetch_human_ratings()))
    for config, made in ((reference, rows.reviews), (policy, rows.train)):
        assert config.training.max_steps is not None
        assert config.training.max_steps * config.training.pairs_per_step == len(made)
    assert len(rows.eval) >= 300


def test_the_policy_learns_from_votes_against_two_references(reference: RunConfig, policy: RunConfig) -> None:
    assert (reference.preset, policy.preset) == ("sft", "mallows_theta")
    assert policy.references.ordered == ["base", "movie"]
    assert policy.references.models["base"].model == policy.policy.model
    registered = f"models:/{reference.tracking.registered_model}@{reference.tracking.alias}"
    assert policy.references.models["movie"].model == registered
    assert policy.loss.soft_label.type == "geometric"
    assert policy.loss.dispersion.type == "entropy"
