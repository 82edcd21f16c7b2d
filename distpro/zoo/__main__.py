"""`python -m distpro.zoo`: the processes and teachers that come with distpro."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table

from distpro.errors import run_command
from distpro.zoo import KINDS, facts, names

COLUMNS = {
    "process": ("teacher", "student", "dataset", "epochs", "hypergradient", "date", "top1", "top1_uniform"),
    "teacher": ("model", "dataset", "top1", "epochs", "date", "licence"),
}


WIDTH = 160  # where the output is no terminal


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distpro.zoo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print everything that is known as one JSON object")
    arguments = parser.parse_args()
    known = {kind: {name: facts(kind, name) for name in names(kind)} for kind in KINDS}
    if arguments.json:
        print(json.dumps(known, indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    for kind, entries in known.items():
        table = Table(title=f"--{kind} zoo:NAME", title_justify="left")
        table.add_column("NAME", no_wrap=True)
        for heading in COLUMNS[kind]:
            table.add_column(heading.replace("_", " "))
        for name, told in entries.items():
            table.add_row(name, *(str(told.get(column, "")) for column in COLUMNS[kind]))
        console.print(table if entries else f"no {kind} yet")


if __name__ == "__main__":
    run_command(main)
