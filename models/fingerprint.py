"""What a frozen model is: equal for a copy, another once anything that decides its scores changes."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from models.config import ModelConfig, ModelError
from models.load import Located

SCORING_VERSION = 1
"""Raised when a change to rows or log-probs changes scores: stored ones are then not used again."""

# Where a file came from and who wrote it, not what it computes.
_VOLATILE = frozenset(
    {"_name_or_path", "transformers_version", "peft_version", "base_model_name_or_path", "revision"}
)
_SETS = frozenset({"target_modules", "modules_to_save", "exclude_modules"})  # PEFT writes them in any order
_digests: dict[tuple[str, int, int], str] = {}


@dataclass(frozen=True)
class Fingerprint:
    """digest: 64 hex digits; parts: what it is made of, to say which one changed."""

    digest: str
    parts: dict[str, Any]

    def changed(self, other: "Fingerprint") -> list[str]:
        """Names of the parts in which two fingerprints differ."""
        names = self.parts.keys() | other.parts.keys()
        return sorted(n for n in names if self.parts.get(n) != other.parts.get(n))


def fingerprint(
    located: Located,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    device_type: str = "cpu",
) -> Fingerprint:
    """Identity of the scores that the located model gives.

    Weights, config, adapter, tokenizer, chat template and its arguments, BOS/EOS rule, dtype (`auto` resolved
    for `device_type`), quantisation and the version of the scoring code. Folder names and timestamps do not
    count.
    """
    model = located.base_path if located.kind == "adapter" else located.path
    assert model is not None
    parts: dict[str, Any] = {
        "weights": _weights(model),
        "config": _config(model / "config.json") if model.is_dir() else None,
        "code": _files(sorted(model.glob("*.py"))) if config.trust_remote_code and model.is_dir() else None,
        "adapter": _adapter(located.path) if located.kind == "adapter" else None,
        "tokenizer": _tokenizer(tokenizer),
        "chat_template": _text(_json(tokenizer.chat_template)),
        "template_kwargs": json.loads(_json(dict(template_kwargs or {}))),
        "bos_eos": {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "adds_bos": bool(getattr(tokenizer, "add_bos_token", False)),
            "adds_eos": bool(getattr(tokenizer, "add_eos_token", False)),
        },
        "dtype": config.dtype_on(device_type),
        "quantization": config.quantization,
        "scoring": SCORING_VERSION,
    }
    return Fingerprint(_text(_json(parts)), parts)


def _weights(model: Path) -> str:
    if model.is_file():
        return _text(_file(model))
    index = model / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [model / name for name in names]
    else:
        whole = model / "model.safetensors"
        shards = [whole] if whole.exists() else sorted(model.glob("*.safetensors"))
    for shard in shards:
        if not shard.exists():
            raise ModelError(f"{shard} is named by {index.name} but missing; download the model again")
    return _files(shards)


def _adapter(folder: Path) -> dict[str, str]:
    return {
        "weights": _files([folder / "adapter_model.safetensors"]),
        "config": _config(folder / "adapter_config.json"),
    }


def _config(file: Path) -> str:
    settings = json.loads(file.read_text(encoding="utf-8"))
    stable = {key: value for key, value in settings.items() if key not in _VOLATILE}
    for key in _SETS & stable.keys():
        if isinstance(stable[key], list):
            stable[key] = sorted(stable[key])
    return _text(_json(stable))


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        # Left behind by the last call, not part of the tokenizer.
        rules["truncation"] = rules["padding"] = None
    return _text(_json([rules, tokenizer.special_tokens_map]))


def _files(files: Iterable[Path]) -> str:
    """One digest of several files' names and contents."""
    files = list(files)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return _text(_json([[f.name, d] for f, d in zip(files, pool.map(_file, files), strict=True)]))


def _file(path: Path) -> str:
    """SHA-256 of a file's content, read once per process as long as size and time stay."""
    place = os.path.realpath(path)
    status = os.stat(place)
    key = (place, status.st_size, status.st_mtime_ns)
    if key not in _digests:
        with open(place, "rb") as stream:
            _digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digests[key]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _text(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
