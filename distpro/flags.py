"""Dataclasses as command-line flags, and the configuration's also as keys of --config files, with one parser."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro

from distpro.config import DEFAULTS_DEPEND_ON, Config, Filled, explicit_values, fill
from distpro.errors import UserError, flag, unknown
from distpro.files import read_yaml

T = TypeVar("T")


def command_line(kind: type[T], program: str, words: Sequence[str] | None = None) -> T:
    """Return a dataclass from the words of a command line (default: this process's); the fields' docstrings are --help.

    tyro alone offers None as a value.
    """
    shown: type[T] = _with_help(kind)  # type: ignore[arg-type]  # mypy takes no type for hashable
    return tyro.cli(shown, prog=f"python -m {program}", args=words, config=(tyro.conf.DisallowNone,))


@cache
def _with_help(kind: type[Any]) -> type[Any]:
    """Annotate the fields: tyro alone keeps the line breaks of their docstrings, and shows None as a default."""
    texts = {param.arg_name: param.description or "" for param in docstring_parser.parse_from_object(kind).params}
    hints, annotated = get_type_hints(kind, include_extras=True), []
    for field in fields(kind):
        text, shown = " ".join(texts[field.name].split()), "" if field.default in (None, ()) else None
        described = tyro.conf.arg(help=text, help_behavior_hint=shown)
        annotated.append((field.name, Annotated[hints[field.name], described]))  # the defaults are inherited
    return make_dataclass(kind.__name__, annotated, bases=(kind,), namespace={"__doc__": kind.__doc__}, frozen=True)


def parse(arguments: Sequence[str] | None = None, program: str = "distpro.train") -> Filled:
    """Parse a command line: its flags override the keys of the --config file, which override the defaults.

    Unknown flags and values end the program with exit code 2 and tyro's suggestion of the nearest valid ones.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    file = _config_file(words)
    if file is not None:
        values = read_yaml(file, "configuration file")
        given = {word.partition("=")[0] for word in words}
        if values.keys() >= {field.name for field in fields(Config)} and given & set(map(flag, DEFAULTS_DEPEND_ON)):
            values = explicit_values(values)  # a run's args.yaml: defaults that depend on these flags are derived anew
        words = [*as_flags(values, str(file)), *words]
    config = command_line(Config, program, _switches(words))
    if config.dry_run and program != "distpro.train":
        raise UserError(f"--dry-run is only supported by distpro.train, not by {program}")
    if program == "distpro.search":  # whatever a training's file says: no other method has to fit the pair
        config = replace(config, method="distpro", process="search")
    return fill(config)


def _switches(words: Sequence[str]) -> list[str]:
    """Write `--pooled True` and `--pooled=false`, which are accepted as well, as the flags that tyro knows."""
    names = {flag(field.name) for field in fields(Config) if field.type in ("bool", "bool | None")}
    switches: list[str] = []
    for word in words:
        name, equals, value = word.rpartition("=")
        if not equals and switches:
            name = switches[-1]
        if name in names and value.lower() in ("true", "false"):
            if not equals:
                switches.pop()
            word = name if value.lower() == "true" else name.replace("--", "--no-", 1)
        switches.append(word)
    return switches


def _config_file(words: Sequence[str]) -> Path | None:
    pairs = [(*word.partition("="), following) for word, following in zip(words, [*words[1:], ""], strict=False)]
    files = [value if equals else following for name, equals, value, following in pairs if name == "--config"]
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times: expected one file")
    return Path(files[0]) if files else None


def as_flags(values: Mapping[str, Any], where: str) -> list[str]:
    """Return values by name as words of a command line, so that one parser checks both.

    where: the source of the values, for error messages.
    """
    words: list[str] = []
    known = {field.name: field for field in fields(Config)}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise unknown(f"key in '{where}':", str(key), known)
        word, field = flag(name), known[name]
        if isinstance(value, (list, tuple)) and "tuple" not in str(field.type):
            raise UserError(f"key '{key}' in '{where}' has several values ({', '.join(map(str, value))}): expected one")
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise UserError(f"key '{key}' in '{where}' is {value!r}: expected true or false")
        if isinstance(value, bool):
            words.append(word if value else word.replace("--", "--no-", 1))
        elif isinstance(value, (list, tuple)):
            words += [word, *map(str, value)]
        elif value is not None:
            words += [word, str(value)]
    return words
