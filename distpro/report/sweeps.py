"""The table, the CSV and the figure of a sweep."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.special import stdtrit

from distpro.errors import UserError
from distpro.files import whole_file
from distpro.report.figures import MUTED, PAPER, STYLE, hues
from distpro.report.results import decimal, duration, number, signed

Row = Mapping[str, Any]
REST = ("seed", "top1", "top5", "teacher_top1", "train_seconds", "search_seconds", "device", "commit", "command")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per run: the axes of the sweep, then seed, accuracies in %, seconds, device, commit, command."""
    with whole_file(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else REST, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _read(rows: Path | Sequence[Row]) -> Sequence[Row]:
    """The rows of a CSV file, or `rows` itself."""
    if not isinstance(rows, Path):
        return rows
    if not rows.is_file():
        raise UserError(f"no file '{rows}': expected a CSV that distpro.sweep wrote")
    with rows.open(newline="") as file:
        read = list(csv.DictReader(file))
    if read and not set(REST[:5]) <= set(read[0]):
        raise UserError(
            f"'{rows}' is not a CSV of distpro.sweep: it lacks {', '.join(sorted(set(REST[:5]) - set(read[0])))}"
        )
    return read


def _cells(rows: Sequence[Row], axes: Sequence[str]) -> dict[tuple[str, ...], dict[str, Row]]:
    """The rows, keyed by their labels on the axes, then by seed."""
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        missing = [axis for axis in axes if axis not in row]
        if missing:
            raise UserError(f"the results lack the axis '{missing[0]}': are they from another sweep?")
        cells.setdefault(tuple(str(row[axis]) for axis in axes), {})[str(row["seed"])] = row
    return cells


def _mean(rows: Iterable[Row], key: str) -> float:
    values = [number(row[key]) for row in rows]
    return statistics.fmean(values) if values else math.nan


def sweep_table(rows: Path | Sequence[Row], axes: Sequence[str], compare: Sequence[tuple[str, str]] = ()) -> str:
    """A Markdown table: one line per combination of labels, with mean ± standard deviation over the seeds.

    Accuracy is that of the last epoch. Below it, for each of `compare` (two labels of the axis "method") and each
    combination of the other axes, the difference between equal seeds: mean ± standard error, and the 95 % confidence
    interval if the differences are normally distributed.
    """
    rows = _read(rows)
    if not rows:
        return "No run is finished yet."
    cells = _cells(rows, axes)
    shown = [axis for axis in axes if len({str(row[axis]) for row in rows}) > 1 or axis == "method"]
    columns = {"top1": "top-1, %", "top5": "top-5, %"}
    if not any(math.isfinite(number(row["top5"])) for row in rows):
        del columns["top5"]
    head = [*shown, *columns.values(), "n", "training", "search"]
    lines = [head, ["---"] * len(shown) + ["---:"] * (len(columns) + 3)]
    for labels, seeds in cells.items():
        of = list(seeds.values())
        search = _mean(of, "search_seconds")
        lines.append(
            [
                *(label for axis, label in zip(axes, labels, strict=True) if axis in shown),
                *(_spread([number(row[key]) for row in of]) for key in columns),
                str(len(of)),
                duration(_mean(of, "train_seconds")),
                duration(search) if search else "",
            ]
        )
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    differences = _differences(cells, axes, shown, compare)
    devices = sorted({str(row["device"]) for row in rows})
    gpus = any("CPU thread" not in device for device in devices)
    unit = " (of one GPU for each run: GPU-seconds)" if gpus else ""
    return f"{text}\n{differences}\nTimes are wall seconds{unit} on: {'; '.join(devices)}."


def _spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return decimal(statistics.fmean(values)) + (f" ± {decimal(spread)}" if math.isfinite(spread) else "")


def _differences(
    cells: Mapping[tuple[str, ...], Mapping[str, Row]],
    axes: Sequence[str],
    shown: Sequence[str],
    compare: Sequence[tuple[str, str]],
) -> str:
    if not compare:
        return ""
    place = list(axes).index("method")
    lines = [""]
    for ours, theirs in compare:
        for labels, seeds in cells.items():
            other = cells.get((*labels[:place], theirs, *labels[place + 1 :]), {})
            shared = [seed for seed in seeds if seed in other]
            if labels[place] != ours or not shared:
                continue
            gains = [number(seeds[seed]["top1"]) - number(other[seed]["top1"]) for seed in shared]
            where = [f"{axis} {labels[i]}" for i, axis in enumerate(axes) if axis in shown and i != place]
            at = f" at {', '.join(where)}" if where else ""
            lines.append(f"- {ours} against {theirs}{at}: {_gain(gains)}")
    return "\n".join([*lines, ""])


def _gain(values: Sequence[float]) -> str:
    """The mean, its standard error and interval by Student's t (two-sided), and the number of seeds."""
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return f"{signed(mean)}, n = 1 seed"
    error = statistics.stdev(values) / math.sqrt(count)
    reach = error * float(stdtrit(count - 1, 0.975))
    interval = f"standard error; 95 % interval {signed(mean - reach)} to {signed(mean + reach)}"
    return f"{signed(mean)} ± {decimal(error)} ({interval}), n = {count} seeds"


@matplotlib.rc_context(STYLE)
def sweep_figure(rows: Path | Sequence[Row], axes: Sequence[str]) -> Figure:
    """The paper's Fig. 5: accuracy against the cost of training, search included; one line per method.

    If there was a search, a thin dashed line has the cost without it, as with a process that already exists. If
    "kd_weight" is an axis, it replaces the cost. One panel for each combination of the axes other than "method",
    "epochs" and "kd_weight"; error bars are the standard deviation.
    """
    rows = _read(rows)
    cells = _cells(rows, axes)
    across = "kd_weight" if "kd_weight" in axes else None
    apart = [axis for axis in axes if axis not in ("method", "epochs", across)]
    panels = list(dict.fromkeys(tuple(str(row[axis]) for axis in apart) for row in rows))
    methods = list(dict.fromkeys(str(row.get("method", "")) for row in rows))
    colour = dict(zip(methods, hues(len(methods)), strict=True))
    figure = Figure(
        figsize=(1.6 + 4.4 * max(1, len(panels)), 3.8), layout=ConstrainedLayoutEngine(h_pad=0.07), facecolor=PAPER
    )
    drawn = figure.subplots(1, max(1, len(panels)), squeeze=False, sharey=across is not None)[0]
    for axis, panel in zip(drawn, panels, strict=False):
        for method in methods:
            points = []
            for labels, seeds in cells.items():
                at = dict(zip(axes, labels, strict=True))
                if at.get("method", "") == method and tuple(at[name] for name in apart) == panel:
                    of = list(seeds.values())
                    top1 = [number(row["top1"]) for row in of]
                    spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
                    cost, search = _mean(of, "train_seconds"), _mean(of, "search_seconds")
                    place = number(at[across]) if across else cost + search
                    points.append((place, statistics.fmean(top1), spread, cost, search))
            if points:
                places, means, spreads, costs, searches = zip(*sorted(points), strict=True)
                axis.errorbar(places, means, spreads, color=colour[method], marker="o", markersize=4, capsize=2,
                              label=method)  # fmt: skip
                if any(searches) and not across:
                    axis.plot(costs, means, color=colour[method], linestyle="--", linewidth=0.9,
                              label=f"{method}, without the search")  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        if across:
            axis.set_xticks(sorted({number(row[across]) for row in rows}))
        axis.set_xlabel(across or "seconds of training and search")
        axis.set_title(", ".join(panel))
    drawn[0].set_ylabel("top-1 after the last epoch (%)")
    legend = {label: line for axis in drawn for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", labelcolor=MUTED)
    return figure
