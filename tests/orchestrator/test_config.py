"""The run file: what it refuses, in which words, and that reading it costs no heavy import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator.config.run import RunConfig, build_run_schema, load_run, parse_run
from orchestrator.config.yaml import apply_overrides, read_yaml
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
        ({"loss": {"preset": "aot"}}, ["loss", "sorted log-ratios of a whole batch"]),
        ({"loss": {"preset": "dpo", "label_smoothing": 0.1}}, ["'label_smoothing'", "robust_dpo", "cdpo"]),
        ({"training": {"per_device_train_batch_size": 4}}, ["training", "set training.pairs_per_step"]),
        ({"training": {"num_train_epochs": 4}}, ["set training.epochs"]),
        ({"policy": {"model": "a/b", "lora_r": 4}}, ["set policy.adapter.r"]),
        ({"output_dir": "x"}, ["set name and storage_path"]),
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


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:A_SECRET}",
        "run-${ oc.env :A_SECRET,none }",
        "${oc.env:${variable}}",
        "${${resolver}:A_SECRET}",
        "${a.${oc.env:A_SECRET}}",
        "\\${oc.env:A_SECRET}",
        "\\\\${oc.env:A_SECRET}",
        "${oc.decode:'1'}",
        "${oc.create:{a:1}}",
    ],
)
@pytest.mark.parametrize("place", ["file", "override", "list", "mapping"])
def test_values_are_not_taken_from_the_environment(
    value: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    helpers = {"variable": "A_SECRET", "resolver": "oc.env"}
    path = tmp_path / "run.yaml"
    content: dict[str, object] = {"policy": {"model": "m"}, **helpers}
    overrides = [f"policy.model={value}"] if place == "override" else []
    content |= {"file": {"policy": {"model": value}}, "list": {"policy": [{"model": value}]}}.get(place, {})
    path.write_text(yaml.safe_dump(content))
    mapping = {"policy": {"model": value}, **helpers}
    with pytest.raises(UsageError) as refused:
        apply_overrides(mapping, ()) if place == "mapping" else read_yaml(path, overrides)
    field = "policy[0].model: " if place == "list" else "policy.model: "
    assert str(refused.value).removeprefix(f"{path}: ").removeprefix("override ").startswith(field)
    assert "hunter2" not in str(refused.value)
    if value == "${oc.env:A_SECRET}":
        assert 'command line, policy.model="$A_SECRET"' in str(refused.value) or place == "list"
        assert "MLFLOW_TRACKING_PASSWORD" in str(refused.value)


def test_values_name_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: {b: [x, y]}\nname: '${a.b[1]}: ${.key}-{c: 1}'\nkey: b\nlink: https://x:1/$x\n")
    assert read_yaml(path, ["other=${a.${key}}"]) == {
        "a": {"b": ["x", "y"]},
        "name": "y: b-{c: 1}",
        "key": "b",
        "link": "https://x:1/$x",
        "other": ["x", "y"],
    }


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


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        ("sigmoid", "dpo"),
        ("sigmoid_norm", "dpo_length_normalized"),
        ("robust", "robust_dpo"),
        ("exo_pair", "exo"),
        ("nca_pair", "nca"),
        ("sppo_hard", "sppo"),
    ],
)
def test_losses_under_trls_names_are_ours(written: str, ours: str) -> None:
    run = load_run(changed(loss={"preset": written}))
    assert run.preset == ours
    assert run.loss == load_run(changed(loss={"preset": ours})).loss
    assert run.loss_notice == f"preset {written} is {ours} here"
    assert written in build_run_schema()["$defs"]["LossConfig"]["properties"]["preset"]["enum"]


def test_ipo_is_said_to_be_on_sums() -> None:
    notices = [
        load_run(changed(loss={"preset": n})).loss_notice for n in ("ipo", "ipo_length_normalized", "dpo")
    ]
    assert notices == [
        "ipo is on sums, as in the paper; TRL's divides by length: ipo_length_normalized",
        None,
        None,
    ]
