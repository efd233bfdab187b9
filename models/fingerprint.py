"""Identity of a frozen model: equal for copies, different once anything that decides its scores changes."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from models.config import ModelConfig
from models.load import ModelFiles
from models.weight_files import list_weight_files

SCORING_VERSION = 2
"""Raise it when a change to rows or log-probs changes scores, so that stored scores are not used again."""

# Keys that say where a file came from and who wrote it, not what it computes.
_IGNORED_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "peft_version", "base_model_name_or_path", "revision"}
)
_UNORDERED_KEYS = frozenset(
    {"target_modules", "modules_to_save", "exclude_modules"}
)  # PEFT writes them in any order
_digests: dict[tuple[str, int, int], str] = {}


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a model's scores.

    digest: 64 hex digits.
    parts:  what the digest is computed from, by name, to say which part changed.
    """

    digest: str
    parts: dict[str, Any]

    def list_changed_parts(self, other: "Fingerprint") -> list[str]:
        """Return the names of the parts in which two fingerprints differ."""
        names = self.parts.keys() | other.parts.keys()
        return sorted(n for n in names if self.parts.get(n) != other.parts.get(n))


def compute_fingerprint(
    files: ModelFiles,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    device_type: str = "cpu",
) -> Fingerprint:
    """Compute the identity of the scores that a model gives.

    It covers weights, config, adapter, tokenizer, chat template and its arguments, BOS/EOS rule, dtype
    (`auto` resolved for `device_type`), quantisation and the version of the scoring code. Folder names and
    timestamps do not count.
    """
    model = files.base_path if files.kind == "adapter" else files.path
    assert model is not None
    parts: dict[str, Any] = {
        "weights": _hash_weights(model),
        "config": _hash_config(model / "config.json") if model.is_dir() else None,
        "code": _hash_files(sorted(model.glob("*.py")))
        if model in files.trusted and model.is_dir()
        else None,
        "adapter": _hash_adapter(files.path) if files.kind == "adapter" else None,
        "tokenizer": _hash_tokenizer(tokenizer),
        "chat_template": _hash_text(_to_json(tokenizer.chat_template)),
        "template_kwargs": json.loads(_to_json(dict(template_kwargs or {}))),
        "bos_eos": {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "adds_bos": bool(getattr(tokenizer, "add_bos_token", False)),
            "adds_eos": bool(getattr(tokenizer, "add_eos_token", False)),
        },
        "dtype": config.resolve_dtype(device_type),
        "quantization": config.quantization,
        "scoring": SCORING_VERSION,
    }
    return Fingerprint(_hash_text(_to_json(parts)), parts)


def _hash_weights(model: Path) -> str:
    if model.is_file():
        return _hash_text(_hash_file(model))
    return _hash_files(list_weight_files(model))


def _hash_adapter(folder: Path) -> dict[str, str]:
    return {
        "weights": _hash_files([folder / "adapter_model.safetensors"]),
        "config": _hash_config(folder / "adapter_config.json"),
    }


def _hash_config(file: Path) -> str:
    settings = json.loads(file.read_text(encoding="utf-8"))
    stable = {key: value for key, value in settings.items() if key not in _IGNORED_KEYS}
    for key in _UNORDERED_KEYS & stable.keys():
        if isinstance(stable[key], list):
            stable[key] = sorted(stable[key])
    return _hash_text(_to_json(stable))


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        # State of the last call, not part of the tokenizer.
        rules["truncation"] = rules["padding"] = None
    return _hash_text(_to_json([rules, tokenizer.special_tokens_map]))


def _hash_files(files: Iterable[Path]) -> str:
    """Return one digest of several files' names and contents."""
    files = list(files)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return _hash_text(
            _to_json([[f.name, d] for f, d in zip(files, pool.map(_hash_file, files), strict=True)])
        )


def _hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, read once per process while size and mtime are unchanged."""
    place = path.resolve()
    status = place.stat()
    key = (str(place), status.st_size, status.st_mtime_ns)
    if key not in _digests:
        with place.open("rb") as stream:
            _digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digests[key]


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _hash_text(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
