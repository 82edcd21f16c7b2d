"""The configuration as command-line flags and as keys of --config files, with one parser for both."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tyro

from distpro.config import DEFAULTS_DEPEND_ON, Config, Filled, explicit_values, fill
from distpro.errors import UserError, flag, unknown
from distpro.files import read_yaml


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
    config = tyro.cli(Config, prog=f"python -m {program}", args=_capital(words))
    if config.dry_run and program != "distpro.train":
        raise UserError(f"--dry-run is only supported by distpro.train, not by {program}")
    if program == "distpro.search":  # whatever a training's file says: no other method has to fit the pair
        config = replace(config, method="distpro", process="search")
    return fill(config)


def _capital(words: Sequence[str]) -> list[str]:
    """Capitalise the values of optional booleans, as tyro expects: `--pooled True`."""
    optional = {flag(field.name) for field in fields(Config) if field.type == "bool | None"}
    pairs = zip(["", *words], words, strict=False)
    return [word.capitalize() if word in ("true", "false") and before in optional else word for before, word in pairs]


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
        if isinstance(value, bool) and field.default is None:
            words += [word, str(value)]
        elif isinstance(value, bool):
            words.append(word if value else word.replace("--", "--no-", 1))
        elif isinstance(value, (list, tuple)):
            words += [word, *map(str, value)]
        elif value is not None:
            words += [word, str(value)]
    return words
