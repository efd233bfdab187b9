"""The command `polyref explain`: what a field of a file means, and what other trainers' settings are here."""

import difflib
import shlex
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Annotated

import typer
import yaml

from orchestrator.config.fields import (
    ANY_NAME,
    ANY_NUMBER,
    FileField,
    find_fields,
    find_fields_by_name,
    format_yaml,
    list_fields,
    list_fields_of,
)
from orchestrator.config.other_trainers import BY_NAME, Counterpart
from orchestrator.config.run import build_run_schema
from orchestrator.config.sweep import build_sweep_schema
from orchestrator.errors import UsageError

_WIDTH = 80
_WITHIN = ("run.", "space.")
"""Prefixes of run-file fields in a sweep file and in its overrides."""


@cache
def _list_run_fields() -> list[FileField]:
    return list_fields(build_run_schema())


@cache
def _list_sweep_fields() -> list[FileField]:
    return list_fields(build_sweep_schema())


def list_field_names(incomplete: str) -> list[str]:
    """List what `polyref explain` takes, for shells that complete it."""
    fields = [*_list_run_fields(), *_list_sweep_fields()]
    names = dict.fromkeys([*(field.path for field in fields), *BY_NAME])
    return [name for name in names if name.startswith(incomplete)]


def list_run_overrides(incomplete: str) -> list[str]:
    """List overrides of a run file with their defaults, for shells that complete them."""
    return _complete_override(_list_run_fields(), incomplete)


def list_sweep_overrides(incomplete: str) -> list[str]:
    """List overrides of a sweep file and its run file with defaults, for shells that complete them."""
    own = _complete_override(_list_sweep_fields(), incomplete)
    if not "run.".startswith(incomplete[:4]):
        return own
    return [*own, *(f"run.{override}" for override in list_run_overrides(incomplete.removeprefix("run.")))]


def explain_command(
    field: Annotated[
        str | None,
        typer.Argument(
            help="A field such as training.pairs_per_step, a section, or another trainer's setting; "
            "without it the sections are listed.",
            autocompletion=list_field_names,
        ),
    ] = None,
) -> None:
    """Explain a field of the run file or of the sweep file, or list a section's fields."""
    for line in explain_field(field):
        print(line)


def explain_field(name: str | None) -> Iterator[str]:
    """Yield the lines that explain a field or a section by its dotted name, or both files without one.

    Raises:
        UsageError: there is no such field; names the nearest.
    """
    files = {
        "run file": _list_run_fields(),
        "sweep file": _list_sweep_fields(),
    }
    if name is None:
        yield from _list_files(files)
        return
    found = {file: _find_named_fields(fields, name) for file, fields in files.items()}
    counterpart = _find_counterpart(name)
    if counterpart is None and not any(found.values()):
        raise UsageError(_explain_unknown_name(name, files))
    blocks = [
        _explain_group(group, file, files[file])
        for file, fields in found.items()
        for group in _group_by_path(fields)
    ]
    if counterpart is not None:
        blocks.insert(0, _explain_counterpart(name, counterpart))
        if not any(found.values()):
            blocks += [
                _explain_group(_find_named_fields(files["run file"], path), "run file", files["run file"])
                for path in counterpart.fields
            ]
    for number, block in enumerate(blocks):
        if number:
            yield ""
        yield from block


def _find_counterpart(name: str) -> Counterpart | None:
    """Find another trainer's setting, unless it has the same name here."""
    counterpart = BY_NAME.get(name)
    if counterpart and name in {field.rpartition(".")[2] for field in counterpart.fields}:
        return None
    return counterpart


def _find_named_fields(fields: list[FileField], name: str) -> list[FileField]:
    """Find fields by path, by a path within a sweep, or by the last name alone."""
    for prefix in ("", *_WITHIN):
        if name.startswith(prefix) and (found := find_fields(fields, name.removeprefix(prefix))):
            return found
    return find_fields_by_name(fields, name)


def _group_by_path(fields: list[FileField]) -> list[list[FileField]]:
    """Group fields by path."""
    groups: dict[str, list[FileField]] = {}
    for field in fields:
        groups.setdefault(field.path, []).append(field)
    return list(groups.values())


def _list_files(files: dict[str, list[FileField]]) -> Iterator[str]:
    commands = {"run file": "polyref train, check, score", "sweep file": "polyref tune"}
    for file, fields in files.items():
        yield f"The {file} ({commands[file]})"
        yield from _list_table(list_fields_of(fields, ""))
        yield ""
    yield "polyref explain SECTION lists its fields, SECTION.FIELD explains one."


def _explain_counterpart(name: str, counterpart: Counterpart) -> list[str]:
    return _wrap_text(f"{name} is of other trainers. Here, {counterpart.remedy}.")


def _explain_group(variants: list[FileField], file: str, fields: list[FileField]) -> list[str]:
    """Return the lines on one path: a section with its fields, or a field under each type that has it."""
    first = variants[0]
    inner = list_fields_of(fields, first.path)
    is_section = first.type.startswith("section")
    lines = [f"{first.path}, a {'section' if is_section else 'field'} of the {file}"]
    for field in variants:
        if field.variants and field.name != "type":
            lines.append(f"  with type {' or '.join(field.variants)}:")
        lines += _wrap_text(f"{field.description}.", indent=2)
        lines += _explain_values(field)
    if inner:
        lines += ["", *([] if is_section else [f"fields of {inner[0].parent}"]), *_list_table(inner)]
    return lines


def _explain_values(field: FileField) -> Iterator[str]:
    """Yield the lines on what may be written; there are none for a section explained by its fields."""
    default = "required" if field.default is None else field.default
    if not field.is_section or not field.type.startswith("section"):
        attributes = {"type": field.type, "limits": field.limits, "default": default}
    else:
        attributes = {"default": default if default != "{}" else ""}
    if field.example is not None:
        attributes["example"] = field.example_line or ""
        if ANY_NUMBER not in field.path.split("."):
            attributes["override"] = _format_override(field)
    for label, text in attributes.items():
        if text:
            yield from _explain_attribute(label, text)


def _complete_override(fields: list[FileField], incomplete: str) -> list[str]:
    """List the beginnings of overrides; with the default, where a shell takes it without quotes."""
    overrides = {}
    for field in fields:
        if field.example is not None and not {ANY_NAME, ANY_NUMBER} & set(field.path.split(".")):
            whole = f"{field.path}={field.default or ''}"
            overrides[field.path] = whole if shlex.quote(whole) == whole else f"{field.path}="
    return [override for override in overrides.values() if override.startswith(incomplete)]


def _format_override(field: FileField) -> str:
    """Format the example as it is written on the command line."""
    value = field.example
    is_plain = isinstance(value, str) and yaml.safe_load(value) == value
    return shlex.quote(f"{field.path}={value if is_plain else format_yaml(value)}")


def _explain_attribute(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"  {label:<10}",
        subsequent_indent=" " * 12,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _list_table(fields: list[FileField]) -> Iterator[str]:
    """Yield two columns: names, and what they mean with their defaults."""
    width = max(len(field.name) for field in fields) + 2
    for field in fields:
        kinds, notes = ", ".join(field.variants), []
        description = field.description
        if kinds and field.name == "type":
            description = f"{kinds}: {description}"
        elif kinds:
            notes.append(f"with type {kinds}")
        if field.default is None and not (kinds and field.name == "type"):
            notes.append("required")
        elif field.default and field.default not in ("{}", "[]") and field.name != "type":
            notes.append(f"default {field.default}")
        yield from textwrap.wrap(
            f"{description} ({'; '.join(notes)})" if notes else description,
            _WIDTH,
            initial_indent=f"  {field.name:<{width}}",
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
        )


def _explain_unknown_name(name: str, files: dict[str, list[FileField]]) -> str:
    paths = dict.fromkeys(field.path for fields in files.values() for field in fields)
    last_names = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    near = difflib.get_close_matches(name[:100], paths, n=3)
    near_names = difflib.get_close_matches(name.rpartition(".")[2][:100], [*last_names, *BY_NAME], n=3)
    near = list(dict.fromkeys([*near, *near_names]))[:3]
    shown = textwrap.shorten(name, 100, placeholder="...")
    nearest = f"the nearest are {', '.join(near)}" if near else "polyref explain lists the sections"
    return f"there is no field {shown!r}; {nearest}"


def _wrap_text(text: str, indent: int = 0) -> list[str]:
    prefix = " " * indent
    return textwrap.wrap(
        text, _WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
    )
