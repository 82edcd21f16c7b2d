"""The rows of a comparison, one per method, and the formatting of its words and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
PHRASES = {"none": "training alone", "uniform": "uniform weights"}  # what a searched process must beat


def number(value: Any) -> float:
    """`value` as a float; NaN if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


@dataclass(frozen=True)
class Entry:
    """One method of the comparison."""

    row: Row

    @property
    def method(self) -> str:
        return str(self.row.get("method") or "")

    @property
    def label(self) -> str:
        return str(self.row.get("label") or self.method)

    @property
    def phrase(self) -> str:
        """The method as named within a sentence."""
        return "the searched process" if self.label == "searched process" else PHRASES.get(self.method, self.label)

    def value(self, key: str) -> float:
        """The number under `key`; NaN if there is none, for example because the training diverged."""
        return number(self.row.get(key))

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Epochs, and `key` at each."""
        points = [(number(point.get("epoch")), number(point.get(key))) for point in self.row.get("history") or ()]
        known = sorted(point for point in points if math.isfinite(point[0]))
        return [epoch for epoch, _ in known], [value for _, value in known]


def find(entries: Sequence[Entry], method: str) -> Entry | None:
    """The first entry of this method."""
    return next((entry for entry in entries if entry.method == method), None)


def decimal(value: float, digits: int = 2) -> str:
    """`97.24`, or a dash if `value` is not finite."""
    return f"{value:.{digits}f}".replace("-", MINUS) if math.isfinite(value) else MISSING


def signed(value: float, digits: int = 2) -> str:
    """`+1.90`, `−0.40`, `±0.00`, or a dash; the sign is that of the rounded number."""
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
    """One fact, formatted for a reader; the `name` of a number determines its unit."""
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


def headline(student: str, entries: Sequence[Entry]) -> str:
    """The result in one sentence: what the searched process (else the last method) reaches, and its lead."""
    main = find(entries, "distpro") or entries[-1]
    name, top1 = main.phrase, main.value("top1")
    if not math.isfinite(top1):
        return f"{student} has no accuracy with {name}: the training diverged."
    leads: list[str] = []
    for method, phrase in PHRASES.items():
        other = find(entries, method)
        if other is None or other is main or not math.isfinite(other.value("top1")):
            continue
        lead = signed(top1 - other.value("top1"), 1)
        points = "" if leads else " points"
        leads.append(f"{lead}{points} {'over' if lead[0] == '+' else 'against'} {phrase}")
    return f"{student} reaches {decimal(top1, 1)} % with {name}{': ' if leads else ''}{', '.join(leads)}."


def remarks(entries: Sequence[Entry], teacher: Mapping[str, Any] | None) -> list[str]:
    """What a reader should know besides the headline: a better method, the teacher, the cost, the single seed."""
    main = find(entries, "distpro") or entries[-1]
    notes = []
    rivals = [entry for entry in entries if entry.value("top1") > main.value("top1")]
    if rivals:
        best = max(rivals, key=lambda entry: entry.value("top1"))
        notes.append(f"The best method here is {best.phrase}, with {decimal(best.value('top1'), 1)} %.")
    if teacher and math.isfinite(number(teacher.get("top1"))):
        notes.append(f"The teacher{_named(teacher)} has {decimal(number(teacher['top1']), 1)} %.")
    search, distil = main.value("search_seconds"), main.value("seconds")
    if search > 0 and math.isfinite(distil):
        notes.append(f"The search took {duration(search)}, the distillation {duration(distil)}.")
    notes.append(f"One seed{' each' if entries[1:] else ''} (n = 1): small differences may be due to chance.")
    return notes


def _named(network: Mapping[str, Any]) -> str:
    return f", {network['name']}," if network.get("name") else ""
