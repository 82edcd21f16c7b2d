"""What the committed CSVs hold."""

import csv
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks/results"


def measured(name, column="top1", **labels):
    """A column by seed, of the rows of a CSV that have these labels."""
    with (RESULTS / name).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if labels.items() <= row.items()]
    assert rows, labels
    return {row["seed"]: float(row[column]) for row in rows}
