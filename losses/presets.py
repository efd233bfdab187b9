"""Named losses. A preset only sets the five stages, so any part of it can be overridden.

Torch-free. Values are the papers' where they give one; beta is 0.1 elsewhere.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from losses.config import LossConfig
from losses.settings import LossError, make_unknown_name_error

_REFERENCE_FREE = {"combine": "none"}
_ENTROPY = {"type": "entropy", "phi_star": 0.29}
_GEOMETRIC = {"type": "geometric"}
_MIXTURE = {"type": "mixture"}

_SETTINGS: dict[str, dict[str, Any]] = {
    # One reference, hard labels.
    "dpo": {},  # Rafailov et al. 2023, arXiv:2305.18290
    "ipo": {"link": {"type": "ipo"}},  # Azar et al. 2023, arXiv:2310.12036
    "ipo_length_normalized": {"link": {"type": "ipo"}, "length_normalized": True},
    "dpo_length_normalized": {  # Tulu 3, Lambert et al. 2024, arXiv:2411.15124
        "length_normalized": True,
        "beta": 5.0,
    },
    "hinge": {"link": {"type": "hinge"}},  # SLiC-HF, Zhao et al. 2023, arXiv:2305.10425
    "robust_dpo": {"link": {"type": "robust"}},  # Chowdhury et al. 2024, arXiv:2403.00409
    "ropo": {"link": {"type": "ropo"}},  # Liang et al. 2024, arXiv:2404.04102
    "exo": {"link": {"type": "exo"}},  # Ji et al. 2024, arXiv:2402.00856
    "nca": {"link": {"type": "nca"}},  # Chen et al. 2024, arXiv:2402.05369
    "bco_pair": {"link": {"type": "bco_pair"}},  # Jung et al. 2024, arXiv:2404.04656
    "apo_zero": {"link": {"type": "apo_zero"}},  # D'Oosterlinck et al. 2024, arXiv:2408.06266
    "apo_down": {"link": {"type": "apo_down"}},
    "sppo": {"link": {"type": "sppo"}},  # Wu et al. 2024, arXiv:2405.00675
    "discopop": {"link": {"type": "discopop"}},  # Lu et al. 2024, arXiv:2406.08414
    "rpo": {"sft_weight": 0.5},  # Pang et al. 2024, arXiv:2404.19733
    # Soft labels. This GDPO (Furuta et al. 2024, arXiv:2409.06691) is geometric-averaged DPO;
    # an unrelated variant of GRPO has the same name.
    "cdpo": {"soft_label": _MIXTURE},  # Mitchell 2023, "A note on DPO with noisy preferences"
    "cipo": {"soft_label": _MIXTURE, "link": {"type": "ipo"}},
    "gdpo": {"soft_label": _GEOMETRIC},
    "gipo": {"soft_label": _GEOMETRIC, "link": {"type": "ipo"}},
    "gropo": {"soft_label": _GEOMETRIC, "link": {"type": "ropo"}},
    # Dispersion: MallowsPO, Chen et al. 2024, arXiv:2405.14953.
    "mallows_theta": {"dispersion": _ENTROPY},
    "mallows_theta_ipo": {"dispersion": _ENTROPY, "link": {"type": "ipo"}},
    "mallows_phi": {"dispersion": _ENTROPY, "link": {"type": "mallows_phi"}},
    # Several references: MRPO, Le et al. 2024, arXiv:2405.16388, and two simpler baselines.
    "mrpo": {"references": {"combine": "harmonic", "weights": "adaptive", "trust_region": 0.1}},
    "geometric_references": {"references": {"combine": "geometric"}},
    "multi_dpo": {"references": {"combine": "multi_loss", "weights": "adaptive_per_token"}},
    # No reference in the loss.
    "simpo": {  # Meng et al. 2024, arXiv:2405.14734
        "references": _REFERENCE_FREE,
        "length_normalized": True,
        "beta": 10.0,
        "margin": 0.3,
    },
    "mallows_simpo": {  # MallowsPO as a plug-in; one reference is still read, for its entropy
        "references": _REFERENCE_FREE,
        "length_normalized": True,
        "beta": 10.0,
        "margin": 0.3,
        "dispersion": _ENTROPY,
    },
    "orpo": {  # Hong et al. 2024, arXiv:2403.07691
        "references": _REFERENCE_FREE,
        "length_normalized": True,
        "link": {"type": "orpo"},
        "sft_weight": 1.0,
    },
    "cpo": {"references": _REFERENCE_FREE, "sft_weight": 1.0},  # Xu et al. 2024, arXiv:2401.08417
    "sft": {"references": _REFERENCE_FREE, "link": {"type": "none"}, "sft_weight": 1.0},
}

PRESETS: Mapping[str, LossConfig] = MappingProxyType(
    {name: LossConfig.model_validate(settings) for name, settings in _SETTINGS.items()}
)

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "sigmoid": "dpo",
        "sigmoid_norm": "dpo_length_normalized",
        "robust": "robust_dpo",
        "exo_pair": "exo",
        "nca_pair": "nca",
        "sppo_hard": "sppo",
    }
)
"""Names in TRL's DPOConfig (`loss_type`) of losses that have another name here."""

_SORTS_A_BATCH = (
    "it compares sorted log-ratios of a whole batch, and losses here are of one pair each; "
    "choose another, such as dpo"
)
_NOT_OFFERED = dict.fromkeys(("aot", "aot_pair", "aot_unpaired"), _SORTS_A_BATCH)


def resolve_preset_name(name: str) -> str:
    """Return the name that a preset has here, for its own name or for TRL's.

    Raises:
        LossError: the preset does not exist; the message suggests the nearest.
    """
    if name in _NOT_OFFERED:
        raise LossError(f"TRL's loss {name!r} is not offered: {_NOT_OFFERED[name]}")
    if name not in PRESETS and name not in ALIASES:
        raise make_unknown_name_error("preset", name, PRESETS)
    return ALIASES.get(name, name)


def explain_preset_name(name: str, loss: LossConfig) -> str | None:
    """Return a sentence about a preset's name that means another loss to users of TRL, None for other names.

    Args:
        name: the preset as it was written.
        loss: the loss that it became.
    """
    if name in ALIASES:
        return f"preset {name} is {ALIASES[name]} here"
    if name == "ipo" and not loss.length_normalized:
        return "ipo is on sums, as in the paper; TRL's divides by length: ipo_length_normalized"
    return None


def preset(name: str, **overrides: Any) -> LossConfig:
    """Return a named loss with any of its fields overridden; nested mappings are merged into the preset's.

    A stage with another `type` than the preset's replaces the whole stage. TRL's names are read as ours.

    Raises:
        LossError: the preset does not exist; the message suggests the nearest.
        pydantic.ValidationError: LossConfig refuses the result.
    """
    base = PRESETS[resolve_preset_name(name)]
    return LossConfig.model_validate(_merge_settings(base.model_dump(), overrides))


def loss_config_from_settings(settings: Mapping[str, Any]) -> LossConfig:
    """Build the loss of a run file's `loss:` section: `{preset: name, field: override, ...}`, or all stages.

    Raises:
        LossError: the preset does not exist, or neither a preset nor a link is named.
        pydantic.ValidationError: LossConfig refuses the result.
    """
    if "preset" in settings:
        overrides = {field: value for field, value in settings.items() if field != "preset"}
        return preset(str(settings["preset"]), **overrides)
    if "link" not in settings:
        raise LossError("the loss is not named; add preset: dpo (or another), or a link: {type: ...}")
    return LossConfig.model_validate(settings)


def _merge_settings(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge overrides into settings; a section of another type replaces the old one."""
    merged = dict(settings)
    for field, value in overrides.items():
        value = value.model_dump() if isinstance(value, BaseModel) else value
        old = merged.get(field)
        if (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and value.get("type") in (None, old.get("type"))
        ):
            value = _merge_settings(old, value)
        merged[field] = value
    return merged
