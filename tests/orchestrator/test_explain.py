"""`polyref explain`, other trainers' names, completion in shells, and the JSON Schemas that editors read."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from orchestrator.cli.explain import explain_field, list_run_overrides, list_sweep_overrides
from orchestrator.cli.main import run_command_line
from orchestrator.config.fields import ANY_NUMBER, FileField, list_fields
from orchestrator.config.other_trainers import BY_NAME, COUNTERPARTS
from orchestrator.config.run import build_run_schema, load_run, parse_run
from orchestrator.config.sweep import build_sweep_schema, load_sweep, parse_sweep
from orchestrator.errors import UsageError

ROOT = Path(__file__).parents[2]
RUN_FIELDS, SWEEP_FIELDS = list_fields(build_run_schema()), list_fields(build_sweep_schema())
RUN: dict[str, Any] = {
    "name": "a-run",
    "policy": {"model": "some/model", "adapter": {"r": 16}},
    "references": {"primary": "base", "models": {"base": {"model": "some/model"}}},
    "data": {"train": "train.jsonl", "eval_fraction": 0.1},
    "loss": {"preset": "dpo"},
}
SWEEP: dict[str, Any] = {"name": "a-sweep", "run": RUN, "spaces": ["optimizer"], "search": {"trials": 2}}


def explain(name: str | None) -> str:
    return "\n".join(explain_field(name))


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def ids(fields: list[FileField]) -> list[str]:
    return [f"{field.path}-{'-'.join(field.variants)}" for field in fields]


# ---------------------------------------------------------------- descriptions and examples


@pytest.mark.parametrize("field", [*RUN_FIELDS, *SWEEP_FIELDS], ids=ids([*RUN_FIELDS, *SWEEP_FIELDS]))
def test_every_field_has_a_description_of_its_own(field: FileField) -> None:
    assert len(field.description) > 5
    assert "\n" not in field.description
    assert not field.description.endswith(".")
    assert field.is_section or field.example is not None


@pytest.mark.parametrize("schema", [build_run_schema(), build_sweep_schema()], ids=["run", "sweep"])
def test_the_schemas_carry_the_descriptions(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    sections = {"": schema, **schema["$defs"]}
    lacking = [
        f"{section}.{name}"
        for section, definition in sections.items()
        for name, field in definition.get("properties", {}).items()
        if not field.get("description")
    ]
    assert lacking == []


def refusals_of(name: str, parse: Callable[[], object]) -> list[str]:
    """The lines of a refusal that are about a field of that name, and not about what it lacks beside it."""
    try:
        parse()
    except UsageError as error:
        lines = str(error).splitlines()
        about = [line for line in lines if line.split(": ")[1].rpartition(".")[2] == name]
        return [line for line in about if "is required and missing" not in line]
    return []


LEAVES = [field for field in RUN_FIELDS if field.example is not None]


@pytest.mark.parametrize("field", LEAVES, ids=ids(LEAVES))
def test_examples_of_run_files_are_read(field: FileField) -> None:
    content = yaml.safe_load(str(field.example_line))
    if field.path.startswith("data.train.N"):
        content["data"]["train"][0].setdefault("source", "some.jsonl")
    merged = dict(RUN)
    for section, value in content.items():
        both = isinstance(value, dict) and isinstance(merged.get(section), dict)
        merged[section] = {**merged[section], **value} if both else value
    assert refusals_of(field.name, lambda: parse_run(merged, source="run")) == []


SWEEP_LEAVES = [f for f in SWEEP_FIELDS if f.example is not None and f.name not in ("run", "space")]


@pytest.mark.parametrize("field", SWEEP_LEAVES, ids=ids(SWEEP_LEAVES))
def test_examples_of_sweep_files_are_read(field: FileField) -> None:
    content = yaml.safe_load(str(field.example_line))
    merged = {key: {**SWEEP[key], **content[key]} if key == "search" else content[key] for key in content}
    assert refusals_of(field.name, lambda: parse_sweep({**SWEEP, **merged}, source="sweep")) == []


def shipped(kind: str) -> list[Path]:
    return sorted((ROOT / "configs").glob("*.yaml" if kind == "run" else "sweeps/*.yaml"))


@pytest.mark.parametrize("path", [*shipped("run"), *shipped("sweep")], ids=lambda path: path.name)
def test_the_schema_accepts_the_shipped_files(path: Path) -> None:
    schema = build_sweep_schema() if path.parent.name == "sweeps" else build_run_schema()
    Draft202012Validator(schema).validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"train": {"source": "a.jsonl"}}},
        {"data": {"train": ["a.jsonl", {"source": "b.jsonl", "cap": 3}], "ignore": "scores_*"}},
        {"data": {"train": "a.jsonl", "eval": {"safety": "b.jsonl"}}},
        {
            "data": {
                "train": "a.jsonl",
                "pair": ["a", "b"],
                "label": {"type": "winner", "column": "w", "first": "a", "second": ["b", 2]},
            }
        },
        {"loss": {"preset": "ropo", "link": {"alpha": 5}}},
        {"loss": {"preset": "geometric_references", "references": {"weights": {"base": 1}}}},
        {"loss": {"preset": "mallows_theta", "dispersion": {"phi_star": "auto"}}},
    ],
    ids=str,
)
def test_what_the_parser_reads_the_schema_accepts(sections: dict[str, Any]) -> None:
    content = {**RUN, **sections}
    parse_run(content, source="run")
    Draft202012Validator(build_run_schema()).validate(content)


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"pairs_per_step": 0}},
        {"training": {"pairs": 1}},
        {"loss": {"preset": "dpoo"}},
        {"loss": {"link": {"type": "ropo", "alpha": -1}}},
        {"data": {"train": "a.jsonl", "eval_fraction": 1}},
    ],
    ids=str,
)
def test_what_the_parser_refuses_the_schema_refuses(sections: dict[str, Any]) -> None:
    content = {**RUN, **sections}
    with pytest.raises(UsageError):
        parse_run(content, source="run")
    assert not Draft202012Validator(build_run_schema()).is_valid(content)


@pytest.mark.parametrize(
    "objective", ["eval/accuracy", ["eval/accuracy"], {"metric": "eval/margin"}], ids=str
)
def test_the_schema_accepts_objectives_as_they_are_written(objective: object) -> None:
    content = {**SWEEP, "objective": objective}
    load_sweep(content)
    Draft202012Validator(build_sweep_schema()).validate(content)


# ---------------------------------------------------------------- explain


def test_a_field_is_explained_with_type_limits_default_and_example() -> None:
    assert explain("training.pairs_per_step").splitlines() == [
        "training.pairs_per_step, a field of the run file",
        "  Pairs of one optimizer step over all workers. The last step of an epoch may be",
        "  smaller; no pair is dropped.",
        "  type      whole number",
        "  limits    1 or more",
        "  default   64",
        "  example   training: {pairs_per_step: 64}",
        "  override  training.pairs_per_step=64",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss.beta", ["limits    above 0", "default   0.1"]),
        ("training.warmup", ["0 or more, below 1"]),
        ("training.learning_rate", ["default   5.0e-6"]),
        ("policy.model", ["default   required"]),
        ("policy.dtype", ["auto, float32, bfloat16, float16"]),
        ("references.models.large.dtype", ["references.models.NAME.dtype"]),
        ("references.models.large", ["references.models, a field", "fields of references.models.NAME"]),
        ("data.train[0]", ["data.train, a field", "fields of data.train.N"]),
        ("data.train[0].share", ["data.train.N.share", "example   data: {train: [{share: 0.5}]}"]),
        ("loss.link.alpha", ["with type ropo", "loss: {link: {type: ropo, alpha: 14}}"]),
        ("data.label.column", ["with type strength", "with type raters", "with type winner"]),
        ("pairs_per_step", ["training.pairs_per_step, a field"]),
        ("search.trials", ["a field of the sweep file", "whole number or null"]),
        ("scheduler.grace_steps", ["with type asha"]),
        ("run.training.epochs", ["training.epochs, a field of the run file"]),
        ("space.loss.beta", ["loss.beta, a field of the run file"]),
        ("seed", ["training.seed, a field of the run file", "search.seed, a field of the sweep file"]),
        ("storage_path", ["override  storage_path=s3://bucket/runs"]),
        ("policy.adapter.target_modules", ["override  'policy.adapter.target_modules=[q_proj, v_proj]'"]),
        ("loss.preset", ["mallows_theta", "sigmoid is dpo"]),
    ],
)
def test_names_find_their_field(name: str, words: list[str]) -> None:
    for word in words:
        assert word in explain(name)


def test_a_section_lists_its_fields() -> None:
    text = explain("training")
    named = re.findall(r"^  (\w+) {2,}", text, re.MULTILINE)
    assert named == [*build_run_schema()["$defs"]["TrainingConfig"]["properties"]]


def test_without_a_name_both_files_are_listed() -> None:
    text = explain(None)
    run, _, sweep = text.partition("The sweep file")
    assert [*re.findall(r"^  (\w+) {2,}", run, re.MULTILINE)] == [*build_run_schema()["properties"]]
    assert [*re.findall(r"^  (\w+) {2,}", sweep, re.MULTILINE)] == [*build_sweep_schema()["properties"]]


def test_explanations_fit_a_terminal_of_80_columns() -> None:
    names = [None, *BY_NAME, *(field.path for field in (*RUN_FIELDS, *SWEEP_FIELDS))]
    for name in names:
        for line in explain_field(name):
            words = line.split()
            assert len(line) <= 80 or len(words[-1]) > 50 or "override" in words[0], line


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("training.pairs_per_stp", "training.pairs_per_step"),
        ("lerning_rate", "learning_rate"),
        ("per_device_batch_size", "per_device_train_batch_size"),
        ("serch.trials", "search.trials"),
        ("zzzzzz", "polyref explain lists"),
    ],
)
def test_a_wrong_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError) as refusal:
        explain(name)
    assert near in str(refusal.value)


def test_the_command_prints_and_exits_with_2_for_a_wrong_name() -> None:
    done = python("-m", "polyref", "explain", "training.epochs")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("training.epochs, a field of the run file\n")
    wrong = python("-m", "polyref", "explain", "training.epoch")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith(
        "polyref: there is no field 'training.epoch'; the nearest are training.epochs"
    )
    assert "Traceback" not in wrong.stderr


def test_explaining_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from orchestrator.cli.main import app\n"
        "app(['explain', 'training.epochs'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'mlflow') if m in sys.modules])"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done


# ---------------------------------------------------------------- other trainers

ANSWERS = {
    "per_device_train_batch_size": "training.pairs_per_step",
    "gradient_accumulation_steps": "training.pairs_per_step",
    "train_global_batch_size": "training.pairs_per_step",
    "micro_train_batch_size": "training.tokens_per_microbatch",
    "learning_rate": "training.learning_rate",
    "lora_r": "policy.adapter.r",
    "lora_rank": "policy.adapter.r",
    "lora_alpha": "policy.adapter.alpha",
    "lora_target": "policy.adapter.target_modules",
    "cutoff_len": "data.max_length",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "beta": "loss.beta",
    "pref_beta": "loss.beta",
    "rl_beta": "loss.beta",
    "reference_policy_kl_penalty": "loss.beta",
    "loss_type": "loss.preset",
    "pref_loss": "loss.preset",
    "num_train_epochs": "training.epochs",
    "max_num_epochs": "training.epochs",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "lr_scheduler_type": "training.schedule",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "output_dir": "storage_path",
    "model_name_or_path": "policy.model",
    "base_model": "policy.model",
    "pretrain": "policy.model",
    "ref_model": "references.models",
    "ref_pretrain": "references.models",
    "dataset": "data.train",
    "dataset_path": "data.train",
    "eval_steps": "evaluation.every_steps",
    "val_period": "evaluation.every_steps",
    "save_steps": "training.save_every",
    "logging_steps": "every step is logged",
    "seed": "training.seed",
    "load_in_4bit": "policy.quantization",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "deepspeed": "parallel.strategy",
    "fsdp": "parallel.strategy",
    "zero_stage": "parallel.zero_stage",
    "flash_attention": "policy.attention",
    "attn_implementation": "policy.attention",
    "label_smoothing": "loss.link.flip_probability",
    "report_to": "tracking.uri",
    "push_to_hub": "tracking.registered_model",
    "rpo_alpha": "loss.sft_weight",
    "pref_ftx": "loss.sft_weight",
    "sft_loss_weight": "loss.sft_weight",
}


@pytest.mark.parametrize(("theirs", "ours"), ANSWERS.items())
def test_other_trainers_names_are_answered_with_ours(theirs: str, ours: str) -> None:
    with pytest.raises(UsageError) as refusal:
        load_run({**RUN, theirs: 1})
    assert f"run: {theirs}: unknown field; " in str(refusal.value)
    assert ours in str(refusal.value)
    assert ours in explain(theirs)


FILES = {
    "LLaMA-Factory": """
        model_name_or_path: a/model
        trust_remote_code: true
        stage: dpo
        do_train: true
        finetuning_type: lora
        lora_rank: 8
        lora_target: all
        pref_beta: 0.1
        pref_loss: sigmoid
        dataset: some_pairs
        template: llama3
        cutoff_len: 2048
        max_samples: 1000
        overwrite_cache: true
        preprocessing_num_workers: 16
        output_dir: saves
        logging_steps: 10
        save_steps: 500
        overwrite_output_dir: true
        report_to: none
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 8
        learning_rate: 5.0e-6
        num_train_epochs: 3.0
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        bf16: true
        resume_from_checkpoint: null
        val_size: 0.1
        per_device_eval_batch_size: 1
        eval_strategy: steps
        eval_steps: 500
    """,
    "Axolotl": """
        base_model: a/model
        load_in_4bit: true
        rl: dpo
        rl_beta: 0.1
        datasets: [{path: some/pairs}]
        val_set_size: 0.1
        sequence_len: 2048
        sample_packing: false
        lora_r: 8
        lora_alpha: 16
        lora_dropout: 0.05
        lora_target_linear: true
        micro_batch_size: 2
        gradient_accumulation_steps: 4
        num_epochs: 1
        optimizer: adamw_torch
        lr_scheduler: cosine
        learning_rate: 0.0002
        flash_attention: true
        warmup_steps: 10
        weight_decay: 0.0
        wandb_project: mine
    """,
    "OpenRLHF": """
        pretrain: a/model
        ref_pretrain: a/model
        dataset: some/pairs
        dataset_probs: "1.0"
        chosen_key: chosen
        rejected_key: rejected
        apply_chat_template: true
        max_len: 2048
        micro_train_batch_size: 1
        train_batch_size: 128
        max_epochs: 1
        learning_rate: 5.0e-7
        beta: 0.1
        zero_stage: 3
        adam_offload: true
        flash_attn: true
        l2: 0.0
        max_norm: 1.0
        save_path: out
        use_wandb: "true"
    """,
    "NeMo-RL": """
        dpo: {max_num_steps: 150}
        checkpointing: {save_period: 50}
        logger: {log_dir: logs}
        cluster: {num_nodes: 1}
    """,
}


@pytest.mark.parametrize("trainer", FILES)
def test_a_file_of_another_trainer_gets_a_remedy_for_each_line(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(FILES[trainer])
    monkeypatch.chdir(tmp_path)
    Path("theirs.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", ["polyref", "check", "theirs.yaml"])
    with pytest.raises(SystemExit) as left:
        run_command_line()
    assert left.value.code == 2
    refusal = capsys.readouterr().err
    for name in content:
        assert re.search(rf": {name}: unknown field; (set|leave it out)", refusal), name
    assert "more; correct these first" not in refusal


def test_very_many_problems_are_cut_at_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(yaml.safe_dump({f"field{n}": n for n in range(100)}))
    monkeypatch.setattr(sys, "argv", ["polyref", "check", "wrong.yaml"])
    with pytest.raises(SystemExit):
        run_command_line()
    *lines, last = capsys.readouterr().err.splitlines()
    assert all(line.removeprefix("polyref: ").startswith("wrong.yaml: ") for line in lines)
    assert last == f"and {104 - len(lines)} more; correct these first"
    assert lines[-1].endswith("storage_path")


def test_the_step_is_said_to_be_of_all_workers() -> None:
    for text in (explain("per_device_train_batch_size"), BY_NAME["per_device_train_batch_size"].remark):
        assert "whole step, over all workers" in text


def test_the_table_names_our_fields_and_each_of_theirs_once() -> None:
    ours = {field.path for field in RUN_FIELDS}
    named = [field for counterpart in COUNTERPARTS for field in counterpart.fields]
    assert set(named) <= ours
    theirs = [name for counterpart in COUNTERPARTS for name in counterpart.names]
    assert len(theirs) == len(set(theirs)) > 150
    assert all(counterpart.fields or counterpart.remark for counterpart in COUNTERPARTS)


def test_the_table_has_trls_own_settings() -> None:
    from trl import DPOConfig, ModelConfig

    own = {*DPOConfig.__annotations__, *ModelConfig.__annotations__} - {"_VALID_DICT_FIELDS"}
    without_counterpart = {
        *("bnb_4bit_quant_storage", "bnb_4bit_quant_type", "use_bnb_nested_quant"),
        *("lora_modules_to_save", "lora_target_parameters", "lora_task_type"),
        *("f_alpha_divergence_coef", "f_divergence_type", "ld_alpha", "use_weighting"),
        *("model_init_kwargs", "pad_to_multiple_of", "pad_token"),
    }
    assert own - set(BY_NAME) == without_counterpart


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ({**RUN, "workers": 2}, "run: workers: unknown field; set parallel.workers"),
        (
            {**RUN, "training": {"keep_last": 1, "alias": "x"}},
            "run: training.alias: unknown field; set tracking.alias",
        ),
        ({**RUN, "training": {"epoch": 1}}, "training.epoch: unknown field; did you mean 'epochs'?"),
    ],
    ids=str,
)
def test_a_field_in_the_wrong_section_is_sent_to_its_own(content: dict[str, Any], answer: str) -> None:
    with pytest.raises(UsageError) as refusal:
        load_run(content)
    assert answer in str(refusal.value)


def test_a_sweep_answers_with_its_own_field_first() -> None:
    for wrong, answer in (
        ("seed", "set search.seed"),
        ("lora_rank", "in the run file, set policy.adapter.r"),
    ):
        with pytest.raises(UsageError) as refusal:
            load_sweep({**SWEEP, wrong: 1})
        assert answer in str(refusal.value)


# ---------------------------------------------------------------- completion


def complete(shell: str, line: str) -> list[str]:
    """What a shell's completion gets for the last word of a line."""
    if shell == "bash":
        asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    else:
        asked = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = python("-m", "polyref", _POLYREF_COMPLETE=f"complete_{shell}", **asked)
    assert done.stderr == "", done.stderr
    return re.findall(r'"([^"]+)"', done.stdout) if shell == "zsh" else done.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_fields(shell: str) -> None:
    assert complete(shell, "polyref explain training.pairs") == ["training.pairs_per_step"]


def test_overrides_are_completed_with_their_defaults() -> None:
    assert list_run_overrides("loss.bet") == ["loss.beta=0.1"]
    assert list_run_overrides("data.col") == ["data.columns="]
    assert list_sweep_overrides("search.tri") == ["search.trials=null"]
    assert list_sweep_overrides("run.training.ep") == ["run.training.epochs=1"]
    assert "run.name=" in list_sweep_overrides("")
    for override in list_run_overrides(""):
        path = override.partition("=")[0]
        assert path in {field.path for field in RUN_FIELDS}


def test_bash_completes_with_the_script_that_is_printed(tmp_path: Path) -> None:
    command = tmp_path / "polyref"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m polyref "$@"\n')
    command.chmod(0o755)
    script = python(
        "-m", "polyref", "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )
    # What bash sets when Tab is pressed after `polyref init sweeps/p`.
    asked = "COMP_WORDS=(polyref init sweeps/p) COMP_CWORD=2; _polyref_completion polyref; echo $COMPREPLY"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"{script.stdout}\n{asked}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert (done.stdout, done.stderr) == ("sweeps/pbt\n", "")


def test_schema_prints_the_descriptions() -> None:
    done = python("-m", "polyref", "schema", "run")
    steps = json.loads(done.stdout)["$defs"]["TrainingConfig"]["properties"]["pairs_per_step"]
    assert steps["description"].startswith("pairs of one optimizer step over all workers")
    assert ANY_NUMBER not in done.stdout.split()
