"""Named held-out sets: each has the metrics that it would have alone, and one of them judges."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from losses.presets import preset
from models.logprobs import Scorer
from models.parallel import prepare_parallel
from orchestrator.config.eval_sets import TAKEN_NAMES, make_set_names, refuse_set_names
from orchestrator.config.run import RunConfig, load_run
from orchestrator.config.sections import METRICS
from orchestrator.driver.finish import report_run
from orchestrator.driver.record import MAY_CHANGE, RunRecord, open_record
from orchestrator.errors import UsageError
from orchestrator.worker.eval_sets import SET_METRICS, EvaluationSets
from orchestrator.worker.metrics import MetricFlags, StepTable, compute_eval_metrics
from orchestrator.worker.result import WorkerResult
from orchestrator.worker.step import run_evaluation_pass
from preferences.split import TokenizedSplit
from tests.support import tiny
from tests.support.pair_batches import PAIRS, WEIGHTS, build_split, load_batches, take_rows

FLAGS = MetricFlags(has_soft_labels=True)
IN_DOMAIN, SAFETY = np.array([0, 1, 4, 5, 6]), np.array([2, 3])


def evaluate(split: TokenizedSplit) -> StepTable:
    scorer = Scorer(tiny.llama(num_hidden_layers=1).double())
    parallel = prepare_parallel(scorer, device=torch.device("cpu"), learning_rate=1e-3)
    batches = load_batches(split, np.arange(len(split)))
    table = StepTable(len(split), ["base"])
    loss = preset("dpo", soft_label={"type": "geometric"})
    return run_evaluation_pass(parallel, batches, loss=loss, table=table)


def split_of_sets(*names: str) -> TokenizedSplit:
    """Held-out pairs with weights, of two sets; those of the second have no soft labels."""
    split, index = build_split(WEIGHTS), np.zeros(PAIRS, dtype=np.int16)
    index[SAFETY] = 1
    split.soft_labels[SAFETY] = 1
    return replace(split, source_names=names, source_index=index)


def metrics_alone(split: TokenizedSplit, rows: Iterable[int]) -> dict[str, float]:
    return compute_eval_metrics(evaluate(take_rows(split, np.array(rows))), FLAGS)


@pytest.mark.parametrize(("judged", "rows"), [("in_domain", IN_DOMAIN), ("safety", SAFETY)])
def test_every_set_has_the_metrics_that_it_has_alone(judged: str, rows: np.ndarray) -> None:
    split = split_of_sets("in_domain", "safety")
    sets = EvaluationSets.of_split(split, judged)
    metrics = sets.compute_metrics(evaluate(split), FLAGS)
    by_set = {"in_domain": metrics_alone(split, IN_DOMAIN), "safety": metrics_alone(split, SAFETY)}
    expected = {
        f"eval/{name}/{metric}": alone[f"eval/{metric}"]
        for name, alone in by_set.items()
        for metric in SET_METRICS
        if name == "in_domain" or metric not in ("label_nll", "calibration_error")
    }
    assert metrics == pytest.approx(by_set[judged] | expected, rel=1e-6)
    assert sets.judged.tolist() == rows.tolist()
    assert by_set["in_domain"]["eval/loss"] != pytest.approx(by_set["safety"]["eval/loss"], rel=1e-2)


def test_a_held_out_mixture_is_judged_as_a_whole_and_measured_by_source() -> None:
    split = split_of_sets("films (2024)", "loss")
    metrics = EvaluationSets.of_split(split, None).compute_metrics(evaluate(split), FLAGS)
    assert metrics["eval/loss"] == pytest.approx(metrics_alone(split, range(PAIRS))["eval/loss"], rel=1e-6)
    assert metrics["eval/loss_set/loss"] == pytest.approx(metrics_alone(split, SAFETY)["eval/loss"], rel=1e-6)
    assert "eval/films__2024_/accuracy" in metrics


def test_one_source_has_no_metrics_of_its_own_but_one_named_set_has() -> None:
    split = replace(build_split(), source_names=("pairs",), source_index=np.zeros(PAIRS, dtype=np.int16))
    table = evaluate(split)
    plain = compute_eval_metrics(table, FLAGS)
    assert EvaluationSets.of_split(split, None).compute_metrics(table, FLAGS) == plain
    named = EvaluationSets.of_split(split, "pairs").compute_metrics(table, FLAGS)
    assert named == plain | {f"eval/pairs/{metric}": plain[f"eval/{metric}"] for metric in SET_METRICS}


def test_a_source_without_held_out_pairs_or_weight_has_no_metrics() -> None:
    split = split_of_sets("a", "b")
    assert split.source_index is not None
    split.source_index[:] = 0
    split.source_index[2] = 1  # of weight 0
    metrics = EvaluationSets.of_split(replace(split, source_names=("a", "b", "c")), None).compute_metrics(
        evaluate(split), FLAGS
    )
    assert {name.split("/")[1] for name in metrics if name.count("/") == 2} & {"a", "b", "c"} == {"a"}


# ------------------------------------------------------------ names


def test_no_set_can_be_named_as_a_metric_is() -> None:
    flags = MetricFlags(True, True, True, True)
    measured = {*compute_eval_metrics(evaluate(build_split()), flags), *METRICS}
    measured |= {"eval/kl/base", "eval/reward", "eval/samples/length"}  # of samples
    assert {name.split("/")[1] for name in measured} == TAKEN_NAMES


def test_names_of_sources_become_names_that_metrics_can_carry() -> None:
    sources = ["pairs", "my pairs", "my/pairs", "loss", "loss_set", "..", "", "é"]
    names = make_set_names(sources)
    assert names == ["pairs", "my_pairs", "my_pairs-2", "loss_set", "loss_set-2", ".._set", "_set", "_"]
    refuse_set_names(names)


# ------------------------------------------------------------ settings


def run_with(eval_: Any, **evaluation: Any) -> RunConfig:
    return load_run(
        {
            "name": "a-run",
            "policy": {"model": "some/model"},
            "data": {"train": "train.jsonl", "eval": eval_},
            "loss": {"preset": "simpo"},
            "evaluation": evaluation,
        }
    )


def test_the_first_set_judges_unless_another_is_named() -> None:
    sets = {"in_domain": "films.jsonl", "safety": "safety.jsonl"}
    assert run_with(sets).judged_set == "in_domain"
    assert run_with(sets, set="safety").judged_set == "safety"
    assert run_with("films.jsonl").judged_set is None


@pytest.mark.parametrize(
    ("eval_", "judged", "words"),
    [
        (
            {"in_domain": "f.jsonl", "safety": "s.jsonl"},
            "safty",
            "'safty', which is no set of data.eval; did",
        ),
        ("f.jsonl", "safety", "data.eval has no named sets: name them"),
        (None, "safety", "data.eval has no named sets"),
        ({"in domain": "f.jsonl"}, None, "'in domain', which no metric can carry: use letters"),
        ({"a/b": "f.jsonl"}, None, "'a/b', which no metric can carry"),
        ({"..": "f.jsonl"}, None, "'..', which no metric can carry"),
        ({"rewards": "f.jsonl"}, None, "eval/rewards is a metric: use another name, such as rewards_set"),
    ],
)
def test_sets_that_cannot_be_measured_are_refused(eval_: Any, judged: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=f".*{words}"):
        run_with(eval_, **({"set": judged} if judged else {}))


def test_a_run_is_not_resumed_by_another_set(tmp_path: Path) -> None:
    sets = {"in_domain": "films.jsonl", "safety": "safety.jsonl"}

    def record(**evaluation: Any) -> RunRecord:
        config = run_with(sets, **evaluation).model_dump(mode="json")
        return RunRecord(config=config, device_type="cpu", identity={"tokens": {}}, pins={}, counts={})

    open_record(tmp_path, record())
    open_record(tmp_path, record(metric="eval/loss", every_steps=3, keep="best"))
    with pytest.raises(UsageError, match=r"evaluation\.set: null -> \"safety\""):
        open_record(tmp_path, record(set="safety"))
    changeable = {
        field.removeprefix("evaluation.") for field in MAY_CHANGE if field.startswith("evaluation.")
    }
    assert changeable == set(RunConfig.model_fields["evaluation"].annotation.model_fields) - {"set"}


def test_a_run_ends_with_the_accuracy_of_each_set(tmp_path: Path) -> None:
    config = run_with({"in_domain": "films.jsonl", "safety": "safety.jsonl"})
    config = config.model_copy(update={"storage_path": str(tmp_path)})
    config.folder.mkdir()
    by_set = {"eval/in_domain/accuracy": 0.7149, "eval/in_domain/loss": 0.5, "eval/safety/accuracy": 0.64}
    metrics = {"eval/accuracy": 0.7149, "eval/rewards/accuracies": 0.7, **by_set}
    record = RunRecord(
        config={},
        device_type="cpu",
        identity={},
        pins={},
        counts={},
        result=WorkerResult(status="done", metrics=metrics),
    )
    console = Console(record=True, width=200)
    report_run(config, record, console)
    assert "accuracy by set: in_domain 0.71, safety 0.64\n" in console.export_text()
