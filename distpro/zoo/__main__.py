"""`python -m distpro.zoo`: list the processes and teachers that come with distpro, or show one process's weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distpro.errors import UserError, run_command
from distpro.process import Process
from distpro.report import save_figure
from distpro.zoo import KINDS, PREFIX, facts, names, process_file

COLUMNS = {
    "process": ("teacher", "student", "dataset", "epochs", "hypergradient", "date", "top1", "top1_uniform"),
    "teacher": ("model", "dataset", "top1", "epochs", "date", "licence"),
}
WIDTH = 160  # if the output is not a terminal
MOMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the training, at which a process's weights are printed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distpro.zoo", description=__doc__)
    parser.add_argument(
        "process", nargs="?", help="zoo:NAME or FILE: show the weights of this process instead of the list"
    )
    parser.add_argument("--figure", type=Path, help="draw the process into this file (.svg, .png)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if arguments.process is not None:
        _show(Process.load(process_file(arguments.process)), arguments.figure, arguments.json, console)
    elif arguments.figure is not None:
        raise UserError("--figure draws one process: name it, for instance zoo:" + names("process")[0])
    else:
        _list(arguments.json, console)


def _list(as_json: bool, console: Console) -> None:
    known = {kind: {name: facts(kind, name) for name in names(kind)} for kind in KINDS}
    if as_json:
        print(json.dumps(known, indent=2))
        return
    for kind, entries in known.items():
        table = Table(title=f"--{kind}", title_justify="left")
        table.add_column("NAME", no_wrap=True)
        for heading in COLUMNS[kind]:
            table.add_column(heading.replace("_", " "))
        for name, entry in entries.items():
            table.add_row(PREFIX + name, *(str(entry.get(column, "")) for column in COLUMNS[kind]))
        console.print(table if entries else f"no {kind} yet")


def _show(process: Process, figure: Path | None, as_json: bool, console: Console) -> None:
    """Print every pathway's weight over the training, and the process's provenance."""
    if figure is not None:
        save_figure(process.plot(), figure)
    weights = [process.at(moment).tolist() for moment in MOMENTS]
    rows = dict(zip((pathway.name for pathway in process.pathways), zip(*weights, strict=True), strict=True))
    if as_json:
        print(json.dumps({"facts": process.facts, "moments": MOMENTS, "weights": rows}, indent=2))
    else:
        console.print(process)
        table = Table(caption="-: dropped", caption_justify="left")
        table.add_column("pathway")
        for moment in MOMENTS:
            table.add_column(f"{moment:.0%}", justify="right")
        for name, values in rows.items():
            table.add_row(name, *(f"{value:.4f}" if value else "-" for value in values))
        console.print(table)
        for key, value in process.facts.items():
            console.print(f"{key}: {value}", markup=False)


if __name__ == "__main__":
    run_command(main)
