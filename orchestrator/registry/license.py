"""The licence that a model or a data set states itself; where it states none, none is assumed."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_HUB_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_CARD = "README.md"


@dataclass(frozen=True)
class License:
    """A licence as the card of a model or data set states it."""

    ids: tuple[str, ...]
    """Identifiers such as `apache-2.0`; `other` where the licence has a name of its own."""
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        named = f"{self.name} (other)" if self.name and self.ids == ("other",) else ", ".join(self.ids)
        return f"{named}, {self.link}" if self.link else named

    def to_metadata(self) -> dict[str, Any]:
        """Return the fields of a card's metadata; a licence that has no identifier becomes `other`."""
        if all(_HUB_ID.fullmatch(identifier) for identifier in self.ids):
            ids: Any = self.ids[0] if len(self.ids) == 1 else list(self.ids)
            return _drop_none({"license": ids, "license_name": self.name, "license_link": self.link})
        name = re.sub(r"[^a-z0-9.]+", "-", (self.name or " ".join(self.ids)).lower()).strip("-.")
        return _drop_none({"license": "other", "license_name": name, "license_link": self.link})


def read_license(folder: Path) -> License | None:
    """Return the licence that a folder's README.md or else its config.json states; None if neither does."""
    return _parse_license(_read_card(folder / _CARD)) or _parse_license(_read_config(folder / "config.json"))


def read_cached_license(dataset: str, revision: str | None) -> License | None:
    """Return the licence in a hub data set's card, if the card is in this machine's cache; asks no hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        card = try_to_load_from_cache(dataset, _CARD, repo_type="dataset", revision=revision)
    except HFValidationError:
        return None
    return _parse_license(_read_card(Path(card))) if isinstance(card, str) else None


def _read_card(path: Path) -> Mapping[str, Any]:
    from huggingface_hub import metadata_load

    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except (OSError, ValueError, yaml.YAMLError):  # another program's, with no metadata to read
        return {}


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _parse_license(metadata: Mapping[str, Any]) -> License | None:
    stated = metadata.get("license")
    ids = [stated] if isinstance(stated, str) else stated if isinstance(stated, list) else []
    ids = [identifier.strip() for identifier in ids if isinstance(identifier, str) and identifier.strip()]
    if not ids or ids == ["unknown"]:
        return None
    name, link = metadata.get("license_name"), metadata.get("license_link")
    return License(
        tuple(ids), name if isinstance(name, str) else None, link if isinstance(link, str) else None
    )


def _drop_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
