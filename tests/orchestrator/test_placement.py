"""Whether a run fits a cluster, by hand arithmetic."""

import pytest

from orchestrator.cluster.placement import (
    ClusterProfile,
    list_reference_needs,
    list_worker_needs,
    refuse_impossible,
)
from orchestrator.config.run import RunConfig, parse_run
from orchestrator.errors import UsageError


def run(
    *, references: dict[str, dict[str, object]], workers: int = 1, mode: str = "live", **parallel: object
) -> RunConfig:
    return parse_run(
        {
            "name": "a",
            "policy": {"model": "m"},
            "references": {"primary": next(iter(references)), "mode": mode, "models": references},
            "data": {"train": "t"},
            "loss": {"preset": "geometric_references" if len(references) > 1 else "dpo"},
            "parallel": {"workers": workers, **parallel},
        },
        source="run",
    )


TWO = {"a": {"model": "m"}, "b": {"model": "n"}}


def test_gpus_are_counted_in_words() -> None:
    with pytest.raises(UsageError, match=r"needs 3 GPUs: 2 references \+ 1 worker; the cluster has 2"):
        refuse_impossible(run(references=TWO), [{"CPU": 16, "GPU": 2}])


def test_fractions_are_counted() -> None:
    halves = {name: ref | {"resources": {"gpu": 0.5}} for name, ref in TWO.items()}
    refuse_impossible(run(references=halves), [{"CPU": 16, "GPU": 2}])
    with pytest.raises(UsageError, match=r"needs 3 GPUs: 2 references x 0.5 \+ 2 workers; the cluster has 2"):
        refuse_impossible(run(references=halves, workers=2), [{"CPU": 16, "GPU": 2}])


def test_precompute_lets_references_and_workers_take_turns() -> None:
    refuse_impossible(run(references=TWO, workers=2, mode="precompute"), [{"CPU": 16, "GPU": 2}])


def test_enough_in_total_but_on_no_node() -> None:
    wide = run(references={"a": {"model": "m", "resources": {"gpu": 4}}})
    with pytest.raises(UsageError, match=r"reference a needs .*4 GPU on one node"):
        refuse_impossible(wide, [{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}])


def test_custom_resources_count() -> None:
    pool = {"a": {"model": "m", "resources": {"gpu": 1, "custom": {"reference_pool": 1}}}}
    with pytest.raises(UsageError, match=r"needs 1 reference_pool: 1 reference; the cluster has 0"):
        refuse_impossible(run(references=pool), [{"CPU": 8, "GPU": 4}])


def test_a_laptop_with_two_cores_runs_two_workers_and_five_references() -> None:
    many = {f"r{i}": {"model": "m"} for i in range(5)}
    refuse_impossible(run(references=many, workers=2), [{"CPU": 2}])
    with pytest.raises(UsageError, match="CPUs"):
        refuse_impossible(run(references=many, workers=3), [{"CPU": 2}])


def test_a_reference_scored_in_process_needs_nothing() -> None:
    config = run(references={"a": {"model": "m"}})
    in_process = {"a": config.references.models["a"].model_copy(update={"model": "policy"})}
    references = config.references.model_copy(update={"models": in_process})
    refuse_impossible(config.model_copy(update={"references": references}), [{"CPU": 1, "GPU": 1}])


def test_references_on_cores_leave_the_gpus_to_those_who_need_them() -> None:
    on_cores = {"a": {"model": "m", "resources": {"cpu": 8, "gpu": 0}}}
    refuse_impossible(run(references=on_cores), [{"CPU": 8, "GPU": 1}, {"CPU": 8}])


HEAD = {"CPU": 8}
REFERENCES = {"CPU": 8, "GPU": 1, "polyref_reference": 1}
TRAINERS = {"CPU": 96, "GPU": 8, "polyref_trainer": 1}


def test_each_asks_for_the_nodes_of_its_role_where_there_are_any() -> None:
    config, kind = run(references=TWO, workers=8), ClusterProfile.from_nodes([HEAD, REFERENCES, TRAINERS])
    wanted = {
        need.role: need.bundle
        for need in list_reference_needs(config, kind) + list_worker_needs(config, kind)
    }
    assert wanted == {
        "reference a": {"CPU": 1, "GPU": 1, "polyref_reference": 0.001},
        "reference b": {"CPU": 1, "GPU": 1, "polyref_reference": 0.001},
        "worker": {"CPU": 1, "GPU": 1, "polyref_trainer": 0.001},
    }
    refuse_impossible(config, [HEAD, REFERENCES, REFERENCES, TRAINERS])


def test_room_on_nodes_of_another_role_does_not_count() -> None:
    with pytest.raises(UsageError, match=r"8 CPU; 8 CPU, 1 GPU \(polyref_reference\); 2 x 96 CPU, 8 GPU"):
        refuse_impossible(run(references=TWO, workers=8), [HEAD, REFERENCES, TRAINERS, TRAINERS])


def test_where_one_role_has_nodes_of_its_own_the_other_takes_what_comes() -> None:
    config = run(references=TWO, workers=8)
    bundle = list_worker_needs(config, ClusterProfile.from_nodes([HEAD, REFERENCES, {"CPU": 96, "GPU": 8}]))[
        0
    ].bundle
    assert bundle == {"CPU": 1, "GPU": 1}
