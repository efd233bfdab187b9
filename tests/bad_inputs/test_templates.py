"""Chat templates that give no usable text: each is refused by one line, within seconds."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preferences.tokens import rendering
from tests.support import tiny
from tests.support.bad_inputs import Commands, Workplace

CHAT = [
    {
        "prompt": [{"role": "user", "content": f"How is {n}?"}],
        "chosen": [{"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "assistant", "content": "Dull!"}],
    }
    for n in range(8)
]


def loop(levels: int) -> str:
    return "{% for i in range(99999) %}" * levels + "{% endfor %}" * levels


TEMPLATES: list[tuple[str, str, list[str]]] = [
    ("divides by zero", "{{ 1 / 0 }}", ["division by zero"]),
    ("is not closed", "{% for m in messages %}", ["endfor"]),
    ("ends within a tag", "{{ messages", ["end of template"]),
    ("has an unknown tag", "{% fro m in messages %}", ["fro"]),
    ("has an unknown filter", "{{ messages|upperr }}", ["upperr"]),
    ("raises", "{{ raise_exception('only for pictures') }}", ["only for pictures"]),
    (
        "raises in an answer",
        "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}",
        ["no"],
    ),
    ("reads what is not there", "{{ messages[9].content }}", []),
    ("calls a text", "{{ 'a'() }}", ["callable"]),
    ("adds a text and a number", "{{ 'a' + 1 }}", []),
    ("leaves the sandbox", "{{ ''.__class__.__mro__ }}", []),
    ("includes a file", "{% include '/etc/passwd' %}", []),
    ("imports a file", "{% import 'a' as b %}", []),
    ("calls itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["recursion"]),
    ("is nested 5,000 deep", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", []),
    ("loops in loops", loop(4), ["the policy", "has not come to an end", "chat_template"]),
    ("loops in two loops", loop(2), ["has not come to an end"]),
    ("takes a power without end", "{{ 9 ** 999999999999 }}", ["**"]),
    ("repeats a text without end", "{{ 'a' * 10000000000000 }}", []),
    ("says nothing", "{# a comment #}", ["chosen", "no tokens"]),
    ("says nothing of an empty if", "{% if false %}a{% endif %}", ["chosen"]),
    ("says the same for all", "Hello, {{ 'friend' }}", ["chosen"]),
    (
        "leaves out the answers",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        ["chosen"],
    ),
    ("says only how many messages there are", "{{ messages|length }}", []),
    ("gives half a character", tiny.CHATML.replace("<|im_start|>", "{{ '\\ud800' }}"), ["half"]),
    ("writes the last message alone", "{{ messages[-1].content }}", ["set another chat_template"]),
    (
        "writes messages backwards",
        "{% for m in messages|reverse %}{{ m.content }}{% endfor %}",
        ["set another chat_template"],
    ),
    (
        "writes a date in a format that it computes",
        "{{ strftime_now('%d' + '%m') }}" + tiny.CHATML,
        ["strftime_now"],
    ),
]


def write_chat(workplace: Workplace, template: str) -> None:
    workplace.write_rows(CHAT)
    workplace.write_run(policy={"chat_template": template})


@pytest.mark.parametrize(("template", "says"), [pytest.param(*case[1:], id=case[0]) for case in TEMPLATES])
def test_a_template_is_refused(
    workplace: Workplace, commands: Commands, monkeypatch: pytest.MonkeyPatch, template: str, says: list[str]
) -> None:
    monkeypatch.setattr(rendering, "MAX_RENDERING_S", 0.3)
    (workplace.folder / "chat.jinja").write_text(template)
    write_chat(workplace, "chat.jinja")
    commands.refuse("check", workplace.file, says=says)


FILES: list[tuple[str, str, Callable[[Path], Any], list[str]]] = [
    ("missing", "chat.jinja", lambda f: None, ["chat.jinja", "no such file"]),
    ("empty", "chat.jinja", lambda f: f.write_text(""), ["chat.jinja", "empty"]),
    ("blank", "chat.jinja", lambda f: f.write_text(" \n"), ["chat.jinja", "empty"]),
    ("binary", "chat.jinja", lambda f: f.write_bytes(b"\x89PNG\xff"), ["chat.jinja", "UTF-8"]),
    ("UTF-16", "chat.jinja", lambda f: f.write_text(tiny.CHATML, "utf-16"), ["chat.jinja", "UTF-8"]),
    ("a NUL", "chat.jinja", lambda f: f.write_bytes(bytes(100)), ["chat.jinja", "NUL"]),
    ("a folder", "chat.jinja", Path.mkdir, ["chat.jinja"]),
    ("a pipe", "chat.jinja", os.mkfifo, ["chat.jinja"]),
    ("a device", "chat.jinja", lambda f: f.symlink_to("/dev/zero"), ["no such file"]),
    ("a link in a circle", "./chat.jinja", lambda f: f.symlink_to(f), ["chat.jinja"]),
    ("a long name", "x" * 300, lambda f: None, ["no such file"]),
    ("a home of nobody", "~nouser/chat.jinja", lambda f: None, ["~nouser"]),
    ("neither file nor template", "chatml", lambda f: None, ["chatml", "no such file"]),
    ("a template in the run file that divides by zero", "{{ 1 / 0 }}", lambda f: None, ["division by zero"]),
    ("a brace alone", "{", lambda f: None, ["chosen"]),
]


@pytest.mark.parametrize(("given", "make", "says"), [pytest.param(*case[1:], id=case[0]) for case in FILES])
def test_a_template_file_is_refused(
    workplace: Workplace, commands: Commands, given: str, make: Callable[[Path], Any], says: list[str]
) -> None:
    make(workplace.folder / "chat.jinja")
    write_chat(workplace, given)
    commands.refuse("check", workplace.file, says=says)


OWN: list[tuple[str, bytes, list[str]]] = [
    ("divides by zero", b"{{ 1 / 0 }}", ["division by zero"]),
    ("is not UTF-8", b"\xff\xfe", ["tokenizer"]),
    ("loops", loop(4).encode(), ["has not come to an end"]),
]


@pytest.mark.parametrize(("template", "says"), [pytest.param(*case[1:], id=case[0]) for case in OWN])
def test_a_models_own_template_is_refused(
    workplace: Workplace,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama_folder: Path,
    template: bytes,
    says: list[str],
) -> None:
    monkeypatch.setattr(rendering, "MAX_RENDERING_S", 0.3)
    shutil.copytree(tiny_llama_folder, workplace.folder / "model")
    (workplace.folder / "model" / "chat_template.jinja").write_bytes(template)
    workplace.write_rows(CHAT)
    workplace.write_run(references={"models": {"base": {"model": "model"}}})
    commands.refuse("check", workplace.file, says=says)
