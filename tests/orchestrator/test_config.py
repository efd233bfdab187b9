"""The run file: what it refuses, in which words, and that reading it costs no heavy import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config.run import RunConfig, build_run_schema, load_run, parse_run
from orchestrator.errors import UsageError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("orchestrator/demo/*.yaml")])

RUN = {
    "name": "a-run",
    "policy": {"model": "some/model"},
    "references": {"primary": "base", "models": {"base": {"model": "some/model"}}},
    "data": {"train": "train.jsonl"},
    "loss": {"preset": "dpo"},
}


def changed(**sections: object) -> dict[str, object]:
    return RUN | sections


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_run_files_are_valid(path: Path) -> None:
    load_run(path)


def test_some_run_files_are_shipped() -> None:
    assert len(SHIPPED) >= 5


def test_overrides_reach_nested_fields_and_read_scientific_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(RUN))
    config = load_run(path, ["loss.beta=0.2", "training.learning_rate=1e-4", "parallel.workers=4"])
    assert (config.loss.beta, config.training.learning_rate, config.parallel.workers) == (0.2, 1e-4, 4)


def test_weights_by_name_follow_the_references_with_the_primary_first() -> None:
    models = {"movie": {"model": "m"}, "base": {"model": "b"}}
    loss = {"preset": "geometric_references", "references": {"weights": {"movie": 0.3, "base": 0.7}}}
    config = parse_run(changed(references={"primary": "base", "models": models}, loss=loss), source="run")
    assert config.references.ordered == ["base", "movie"]
    assert config.loss.references.weights == (0.7, 0.3)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"trainning": {}}, ["run.yaml: trainning", "unknown field", "did you mean 'training'"]),
        ({"training": {"learning_rte": 1}}, ["training.learning_rte", "did you mean 'learning_rate'"]),
        (
            {"references": {"primary": "base", "models": {"base": {"model": "m", "dtpe": "x"}}}},
            ["references.models.base.dtpe", "did you mean 'dtype'"],
        ),
        ({"loss": {"preset": "mallows_teta"}}, ["loss", "did you mean", "mallows_theta"]),
        ({"loss": {"preset": "dpo", "beta": -1}}, ["loss.beta", "must be > 0", "-1", "try 0.1"]),
        ({"loss": {"preset": "dpo", "bta": 1}}, ["loss", "bta", "beta"]),
        ({"training": {"epochs": 0}}, ["training.epochs", "greater than or equal to 1", "got 0"]),
        ({"training": {"precision": "fp8"}}, ["training.precision", "'bfloat16'", "fp8"]),
        ({"name": "../elsewhere"}, ["name", "../elsewhere"]),
        ({"policy": {}}, ["policy.model", "required"]),
        ({"references": {"primary": "bse", "models": {"base": {"model": "m"}}}}, ["did you mean 'base'"]),
        ({"references": {"models": {"base": {"model": "m"}}}}, ["primary must name", "base"]),
        ({"references": {}}, ["needs 1 reference", "simpo"]),
        (
            {"references": {"primary": "a", "models": {"a": {"model": "m"}, "b": {"model": "n"}}}},
            ["2 references", "combine is single", "harmonic"],
        ),
        (
            {"references": {"primary": "a", "models": {"a": {"model": "policy"}}}},
            ["model: policy", "policy.adapter"],
        ),
        (
            {"loss": {"preset": "geometric_references", "references": {"weights": {"bas": 1}}}},
            ["weights", "bas", "base"],
        ),
        ({"loss": {"preset": "mrpo"}}, ["needs 2 reference"]),
    ],
)
def test_a_refusal_names_file_field_and_remedy(sections: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_run(changed(**sections), source="run.yaml")
    for word in words:
        assert word in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\npolicy: {model: x\ndata: 3", ["run.yaml:", "not valid YAML"]),
        ("- a\n- b\n", ["is not a mapping of sections, as a run file"]),
    ],
)
def test_files_that_are_no_run_file(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_run(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_and_a_folder_and_a_bad_override(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        load_run(tmp_path)
    with pytest.raises(UsageError, match=r"loss.beta.*field.name=value"):
        load_run(write(tmp_path, json.dumps(RUN)), ["loss.beta"])


def test_the_schema_accepts_what_the_parser_accepts() -> None:
    schema = build_run_schema()
    assert "mallows_theta" in schema["$defs"]["LossConfig"]["properties"]["preset"]["enum"]
    assert set(schema["properties"]) == set(RunConfig.model_fields)


def test_reading_a_run_file_imports_neither_torch_nor_ray_nor_transformers() -> None:
    heavy = ("torch", "ray", "transformers", "mlflow")
    code = f"import sys, orchestrator.config.run; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_quantised_policy_is_not_cut() -> None:
    quantised = changed(policy={"model": "m", "adapter": {"r": 4}, "quantization": "4bit"})
    parse_run(quantised | {"parallel": {"strategy": "deepspeed"}}, source="run.yaml")
    for parallel in ({"strategy": "fsdp"}, {"strategy": "deepspeed", "zero_stage": 3}):
        with pytest.raises(UsageError, match=r"quantization 4bit packs weights.*set strategy: ddp"):
            parse_run(quantised | {"parallel": parallel}, source="run.yaml")


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"zero_stage": 3},
            r"parallel: .*zero_stage is DeepSpeed's, and strategy is ddp: set strategy: deepspeed",
        ),
        ({"offload": True}, r"parallel: .*offload needs sharded states: set strategy: fsdp or deepspeed"),
        ({"strategy": "zero"}, r"parallel.strategy: .*'ddp', 'fsdp' or 'deepspeed'"),
        ({"strategy": "deepspeed", "zero_stage": 4}, r"parallel.zero_stage: .*1, 2 or 3"),
    ],
)
def test_a_strategy_takes_its_own_settings_alone(parallel: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_run(changed(parallel=parallel), source="run.yaml")
