"""The searched processes and trained teachers that ship with distpro, each with its provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from distpro.errors import unknown

PREFIX = "zoo:"
ROOT = Path(__file__).parent
KINDS = {"process": ROOT / "processes", "teacher": ROOT / "teachers"}


def names(kind: str) -> list[str]:
    """The names of a kind, "process" or "teacher", such as "cifar100/wrn_16_2"."""
    root = KINDS[kind]
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.safetensors"))


def find(kind: str, name: str) -> Path:
    """The file of `zoo:NAME` or NAME; for an unknown name, a `UserError` with the nearest ones."""
    name = name.removeprefix(PREFIX)
    if name not in names(kind):
        raise unknown(f"{kind} of the zoo", name, names(kind))
    return KINDS[kind] / f"{name}.safetensors"


def process_file(named: str) -> Path:
    """The file that `zoo:NAME` or a path names."""
    return find("process", named) if named.startswith(PREFIX) else Path(named)


def facts(kind: str, name: str) -> dict[str, Any]:
    """The metadata in the file: pair, data, date, command, accuracies."""
    with safe_open(find(kind, name), framework="pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata["process"])["facts"] if kind == "process" else json.loads(metadata.get("facts", "{}"))
