"""A run that begins on one day and is resumed on another reads the same tokens, or is refused."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.run import RunConfig, load_run
from orchestrator.driver import prepare, train
from orchestrator.driver.record import RunRecord, open_record, read_record
from orchestrator.errors import UsageError
from preferences.tokens import pair_files
from tests.support import tiny

DATED = "{{ strftime_now('%d %b %Y') }}\n" + tiny.CHATML
FIRST_DAY, NEXT_DAY = datetime.date(2026, 2, 28), datetime.date(2026, 3, 1)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    model, tokenizer = tiny.llama(), tiny.byte_tokenizer()
    tokenizer.chat_template = DATED
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    row = {
        "prompt": [{"role": "user", "content": "good?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    return load_run(
        {
            "name": "dated",
            "storage_path": str(tmp_path / "runs"),
            "policy": {"model": str(tmp_path / "model")},
            "loss": {"preset": "dpo"},
            "references": {"primary": "start", "models": {"start": {"model": str(tmp_path / "model")}}},
            "data": {"train": str(tmp_path / "pairs.jsonl")},
        }
    )


def begin(
    config: RunConfig, previous: RunRecord | None, folder: Path
) -> tuple[prepare.PreparedRun, RunRecord]:
    """Prepare a run and open its record, as `train` does."""
    prepared = prepare.prepare_run(config, previous)
    new = RunRecord(
        config=prepared.config.model_dump(mode="json"),
        device_type="cpu",
        identity=prepared.identity,
        pins=prepared.pins,
        counts=dict(prepared.counts),
    )
    return prepared, open_record(folder, new)


def set_date(monkeypatch: pytest.MonkeyPatch, date: datetime.date) -> None:
    monkeypatch.setattr(prepare, "_read_date", lambda: date)


def decode_prompt(prepared: prepare.PreparedRun) -> str:
    return str(prepared.policy.tokenizer.decode(prepared.train.policy[0].prompt))


def test_a_resumed_run_writes_the_day_on_which_it_began(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_date(monkeypatch, FIRST_DAY)
    first, record = begin(config, None, tmp_path)
    assert decode_prompt(first).startswith("28 Feb 2026\n")
    assert record.config["data"]["template_date"] == "2026-02-28"

    set_date(monkeypatch, NEXT_DAY)
    resumed, _ = begin(config, read_record(tmp_path), tmp_path)
    assert resumed.identity == first.identity
    assert decode_prompt(resumed) == decode_prompt(first)

    other = prepare.prepare_run(config)  # another run, which begins today
    assert decode_prompt(other).startswith("01 Mar 2026\n")
    assert other.identity["data"] == first.identity["data"]
    assert other.identity["policy"] == first.identity["policy"]
    assert other.identity["tokens"] != first.identity["tokens"]


def test_a_run_from_before_tokens_were_pinned_is_resumed_and_keeps_the_day_from_then_on(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_date(monkeypatch, FIRST_DAY)
    begin(config, None, tmp_path)
    old = json.loads((tmp_path / "run.json").read_text())
    del old["identity"]["tokens"], old["config"]["data"]["template_date"], old["sha256"]
    (tmp_path / "run.json").write_text(json.dumps(old))

    set_date(monkeypatch, NEXT_DAY)
    resumed, record = begin(config, read_record(tmp_path), tmp_path)
    assert record.identity == resumed.identity
    set_date(monkeypatch, NEXT_DAY + datetime.timedelta(days=1))
    again, _ = begin(config, read_record(tmp_path), tmp_path)
    assert again.identity == resumed.identity


def test_a_search_of_the_same_name_has_no_date_for_a_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_date(monkeypatch, FIRST_DAY)
    _, record = begin(config, None, tmp_path)
    record.config = {"name": "dated", "run": record.config, "search": {}}
    record.write(tmp_path)
    with pytest.raises(UsageError, match="was started with other settings"):
        begin(config, read_record(tmp_path), tmp_path)


def test_what_is_checked_and_scored_for_a_run_that_has_begun_has_its_date(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_date(monkeypatch, FIRST_DAY)
    begin(config, None, config.folder)
    set_date(monkeypatch, NEXT_DAY)
    seen: list[str] = []

    def stop_after_preparing(*arguments: Any) -> prepare.PreparedRun:
        prepared = prepare_and_report(*arguments)
        seen.append(decode_prompt(prepared)[:11])
        raise KeyboardInterrupt

    prepare_and_report = train.prepare_and_report
    monkeypatch.setattr(train, "prepare_and_report", stop_after_preparing)
    for command in (train.check_run, train.score_run, train.train_run):
        with pytest.raises(KeyboardInterrupt):
            command(config)
    with pytest.raises(KeyboardInterrupt):
        train.train_run(config, fresh=True)
    assert seen == ["28 Feb 2026"] * 3 + ["01 Mar 2026"]


def test_a_date_in_the_run_file_is_every_run_s(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config.data.model_copy(update={"template_date": FIRST_DAY})
    set_date(monkeypatch, NEXT_DAY)
    prepared = prepare.prepare_run(config.model_copy(update={"data": data}))
    assert decode_prompt(prepared).startswith("28 Feb 2026\n")


def test_other_tokens_under_an_equal_fingerprint_are_refused(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts and models are the same, and yet the policy reads other ids."""
    set_date(monkeypatch, FIRST_DAY)
    begin(config, None, tmp_path)
    real: Any = pair_files.tokenize_pairs

    def shift_ids(*arguments: Any, **settings: Any) -> Any:
        found = real(*arguments, **settings)
        for prompts, *_ in found.columns.values():
            prompts[0][0] += 1
        return found

    monkeypatch.setattr(pair_files, "tokenize_pairs", shift_ids)
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "cache"))  # of which the tokens of before are gone
    with pytest.raises(UsageError, match=r"other settings: tokens\.train, policy: "):
        begin(config, read_record(tmp_path), tmp_path)


def test_templates_without_a_date_leave_the_settings_alone(
    config: RunConfig, tiny_llama_folder: Path
) -> None:
    plain = config.model_copy(
        update={"policy": config.policy.model_copy(update={"model": str(tiny_llama_folder)})}
    )
    references = plain.references.model_copy(
        update={
            "models": {
                "start": plain.references.models["start"].model_copy(update={"model": str(tiny_llama_folder)})
            }
        }
    )
    prepared = prepare.prepare_run(plain.model_copy(update={"references": references}))
    assert prepared.config.data.template_date is None
