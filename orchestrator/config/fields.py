"""The fields of a file of settings, as its JSON Schema describes them to editors."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

ANY_NAME, ANY_NUMBER = "NAME", "N"
"""Parts of a path that stand for a name of the user's own, and for a place in a list."""
_EXAMPLE_NAMES = {"references.models": "base", "data.eval": "safety"}
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_LIMITS = {
    "minimum": "{} or more",
    "exclusiveMinimum": "above {}",
    "maximum": "{} or less",
    "exclusiveMaximum": "below {}",
    "maxLength": "{} characters at most",
}


@dataclass(frozen=True, kw_only=True)
class FileField:
    """A field of a file, or a section of fields.

    Attributes:
        path: its dotted name, with NAME for a name of the user's own and N for a place in a list.
        variants: the values of `type` beside it with which its section has it; empty for all.
        type: what may be written, in words.
        limits: bounds of what may be written, in words; empty where there are none.
        default: the value if it is left out, as YAML, or empty where another field decides; None where it is
            required.
        description: one or more sentences, without a full stop at the end.
        example: a value that may be written; None for a section that is explained by its fields.
        is_section: whether it has fields of its own.
    """

    path: str
    variants: tuple[str, ...]
    type: str
    limits: str
    default: str | None
    description: str
    example: Any
    is_section: bool

    @property
    def parent(self) -> str:
        """The path of the section that the field is in; empty for the whole file."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def example_line(self) -> str | None:
        """The example as a line of YAML, within its sections; None where there is none."""
        if self.example is None:
            return None
        parts = self.path.split(".")
        value, kind = self.example, self.variants[:1]
        for place in range(len(parts) - 1, -1, -1):
            name, parent = parts[place], ".".join(parts[:place])
            if name == ANY_NUMBER:
                value = [value]
                continue
            name = _EXAMPLE_NAMES.get(parent, "name") if name == ANY_NAME else name
            beside = {"type": kind[0]} if place == len(parts) - 1 and kind and name != "type" else {}
            value = {**beside, name: value}
        (name, value), *_ = value.items()
        is_plain = isinstance(value, str) and yaml.safe_load(value) == value
        return f"{name}: {value if is_plain else format_yaml(value)}"


def list_fields(schema: Mapping[str, Any]) -> list[FileField]:
    """List the fields of a schema in the file's order, those of each section after it."""
    return list(_walk_section(schema, schema.get("$defs", {}), path="", variants=()))


def find_fields(fields: Sequence[FileField], path: str) -> list[FileField]:
    """Find the fields at a path; several if a section has others of that name under other types.

    Names of the user's own, and places in lists as in `data.train[0].share`, may be any. For an entry of a
    mapping or a list it is the field that holds it.
    """
    parts = re.sub(r"\[(\w+)\]", r".\1", path).split(".")
    found = [field for field in fields if _matches_path(field.path.split("."), parts)]
    if found:
        return found
    holders = {
        field.parent.rpartition(".")[0] for field in fields if _matches_path(field.parent.split("."), parts)
    }
    return [field for field in fields if field.path in holders]


def find_fields_by_name(fields: Sequence[FileField], name: str) -> list[FileField]:
    """Find the fields of a name, one for each path; those of lists only if there are no others."""
    found = {field.path: field for field in fields if field.name == name}
    outside = {path: field for path, field in found.items() if f".{ANY_NUMBER}." not in path}
    return list((outside or found).values())


def list_fields_of(fields: Sequence[FileField], section: str) -> list[FileField]:
    """List the fields of a section, or of an entry of its list or mapping; empty for the whole file."""
    entries = (f"{section}.{ANY_NAME}", f"{section}.{ANY_NUMBER}")
    return [field for field in fields if field.parent == section or (section and field.parent in entries)]


def format_yaml(value: Any) -> str:
    """Format a value as YAML on one line, with numbers as people write them: 5.0e-6, 0.1, 16."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:g}".partition("e")
        if not exponent:
            return mantissa
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{int(exponent)}"
    if isinstance(value, Mapping):
        return (
            "{" + ", ".join(f"{format_yaml(key)}: {format_yaml(inner)}" for key, inner in value.items()) + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_yaml, value)) + "]"
    # Within a list, as text that is safe alone need not be safe there.
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]


def _matches_path(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    if len(pattern) != len(parts):
        return False
    return all(own in (part, ANY_NAME, ANY_NUMBER) for own, part in zip(pattern, parts, strict=True))


def _walk_section(
    section: Mapping[str, Any], definitions: Mapping[str, Any], *, path: str, variants: tuple[str, ...]
) -> Iterator[FileField]:
    """Yield the fields of a section and of the sections in it."""
    for name, written in section.get("properties", {}).items():
        field = f"{path}.{name}" if path else name
        inner = list(_find_sections(written, definitions))
        kinds = _list_values(written) if name == "type" and variants else variants
        yield FileField(
            path=field,
            variants=kinds,
            type=_describe_type(written),
            limits=", ".join(_describe_limits(written)),
            default=None if name in section.get("required", ()) else _format_default(written),
            description=_tidy_description(written.get("description", "")),
            example=_choose_example(written),
            is_section=bool(inner),
        )
        places = [place for place, _ in inner]
        for place, definition in inner:
            kind = definition.get("properties", {}).get("type", {})
            kinds = _list_values(kind) if places.count(place) > 1 else ()
            yield from _walk_section(
                definition, definitions, path=f"{field}.{place}" if place else field, variants=kinds
            )


def _find_sections(
    written: Mapping[str, Any], definitions: Mapping[str, Any], place: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the sections that a field may hold: the place within it ("", NAME or N), and its schema."""
    if "$ref" in written:
        yield place, definitions[written["$ref"].rpartition("/")[2]]
    members = [*written.get("anyOf", ()), *written.get("oneOf", ())]
    # A single source stands for a list of one; its fields are those of an entry of the list.
    lists = [member for member in members if "items" in member]
    for member in lists or members:
        yield from _find_sections(member, definitions, place)
    for key, inner_place in (("items", ANY_NUMBER), ("additionalProperties", ANY_NAME)):
        if isinstance(written.get(key), Mapping):
            yield from _find_sections(written[key], definitions, inner_place)


def _list_values(written: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, written.get("enum", [written["const"]] if "const" in written else ())))


def _describe_type(written: Mapping[str, Any]) -> str:
    """Say in words what may be written."""
    members = [*written.get("anyOf", ()), *written.get("oneOf", ())]
    if members:
        kinds = dict.fromkeys(_describe_type(member) for member in members)
        if {"text", "number", "true or false"} <= set(kinds):
            kinds = {"value": None} | {kind: None for kind in kinds if kind.startswith("list")}
        return " or ".join(
            [*(kind for kind in kinds if kind != "null"), *(["null"] if "null" in kinds else [])]
        )
    if "$ref" in written or "properties" in written:
        return "section"
    if "enum" in written or "const" in written:
        return ", ".join(_list_values(written))
    if written.get("format") == "date":
        return "date"
    if "prefixItems" in written:
        return f"list of {len(written['prefixItems'])} {_describe_type(written['prefixItems'][0])}s"
    kind = written.get("type")
    if kind == "array":
        inner = _describe_type(written["items"])
        return f"list ({inner})" if " or " in inner else f"list of {inner}s"
    if kind == "object":
        entry = written.get("additionalProperties")
        return f"mapping ({_describe_type(entry)} by name)" if isinstance(entry, Mapping) else "mapping"
    return _TYPES.get(str(kind), "null" if kind == "null" else "anything")


def _describe_limits(written: Mapping[str, Any]) -> list[str]:
    """List the bounds of numbers and texts in words, those of the members of a union among them."""
    limits = [text.format(format_yaml(written[key])) for key, text in _LIMITS.items() if key in written]
    for member in written.get("anyOf", ()):
        limits += [limit for limit in _describe_limits(member) if limit not in limits]
    return limits


def _format_default(written: Mapping[str, Any]) -> str:
    """Format the default as YAML; that of a section is in its fields."""
    if "$ref" in written or "default" not in written:
        return "{}" if "$ref" in written or written.get("type") == "object" else ""
    default = written["default"]
    if isinstance(default, list) and len(default) == 1 and isinstance(default[0], Mapping):
        default = default[0].get("metric", default)
    return format_yaml(default)


def _choose_example(written: Mapping[str, Any]) -> Any:
    """Return a value that may be written, another than the default where the schema says which."""
    if "examples" in written:
        return written["examples"][0]
    default = written.get("default")
    if written.get("type") == "boolean":
        return not default
    if "const" in written:
        return written["const"]
    choices = next((m["enum"] for m in (written, *written.get("anyOf", ())) if "enum" in m), None)
    if choices:
        return next(choice for choice in choices if choice != default)
    return None if isinstance(default, Mapping) else default


def _tidy_description(description: str) -> str:
    """Return a description on one line that begins as a sentence does, unless with a name or a value."""
    text = " ".join(description.split()).removesuffix(".")
    first = re.match(r"[a-z'-]+(?=[ ,])", text)
    return text[0].upper() + text[1:] if first else text
