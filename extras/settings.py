"""One mechanism for settings: what a dataclass field says of itself decides how it is read, checked
and explained, and whether a resumed run may change it.

A field's annotation is its type (`Literal[...]`: its choices). Its metadata, as `setting` of
this file, data.py and model.py writes it: help; least, most, above, below (bounds of a number, or
of each number of a list); free (a resumed run may change it); group (a heading starts here).
"""

import dataclasses
import difflib
import json
import operator
import textwrap
import tomllib
import typing

BOUNDS = {
    "least": (operator.ge, "at least"),
    "most": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}


def setting(default, help: str, **rules):
    """A field of a settings class; data.py and model.py, which stand alone, have their own copy."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help, **rules})
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def misfits(kind: type, table: dict) -> dict[str, str]:
    """key -> what is wrong with it by itself, where a table is to become a `kind`."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    wrong = {}
    for key, value in table.items():
        if key not in fields:
            wrong[key] = f"unknown key {key!r}{did_you_mean(key, list(fields))}"
        elif not fits(value, fields[key].type):
            wrong[key] = f"{key} = {show(value)} is not {wording(fields[key].type)}"
        elif problem := out_of_bounds(value, fields[key].metadata):
            wrong[key] = f"{key} = {show(value)} must be {problem}"
    return wrong


def did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f", did you mean {near[0]!r}?" if near else ""


def fits(value, annotation) -> bool:
    """Is a TOML value of the annotated type? A whole number is a float; a list is a tuple."""
    kind, inside = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is typing.Literal:
        return value in inside
    if kind is float:
        return type(value) in (int, float) and -1e300 < value < 1e300  # neither inf nor nan
    if kind not in (list, tuple):
        return type(value) is kind
    if type(value) not in (list, tuple):
        return False
    if kind is tuple and inside and inside[-1] is not Ellipsis:
        return len(value) == len(inside) and all(map(fits, value, inside))
    return not inside or all(fits(one, inside[0]) for one in value)


def wording(annotation) -> str:
    """The type as a sentence names it."""
    kind, inside = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is typing.Literal:
        return "one of " + ", ".join(map(str, inside))
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if kind in words:
        return words[kind]
    if kind is dict:
        return "a table"
    if kind is tuple and inside and inside[-1] is not Ellipsis:
        return f"a list of {len(inside)} numbers"
    return "a list of " + {int: "whole numbers", float: "numbers", str: "texts"}.get(
        inside[0] if inside else None, "values"
    )


def out_of_bounds(value, metadata) -> str:
    """The bound that a number, or a number of a list, breaks; "" if none."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    for name, (holds, words) in BOUNDS.items():
        if name not in metadata:
            continue
        for number in numbers:
            if not holds(number, metadata[name]):
                return f"{words} {metadata[name]}"
    return ""


def value_of(text: str, kind: type, key: str):
    """The TOML value that a text on the command line spells; a bare word is a string."""
    if kind.__annotations__.get(key) is str:
        return text
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def free_keys(kind: type) -> set[str]:
    """What a resumed run may change."""
    return {field.name for field in dataclasses.fields(kind) if field.metadata.get("free")}


def show(value) -> str:
    """A value as TOML spells it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {show(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, (str, bool)):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def describe(kind: type, prefix: str = "--", leave_out: tuple[str, ...] = ()) -> str:
    """The settings of a class as `--help` shows them, each with default, choices and bounds."""
    lines = []
    for field in dataclasses.fields(kind):
        if field.name in leave_out:
            continue
        if "group" in field.metadata:
            lines.append(f"\n{field.metadata['group']}:")
        rules = []
        if typing.get_origin(field.type) is typing.Literal:
            rules.append(" | ".join(str(choice) or '""' for choice in typing.get_args(field.type)))
        for name, (_, words) in BOUNDS.items():
            if name in field.metadata:
                rules.append(f"{words} {field.metadata[name]}")
        if field.default is not dataclasses.MISSING:
            rules.append(f"default {show(field.default)}")
        elif field.default_factory is not dataclasses.MISSING:
            rules.append(f"default {show(field.default_factory())}")
        else:
            rules.append("needed")
        text = f"{field.metadata.get('help', '')} ({'; '.join(rules)})"
        head = f"  {prefix}{field.name.replace('_', '-') if prefix == '--' else field.name}"
        wrapped = textwrap.wrap(text, initial_indent=" " * 26, subsequent_indent=" " * 26,
                                break_long_words=False, width=100)  # fmt: skip
        if len(head) < 25:
            wrapped[0] = head + wrapped[0][len(head) :]
        else:
            lines.append(head)
        lines += wrapped
    return "\n".join(lines)
