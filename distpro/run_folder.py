"""The folder of a run: its configuration and its history."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from distpro import parallel
from distpro.config import Config
from distpro.errors import UserError
from distpro.files import check_writable, read_yaml, whole_file

# Flags for where and how fast a run executes, which do not change what it computes.
NOT_RESULTS = (
    "resume",
    "dry_run",
    "output",
    "device",
    "threads",
    "workers",
    "config",
    "data",
    "cuda_graphs",
    "compile",
)


def check_folder(folder: Path, config: Config) -> None:
    """Raise a `UserError` if the folder is not writable or holds a run, except to --resume the same configuration."""
    if not parallel.is_primary():
        return
    check_writable(folder)
    there = (folder / "args.yaml").exists()
    if there and not config.resume:
        raise UserError(f"'{folder}' already contains a run: --resume it, or choose another --output")
    if there:
        same_run(folder, config)


def open_folder(folder: Path, config: Config) -> None:
    """Create the run folder, unless `check_folder` refuses it."""
    check_folder(folder, config)
    for left in folder.rglob(".*.part") if parallel.is_primary() else ():  # of a `whole_file` that was killed
        left.unlink(missing_ok=True)
    with whole_file(folder / "args.yaml") as part:
        part.write_text(yaml.safe_dump(replace(config, resume=False).plain(), sort_keys=False))


def same_run(folder: Path, config: Config) -> None:
    """Raise a `UserError` if a flag that changes results differs from that of the run in `folder`."""
    theirs = read_yaml(folder / "args.yaml", "configuration")
    for name, value in config.plain().items():
        # flags newer than the run are ignored
        if name in theirs and name not in NOT_RESULTS and theirs[name] != value:
            raise UserError(
                f"'{folder}' was started with {name} = {theirs[name]}, not {value}: "
                f"resume it as it was, or choose another --output"
            )


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Let Ctrl-C print how to resume the run in the folder."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with --resume --output {folder}") from None


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write `summary.csv`, one line per epoch of every method."""
    lines = [{"method": row["method"], **epoch} for row in rows for epoch in row["history"]]
    names = list(dict.fromkeys(name for line in lines for name in line))
    with whole_file(folder / "summary.csv") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
