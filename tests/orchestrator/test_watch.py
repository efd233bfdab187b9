"""The numerical watch: each rule where it speaks and where it does not, and a finding's way to the user."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console

from losses.preference import preference_loss
from losses.presets import preset
from losses.scores import PairScores, ReferenceScores
from models.config import ModelConfig
from orchestrator.driver.record import read_record
from orchestrator.driver.train import score_run, train_run
from orchestrator.errors import RunFailed
from orchestrator.references.tolerance import SLACK_TOKENS, allow_difference, choose_tolerance
from orchestrator.tracking.follow import follow_steps
from orchestrator.tracking.metrics_file import read_metrics
from orchestrator.worker.metrics import StepTable
from orchestrator.worker.watch import (
    NumericalWatch,
    find_displacement,
    find_non_finite,
    find_unequal_start,
    find_wrong_tokens,
)


def place(slot: int) -> str:
    return f"pairs.jsonl:{slot + 1}"


def table_of(chosen: list[float], rejected: list[float], *, tokens: int = 10) -> StepTable:
    """Pairs whose policy differs from the references by so many nats; both give -2 nats per token."""
    count = len(chosen)
    lengths = torch.full((count,), tokens)
    base = torch.full((count,), -2.0 * tokens, dtype=torch.float64)
    half = torch.full((count,), 0.5, dtype=torch.float64)
    reference = ReferenceScores(base, base, lengths, lengths, half, half)
    moved = [base + torch.tensor(change, dtype=torch.float64) for change in (chosen, rejected)]
    policy = PairScores(*moved, lengths, lengths)
    output = preference_loss(policy, [reference], config=preset("dpo"))
    table = StepTable(count, ["base", "other"])
    labels = torch.ones(count, dtype=torch.float64)
    slots = torch.arange(count)
    references = [reference, reference]
    weights = torch.zeros(count, 2, dtype=torch.float64)
    output = type(output)(**{**vars(output), "weights": weights})
    table.record_pairs(slots, policy, references, output, entropy=half, soft_labels=labels)
    return table


# ------------------------------------------------------------ the start


@pytest.mark.parametrize("name", ["base", "other"])
def test_a_policy_that_is_its_reference_must_start_at_it(name: str) -> None:
    within = 0.9 * 1e-3 * (20 + SLACK_TOKENS)
    assert find_unequal_start(table_of([0, within], [0, 0]), name, 1e-3, place) is None
    found = find_unequal_start(table_of([0, 0, 3.5], [0, 0, 0]), name, 1e-3, place)
    assert found is not None
    assert f"reference {name!r}" in found
    assert "3.5 nats over 20 tokens at pairs.jsonl:3" in found
    assert "1 of 3 pairs" in found
    assert "--audit" in found


def test_errors_of_both_responses_do_not_cancel() -> None:
    assert find_unequal_start(table_of([2.0], [-2.0]), "base", 1e-3, place) is not None
    assert find_unequal_start(table_of([2.0], [2.0]), "base", 1e-3, place) is not None


def test_a_start_that_is_not_a_number_is_no_start() -> None:
    assert "nan nats" in str(find_unequal_start(table_of([math.nan], [0]), "base", 1e-3, place))


def test_sixteen_bits_are_allowed_more() -> None:
    half = choose_tolerance(ModelConfig(model="m", dtype="bfloat16"), "cpu")
    packed = choose_tolerance(ModelConfig(model="m", quantization="8bit"), "cpu")
    exact = choose_tolerance(ModelConfig(model="m"), "cpu")
    assert half == packed == choose_tolerance(ModelConfig(model="m"), "cuda") == 50 * exact
    assert find_unequal_start(table_of([0.5], [0]), "base", half, place) is None
    assert find_unequal_start(table_of([0.5], [0]), "base", exact, place) is not None
    assert allow_difference(half, 100) == pytest.approx(0.05 * 116)


# ------------------------------------------------------------ the references' tokens


def test_a_reference_that_expects_other_tokens_reads_wrong_ids() -> None:
    assert find_wrong_tokens("base", -2.8, 2.5) is None
    assert find_wrong_tokens("base", -6.7, 4.4) is None, "random weights"
    assert find_wrong_tokens("base", -9.0, 6.0) is None, "hard text"
    found = find_wrong_tokens("base", -11.2, 6.0)
    assert found is not None
    assert "reference 'base'" in found
    assert "-11.20 nats on average, where its own entropy lets it expect -6.00" in found
    assert "references.models.base" in found


def test_log_probs_and_entropies_per_token_count_both_responses() -> None:
    table = table_of([0, 0], [0, 0], tokens=7)
    assert table["logp_per_token/other"].tolist() == [-2.0, -2.0]
    assert table["entropy/other"].tolist() == [0.5, 0.5]


# ------------------------------------------------------------ displacement


def evaluation(chosen: float, margin: float) -> dict[str, float]:
    return {
        "step": 0,
        "eval/logps/chosen": chosen,
        "eval/margin": margin,
        "eval/rewards/margins": margin / 10,
    }


@pytest.mark.parametrize(
    ("chosen", "margin", "fires"),
    [(-25.0, 2.0, True), (-20.5, 2.0, False), (-25.0, -1.0, False), (-15.0, 2.0, False)],
    ids=["falls while margins rise", "falls a little", "falls with margins", "rises"],
)
def test_chosen_responses_that_fall_while_margins_rise(chosen: float, margin: float, fires: bool) -> None:
    found = find_displacement(evaluation(-20.0, 0.0), 50, evaluation(chosen, margin), 10.0)
    assert (found is not None) == fires
    if found is not None:
        assert "step 50" in found
        assert "from -20 to -25 (0.5 nats per token), and eval/margin rose from 0 to 2" in found
        for remedy in ("loss.sft_weight", "training.learning_rate", "loss.beta"):
            assert remedy in found


def test_supervised_rows_have_no_displacement() -> None:
    first, now = ({"step": 0, "eval/logps/chosen": value} for value in (-20.0, -40.0))
    assert find_displacement(first, 50, now, 10.0) is None


# ------------------------------------------------------------ what is not finite


def test_metrics_that_are_not_finite_name_their_pairs() -> None:
    table = table_of([0] * 8, [0] * 8)
    fine = {"entropy": 0.5, "rewards/chosen": 0.0}
    assert find_non_finite(3, fine, table, place) is None
    table["entropy"][1:] = math.nan
    found = find_non_finite(3, fine | {"entropy": math.nan}, table, place)
    assert found is not None
    assert found.startswith("step 3: entropy not finite, at pairs.jsonl:2, ")
    assert "and 2 more: look at these rows" in found


def test_samples_that_are_not_finite_belong_to_no_pair() -> None:
    found = find_non_finite(0, {"eval/reward": math.inf}, table_of([0], [0]), place)
    assert "eval/reward not finite, but in no pair: look at the samples" in str(found)


# ------------------------------------------------------------ the watch


def watch_of(heard: list[tuple[int, str, str]], **settings: Any) -> NumericalWatch:
    made: dict[str, Any] = {
        "initial_reference": "base",
        "tolerance": 1e-3,
        "vocabulary_sizes": {"base": 1000, "other": 1000},
    }
    return NumericalWatch(report=lambda *finding: heard.append(finding), **(made | settings))


def test_each_finding_is_reported_once_with_its_step() -> None:
    heard: list[tuple[int, str, str]] = []
    watch = watch_of(heard)
    off, metrics = table_of([4.0], [0]), {"entropy": math.nan}
    off["logp_per_token/base"][:] = -12.0
    watch.check_evaluation(0, off, evaluation(-20.0, 0.0), place)
    watch.check_training_step(1, off, metrics, place)
    watch.check_training_step(2, off, metrics, place)
    for step in (10, 20):
        watch.check_evaluation(step, off, evaluation(-40.0, 1.0), place)
    assert [(step, name) for step, name, _ in heard] == [
        (0, "tokens.base"),
        (1, "start"),
        (1, "not_finite.train"),
        (10, "displacement"),
    ]


def test_displacement_is_per_token_of_the_judged_pairs() -> None:
    heard: list[tuple[int, str, str]] = []
    watch, table = watch_of(heard, first_evaluation=evaluation(-20.0, 0.0)), table_of([0, 0], [0, 0])
    table["chosen_length"][:] = torch.tensor([4000, 10])
    watch.check_evaluation(10, table, evaluation(-40.0, 1.0), place)
    assert heard == []
    watch.check_evaluation(20, table, evaluation(-40.0, 1.0), place, judged=table.select(torch.tensor([1])))
    assert [name for _, name, _ in heard] == ["displacement"]


def test_only_the_first_step_is_taken_before_an_update() -> None:
    heard: list[tuple[int, str, str]] = []
    watch_of(heard).check_training_step(2, table_of([4.0], [0]), {}, place)
    watch_of(heard, initial_reference=None, vocabulary_sizes={}).check_training_step(
        1, table_of([4.0], [0]), {}, place
    )
    assert heard == []


def test_a_resumed_run_repeats_no_finding_and_compares_with_its_first_evaluation() -> None:
    heard: list[tuple[int, str, str]] = []
    watch = watch_of(heard, known={"start"}, first_evaluation=evaluation(-20.0, 0.0))
    watch.check_training_step(1, table_of([4.0], [0]), {}, place)
    watch.check_evaluation(10, table_of([0], [0]), evaluation(-40.0, 1.0), place)
    assert [name for _, name, _ in heard] == ["displacement"]


# ------------------------------------------------------------ a finding's way


def test_the_console_shows_a_finding_when_it_comes_and_not_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(message: str) -> None:
        line = {"step": 1, "time": 0.0, "finding": message.split()[-1], "message": message}
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    write("step 1: found before")
    for message in ("step 1: found now", "step 1: found later"):
        with follow_steps(tmp_path, 2, 8, Console(width=200)):
            write(message)
        shown = capsys.readouterr().out
        assert [line for line in shown.splitlines() if "watch" in line] == [f"watch: {message}"]


def spoil_scores(folder: Path, nats: float) -> None:
    """Change all stored log-probs of a reference, in files whose names are no digests."""
    for number, path in enumerate(sorted(folder.glob("*.parquet"))):
        table = pq.read_table(path)
        path.unlink()
        index = table.schema.get_field_index("logp")
        changed = table.set_column(index, table.schema.field(index), pc.add(table["logp"], nats))
        pq.write_table(changed, folder / f"{number}.parquet")


@pytest.mark.usefixtures("cluster")
def test_wrong_scores_are_found_by_an_audit_and_by_the_watch(
    run_of: Any, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = {"primary": "base", "models": {"base": {"model": str(tiny_llama_folder)}}}
    training = {"max_steps": 3, "learning_rate": 1e-4}
    run = run_of("run", loss={"preset": "dpo"}, references=references, training=training)
    score_run(run)
    score_run(run, audit=10)
    assert "audit: reference 'base': 0 of 10 stored scores differ" in capsys.readouterr().out

    (scores,) = (run.folder.parent / "scores").iterdir()
    spoil_scores(scores, -200.0)
    audited = run.references.model_copy(update={"audit": 5})
    with pytest.raises(RunFailed, match=rf"'base' \(5 of 5, scores/{scores.name}\); delete"):
        train_run(run.model_copy(update={"references": audited}))
    out = capsys.readouterr().out
    assert "audit: reference 'base', " in out
    assert "pairs.jsonl:" in out
    assert not read_metrics(run.folder), "nothing was trained"
    assert "delete these folders" in tags_of(run, read_record(run.folder).mlflow_run)["failure"]

    record = train_run(run)
    out = capsys.readouterr().out
    findings = record.training_result.findings
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["finding"]) for line in lines if "finding" in line] == [
        (0, "tokens.base"),
        (1, "start"),
    ]
    assert [*findings] == ["tokens.base", "start"]
    assert findings["start"].startswith("step 1: the policy starts as reference 'base'")
    tags = tags_of(run, record.mlflow_run)
    for name, message in findings.items():
        assert out.count(f"watch: {message}") == 2, "when it is found, and at the end"
        assert tags[f"watch.{name}"] == message
    assert read_record(run.folder).result.findings == findings
    train_run(run)
    assert capsys.readouterr().out.count("watch: ") == 2


def tags_of(run: Any, mlflow_run: str) -> dict[str, str]:
    client = MlflowClient(f"sqlite:///{run.folder.parent}/mlflow.db")
    return dict(client.get_run(mlflow_run).data.tags)
