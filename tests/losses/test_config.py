"""Settings: refusals and their messages, presets and their overrides, no torch."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from losses.config import LossConfig, LossError
from losses.presets import PRESETS, loss_config_from_settings, preset

HARMONIC = {"combine": "harmonic"}
NO_REFERENCE = {"combine": "none"}
SFT = {"link": {"type": "none"}, "sft_weight": 1, "references": NO_REFERENCE}


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        # Numbers out of range.
        ({"beta": -1}, "beta must be > 0, got -1; try 0.1"),
        ({"beta": 0}, "beta must be > 0, got 0; try 0.1"),
        ({"beta": float("nan")}, "beta must be > 0, got nan; try 0.1"),
        ({"beta": float("inf")}, "beta must be > 0, got inf; try 0.1"),
        ({"margin": float("inf")}, "margin must be finite, got inf; try 0"),
        ({"sft_weight": -0.1}, "sft_weight must be >= 0, got -0.1; try 1"),
        ({"link": {"type": "robust", "flip_probability": 0.5}}, "must be >= 0 and < 0.5, got 0.5; try 0.1"),
        ({"link": {"type": "ropo", "alpha": 0}}, "alpha must be > 0, got 0; try 14"),
        ({"link": {"type": "exo", "label_smoothing": 0}}, "must be > 0 and < 0.5, got 0; try 0.001"),
        ({"link": {"type": "discopop", "temperature": 2}}, "must be > 0 and <= 1, got 2; try 0.05"),
        ({"link": {"type": "mallows_phi", "smoothing": 0}}, "smoothing must be >= 0.001, got 0; try 0.5"),
        ({"dispersion": {"type": "constant", "value": -2}}, "value must be >= 1e-06, got -2; try 1"),
        ({"dispersion": {"type": "entropy", "phi_star": 0}}, "phi_star must be >= 0.001, got 0; try 0.29"),
        ({"dispersion": {"type": "entropy", "phi_star": "automatic"}}, "must be a number or 'auto'"),
        ({"references": {**HARMONIC, "trust_region": 1.5}}, "must be > 0 and < 1, got 1.5; try 0.1"),
        # Names.
        ({"betta": 1}, "did you mean 'beta'"),
        ({"link": {"type": "sigmod"}}, "did you mean 'sigmoid'"),
        ({"link": "ipo"}, "write link: {type: ipo}"),
        ({"link": {}}, "write link: {type: sigmoid}"),
        ({"link": {"type": "sigmoid", "alpha": 3}}, "unknown field 'alpha'"),
        ({"link": {"type": "robust", "flip_probabilty": 3}}, "did you mean 'flip_probability'"),
        ({"soft_label": {"type": "geometrc"}}, "did you mean 'geometric'"),
        ({"dispersion": {"type": "entropies"}}, "did you mean 'entropy'"),
        ({"references": {"combine": "harmonc"}}, "'harmonic'"),
        ({"references": {**HARMONIC, "weights": "adaptiv"}}, "did you mean 'adaptive'"),
        ({"references": {**HARMONIC, "weights": {"base": 1}}}, "list in the references' order"),
        ({"references": {**HARMONIC, "weights": []}}, "try [0.5, 0.5]"),
        ({"references": {**HARMONIC, "weights": [1, -1]}}, "try [0.5, 0.5]"),
        ({"references": {**HARMONIC, "weights": [0, 0]}}, "try [0.5, 0.5]"),
        ({"references": {**HARMONIC, "weights": [1, "x"]}}, "try [0.5, 0.5]"),
        # Stages that do not fit together.
        ({"references": {"combine": "single", "trust_region": 0.1}}, "set trust_region: null"),
        ({"references": {"combine": "none", "trust_region": 0.1}}, "set trust_region: null"),
        ({"references": {"combine": "single", "weights": "adaptive"}}, "set weights: uniform"),
        ({"references": {"combine": "none", "weights": [1, 2]}}, "set weights: uniform"),
        ({"references": {**HARMONIC, "weights": [1], "trust_region": 0.1}}, "set trust_region: null"),
        ({"margin": 1, "link": {"type": "nca"}}, "set margin: 0 or link: {type: sigmoid}"),
        ({"link": {"type": "mallows_phi"}}, "set dispersion: {type: entropy}"),
        ({"link": {"type": "orpo"}, "references": NO_REFERENCE}, "set length_normalized: true"),
        ({"link": {"type": "orpo"}, "length_normalized": True}, "set references: {combine: none}"),
        ({**SFT, "sft_weight": 0}, "set sft_weight: 1"),
        ({**SFT, "references": HARMONIC}, "set references: {combine: none}"),
        ({**SFT, "soft_label": {"type": "mixture"}}, "set soft_label: {type: none}"),
        ({**SFT, "dispersion": {"type": "entropy"}}, "set dispersion: {type: none}"),
        ({**SFT, "margin": 1}, "set margin: 0"),
    ],
)
def test_invalid_settings_are_refused_with_the_remedy(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        LossConfig.model_validate(settings)
    messages = [problem["msg"] for problem in refusal.value.errors()]
    assert len(messages) == 1
    assert remedy in messages[0]


def test_a_config_is_frozen() -> None:
    config = LossConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.beta = 0.2  # type: ignore[misc]


def test_the_minimum_number_of_references() -> None:
    minimum = {name: config.min_references for name, config in PRESETS.items()}
    assert {name for name, count in minimum.items() if count == 0} == {"simpo", "cpo", "orpo", "sft"}
    assert {name for name, count in minimum.items() if count == 2} == {"mrpo"}
    assert minimum["mallows_simpo"] == 1
    assert preset("geometric_references", references={"weights": [1, 2, 3]}).min_references == 3
    assert preset("mallows_simpo").reference_free
    assert preset("mallows_simpo").needs_entropy
    assert [name for name, config in PRESETS.items() if config.completions_only] == ["sft"]


def test_overrides_are_merged_into_the_preset() -> None:
    assert preset("gdpo", beta=0.2) == LossConfig(beta=0.2, soft_label={"type": "geometric"})
    mrpo = preset("mrpo", references={"combine": "geometric"}).references
    assert (mrpo.combine, mrpo.weights, mrpo.trust_region) == ("geometric", "adaptive", 0.1)
    assert preset("robust_dpo", link={"flip_probability": 0.3}).link.model_dump() == {
        "type": "robust",
        "flip_probability": 0.3,
    }
    # Another type has its own parameters, so the preset's are dropped.
    assert preset("robust_dpo", link={"type": "exo"}).link == preset("exo").link
    assert preset("dpo", dispersion=preset("mallows_theta").dispersion) == preset("mallows_theta")


def test_a_run_files_loss_section() -> None:
    section = {"preset": "mallows_theta", "beta": "5e-2", "references": {"combine": "harmonic"}}
    assert loss_config_from_settings(section) == preset(
        "mallows_theta", beta=0.05, references={"combine": "harmonic"}
    )
    assert loss_config_from_settings(preset("mrpo").model_dump(mode="json")) == preset("mrpo")
    with pytest.raises(LossError, match="add preset: dpo"):
        loss_config_from_settings({"beta": 0.1})
    with pytest.raises(ValidationError, match="did you mean 'references'"):
        loss_config_from_settings({"preset": "dpo", "referencs": {}})


@pytest.mark.parametrize(
    ("name", "meant"), [("gdop", "gdpo"), ("mallows-theta", "mallows_theta"), ("DPO", "dpo")]
)
def test_an_unknown_preset_names_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(LossError, match=f"unknown preset '{name}'; did you mean '{meant}'"):
        preset(name)


def test_resolving_phi_star() -> None:
    config = preset("mallows_phi", dispersion={"phi_star": "auto"})
    assert config.needs_calibration
    resolved = config.with_phi_star(0.7)
    assert resolved == preset("mallows_phi", dispersion={"phi_star": 0.7})
    assert not resolved.needs_calibration
    with pytest.raises(LossError, match="phi_star: auto"):
        resolved.with_phi_star(0.8)


def test_the_json_schema_carries_bounds_and_names() -> None:
    schema = LossConfig.model_json_schema()
    assert schema["properties"]["beta"]["exclusiveMinimum"] == 0
    assert schema["$defs"]["RobustLink"]["properties"]["flip_probability"]["exclusiveMaximum"] == 0.5
    assert set(schema["properties"]["link"]["discriminator"]["mapping"]) >= {"sigmoid", "ipo", "mallows_phi"}


def test_settings_import_no_torch() -> None:
    program = (
        "import sys, losses.config, losses.presets; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'ray', 'numpy'}))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
