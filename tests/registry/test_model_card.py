"""The model card: valid for hubs by their own library, and true to what was trained."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from losses.presets import PRESETS
from orchestrator.errors import UsageError
from orchestrator.registry.license import License, read_cached_license, read_license
from orchestrator.registry.lineage import DataSource, Lineage, parse_lineage
from orchestrator.registry.model_card import HubTarget, render_model_card
from tests.support.policies import lineage

SOURCES = (
    DataSource(
        "trl-lib/ultrafeedback_binarized", is_on_hub=True, used_for="training", license=License(("mit",))
    ),
    DataSource("votes.jsonl", is_on_hub=False, used_for="training"),
    DataSource("trl-lib/ultrafeedback_binarized", is_on_hub=True, used_for="evaluation"),
)
AFTER = {
    "eval/accuracy": 0.75,
    "eval/accuracy_interval": 0.0312,
    "eval/in_domain/accuracy": 0.75,
    "eval/safety/accuracy": 0.625,
    "eval/loss": 0.43,
    "eval/rewards/margins": 1.5,
    "eval/label_nll": None,
}


def read_card(lineage: Lineage, *, adapter: bool = False, hub: HubTarget | None = None) -> ModelCard:
    card = render_model_card("films", lineage, adapter=adapter, hub=hub)
    return ModelCard(card)


def supervised(**changes: object) -> Lineage:
    loss = PRESETS["sft"].model_dump(mode="json")
    return lineage(preset="sft", loss=loss, references={}, primary=None, judged_set=None, **changes)


def test_the_metadata_is_what_the_hubs_library_reads_back(tmp_path: Path) -> None:
    card = read_card(
        lineage(after=AFTER, base_license=License(("apache-2.0",)), data_sources=SOURCES), adapter=True
    )
    card.save(tmp_path / "README.md")
    assert metadata_load(tmp_path / "README.md") == yaml.safe_load(str(card).split("---\n")[1])
    data = card.data
    assert (data.base_model, data.license, data.library_name) == ("tiny/base", "apache-2.0", "transformers")
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["trl-lib/ultrafeedback_binarized"]
    assert data.tags == ["polyref", "preference-optimization", "mallows_theta", "lora"]
    assert data.model_name == "films"
    results = {(r.dataset_name, r.metric_type): (r.metric_value, r.metric_name) for r in data.eval_results}
    assert results == {
        ("in_domain", "accuracy"): (0.75, "accuracy (95 % interval: ± 0.031)"),
        ("safety", "accuracy"): (0.625, "accuracy"),
        ("in_domain", "loss"): (0.43, "loss"),
    }
    assert {r.dataset_type for r in data.eval_results} == {"trl-lib/ultrafeedback_binarized"}
    own = DataSource("safety.jsonl", is_on_hub=False, used_for="evaluation")
    data = read_card(lineage(after=AFTER, data_sources=(*SOURCES, own))).data
    assert {r.dataset_type for r in data.eval_results} == {"held-out"}


def test_a_person_reads_results_licences_and_settings() -> None:
    config = {
        "training": {"epochs": 2, "learning_rate": 5e-6, "max_steps": None, "save_every": 200},
        "policy": {"adapter": {"r": 16, "target_modules": ["q_proj", "v_proj"]}},
        "data": {"train": "/home/me/votes.jsonl", "max_length": 1024},
        "storage_path": "/home/me/runs",
    }
    text = read_card(
        lineage(after=AFTER, data_sources=SOURCES, config=config, libraries={"torch": "2.13.0"}, before=AFTER)
    ).text
    for row in (
        "| eval/accuracy | 0.75 ± 0.031 | 0.75 ± 0.031 |",
        "| eval/safety/accuracy | 0.625 | 0.625 |",
        "| training.learning_rate | 5e-06 |",
        "| policy.adapter.target_modules | q_proj, v_proj |",
        "| data.max_length | 1024 |",
        "| torch | 2.13.0 |",
        "| base model `tiny/base@0123abc` | not stated where polyref could read it |",
        "| data `trl-lib/ultrafeedback_binarized` | mit |",
    ):
        assert row in text
    for hidden in ("/home/me", "accuracy_interval", "save_every", "max_steps"):
        assert hidden not in text
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["How to load it", "Results", "Training", "Limits", "Licences"]


def test_a_licence_that_nobody_states_is_in_no_metadata() -> None:
    assert read_card(lineage(data_sources=SOURCES)).data.license is None


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_only_a_loss_that_reads_rejected_responses_claims_preferences(name: str) -> None:
    loss = PRESETS[name]
    card = read_card(
        lineage(preset=name, loss=loss.model_dump(mode="json"), after=AFTER, counts={"train kept": 9})
    )
    claims = re.search("prefer|rejected|reward|accuracy", str(card)) is not None
    assert claims == (name != "sft")
    assert ("sft" in card.data.tags) == (name == "sft")


def test_a_supervised_card_says_what_was_learned() -> None:
    card = read_card(supervised(after={"eval/loss": 1.25, "eval/accuracy": 0.75}))
    assert "supervised fine-tuning" in card.text
    assert [r.metric_type for r in card.data.eval_results] == ["loss"]
    assert "### References\n\nNone" in card.text


def test_without_an_evaluation_there_are_no_results() -> None:
    card = read_card(supervised(before={}, after={}))
    assert card.data.eval_results is None
    assert "was not evaluated" in card.text


@pytest.mark.parametrize(("adapter_only", "library"), [(False, "transformers"), (True, "peft")])
def test_the_card_for_a_hub_loads_from_the_hub(adapter_only: bool, library: str) -> None:
    card = read_card(lineage(), adapter=True, hub=HubTarget("me/films", adapter_only))
    assert card.data.library_name == library
    assert "polyref models get" not in card.text
    assert "models:/films" not in card.text
    code = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(code) == (1 if adapter_only else 2)
    for block in code:
        compile(block, "card", "exec")
    assert 'from_pretrained("tiny/base", revision="0123abc")' in code[-1]
    source = '"me/films"' if adapter_only else '"me/films", subfolder="adapter"'
    assert f"PeftModel.from_pretrained(base, {source})" in code[-1]


@pytest.mark.parametrize(
    ("card", "config", "metadata"),
    [
        ("---\nlicense: mit\n---\n# x", None, {"license": "mit"}),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", None, {"license": ["mit", "cc-by-4.0"]}),
        (
            "---\nlicense: other\nlicense_name: films-1\nlicense_link: LICENSE\n---\n",
            None,
            {"license": "other", "license_name": "films-1", "license_link": "LICENSE"},
        ),
        (
            "---\nlicense: Our Own License, v2\n---\n",
            None,
            {"license": "other", "license_name": "our-own-license-v2"},
        ),
        ("# no metadata", {"license": "apache-2.0"}, {"license": "apache-2.0"}),
        ("---\nlicense: unknown\n---\n", {}, None),
        ("---\n- a list\n---\n", {"license": 3}, None),
        ("---\nlicense: [\n---\n", None, None),
        (None, None, None),
    ],
)
def test_a_licence_is_read_and_never_guessed(
    tmp_path: Path, card: str | None, config: dict[str, object] | None, metadata: dict[str, object] | None
) -> None:
    (tmp_path / "LICENSE").write_text("MIT License")
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_license(tmp_path)
    assert (found.to_metadata() if found else None) == metadata
    if found is not None:
        data = read_card(lineage(base_license=found)).data
        assert {k: v for k, v in data.to_dict().items() if k.startswith("license")} == metadata


def test_the_card_of_a_hub_data_set_is_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "datasets--me--votes"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert read_cached_license("me/votes", None) == License(("cc-by-4.0",))
    assert read_cached_license("me/other", None) is None
    assert read_cached_license("me/vo--tes", None) is None


def test_a_lineage_is_read_back_and_so_is_an_older_one() -> None:
    written = lineage(after=AFTER, base_license=License(("mit",)), data_sources=SOURCES)
    read = parse_lineage(written.to_json(), "models:/films/1")
    assert read.data_sources == list(SOURCES)
    assert read.base_license == written.base_license
    assert render_model_card("films", read, adapter=True) == render_model_card("films", written, adapter=True)
    fields = json.loads(written.to_json())
    older = {k: v for k, v in fields.items() if k not in ("base_license", "data_sources", "libraries")}
    assert parse_lineage(json.dumps(older | {"version": 1}), "x").base_license is None
    with pytest.raises(UsageError, match=r"lineage.json of models:/films/1 cannot be read: it has version 9"):
        parse_lineage(json.dumps(fields | {"version": 9}), "models:/films/1")
