"""The rows of a comparison, put together by method, and the words and numbers a reader sees."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
PHRASES = {"none": "training alone", "uniform": "uniform weights"}  # what a searched process must beat


def number(value: Any) -> float:
    """`value` as a float; NaN for None and for whatever is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


@dataclass(frozen=True)
class Entry:
    """One method of the comparison; each of its rows is one seed."""

    method: str
    label: str
    rows: tuple[Row, ...]

    @property
    def phrase(self) -> str:
        """The method inside a sentence."""
        return "the searched process" if self.label == "searched process" else PHRASES.get(self.method, self.label)

    def values(self, key: str) -> list[float]:
        """The finite values of `key`, one a seed that has it."""
        values = (number(row.get(key)) for row in self.rows)
        return [value for value in values if math.isfinite(value)]

    def mean(self, key: str) -> float:
        """The mean of `key` over the seeds; NaN where a seed has none, for example since it diverged."""
        values = self.values(key)
        return statistics.fmean(values) if len(values) == len(self.rows) else math.nan

    def spread(self, key: str) -> float:
        """The standard deviation of `key` over the seeds; NaN for fewer than two."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def show(self, key: str, digits: int = 2) -> str:
        """The mean of `key`, and its spread where there are several seeds: `97.24 ± 0.17`."""
        spread = self.spread(key)
        return decimal(self.mean(key), digits) + (f" ± {decimal(spread, digits)}" if spread >= 0 else "")

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Epochs, and the mean of `key` over the seeds at each."""
        at: dict[float, list[float]] = {}
        for row in self.rows:
            for point in row.get("history") or ():
                at.setdefault(number(point.get("epoch")), []).append(number(point.get(key)))
        epochs = sorted(epoch for epoch in at if math.isfinite(epoch))
        return epochs, [statistics.fmean(at[epoch]) for epoch in epochs]


def by_method(rows: Iterable[Row]) -> list[Entry]:
    """Rows of one method and label are seeds of one entry; the order of the first rows stays."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        method = str(row.get("method") or "")
        groups.setdefault((method, str(row.get("label") or method)), []).append(row)
    return [Entry(method, label, tuple(group)) for (method, label), group in groups.items()]


def find(entries: Sequence[Entry], method: str) -> Entry | None:
    """The first entry of this method."""
    return next((entry for entry in entries if entry.method == method), None)


def decimal(value: float, digits: int = 2) -> str:
    """`97.24`, or a dash where there is no number."""
    return f"{value:.{digits}f}".replace("-", MINUS) if math.isfinite(value) else MISSING


def signed(value: float, digits: int = 2) -> str:
    """`+1.90`, `−0.40`, `±0.00`, or a dash; the sign is that of the number shown."""
    if not math.isfinite(value):
        return MISSING
    text = f"{value:+.{digits}f}"
    return f"±{text[1:]}" if float(text) == 0 else text.replace("-", MINUS)


def duration(seconds: float) -> str:
    """`12.3 s`, `4 min 10 s`, `2 h 05 min`, or a dash."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def quantity(count: float) -> str:
    """A number of parameters: `78.3 k`, `2.26 M`, or a dash."""
    if not math.isfinite(count):
        return MISSING
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def fact(name: str, value: Any) -> str:
    """One fact as a reader wants it: the `name` of a number tells its unit."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {fact(str(key), item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(fact(name, item) for item in value)
    if value is None or value == "" or value != value:  # NaN
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name in UNITS:
        return UNITS[name](value)
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"


UNITS: dict[str, Callable[[float], str]] = {
    "top1": lambda value: f"{decimal(value)} %",
    "top5": lambda value: f"{decimal(value)} %",
    "params": quantity,
    "seconds": duration,
}


def seeds(entries: Sequence[Entry]) -> str:
    """How many seeds stand behind the numbers: `n = 1`, or `n = 1 to 3`."""
    counts = sorted({len(entry.rows) for entry in entries})
    return f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")


def headline(student: str, entries: Sequence[Entry]) -> str:
    """The answer in one sentence: what the searched process (else the last method) reaches, and its lead."""
    main = find(entries, "distpro") or entries[-1]
    name, top1 = main.phrase, main.mean("top1")
    if not math.isfinite(top1):
        return f"{student} has no accuracy with {name}: the training gave no finite number."
    leads: list[str] = []
    for method, phrase in PHRASES.items():
        other = find(entries, method)
        if other is None or other is main or not math.isfinite(other.mean("top1")):
            continue
        lead = signed(top1 - other.mean("top1"), 1)
        points = "" if leads else " points"
        leads.append(f"{lead}{points} {'over' if lead[0] == '+' else 'against'} {phrase}")
    return f"{student} reaches {main.show('top1', 1)} % with {name}{': ' if leads else ''}{', '.join(leads)}."


def remarks(entries: Sequence[Entry], teacher: Mapping[str, Any] | None) -> list[str]:
    """What a reader should know beside the headline: a better method, the teacher, the cost, the seeds."""
    main = find(entries, "distpro") or entries[-1]
    told = []
    rivals = [entry for entry in entries if entry.mean("top1") > main.mean("top1")]
    if rivals:
        best = max(rivals, key=lambda entry: entry.mean("top1"))
        told.append(f"The best method here is {best.phrase}, with {best.show('top1', 1)} %.")
    if teacher and math.isfinite(number(teacher.get("top1"))):
        told.append(f"The teacher{_named(teacher)} has {decimal(number(teacher['top1']), 1)} %.")
    search, distil = main.mean("search_seconds"), main.mean("seconds")
    if search > 0 and math.isfinite(distil):
        told.append(f"The search took {duration(search)}, the distillation {duration(distil)}.")
    single = [entry.label for entry in entries if len(entry.rows) == 1]
    if len(single) == len(entries):
        told.append(f"One seed{' each' if single[1:] else ''} (n = 1): small differences may be chance.")
    elif single:
        told.append(f"One seed only (n = 1) for {', '.join(single)}.")
    return told


def _named(network: Mapping[str, Any]) -> str:
    return f", {network['name']}," if network.get("name") else ""
