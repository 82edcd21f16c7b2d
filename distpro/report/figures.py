"""The figures of a report: a process over time (the paper's Fig. 6) and accuracy over the epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from distpro.errors import UserError
from distpro.files import whole_file
from distpro.report.results import Entry, Row, decimal

if TYPE_CHECKING:
    from distpro.process import Process

POINTS = 401  # points drawn of a process: one every 0.25 %, about one per pixel of a panel
INK, MUTED, GRID, PAPER = "#1d2430", "#68707c", "#e2e5ea", "#fefefe"  # the HTML page substitutes its own
HUES = ("#1f77b4", "#e6842a", "#2a9d6f", "#c2508f", "#8a63d2", "#b0902c", "#3fa7c4", "#8d6e63")
SHADES = LinearSegmentedColormap.from_list("stages", ["#c9d3e6", "#8c9cc4", "#4d5d94"])
DOTS = (0, (2, 2))
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (12, 2)))
STYLE: Any = {  # only while drawing: the user's own rcParams are kept
    "text.usetex": False, "text.parse_math": False, "text.color": INK, "font.family": "sans-serif", "font.size": 9,
    "axes.facecolor": "none", "axes.edgecolor": MUTED, "axes.linewidth": 0.7, "axes.labelcolor": MUTED,
    "axes.labelsize": 9, "axes.titlesize": 10, "axes.titlecolor": INK, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "grid.linestyle": "-",
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "xtick.major.size": 3, "ytick.major.size": 0, "lines.linewidth": 1.5, "lines.solid_capstyle": "butt",
    "legend.frameon": False, "legend.fontsize": 9, "legend.title_fontsize": 9,
    "legend.handlelength": 1.8, "legend.handletextpad": 0.5, "legend.columnspacing": 1.2,
}  # fmt: skip


def figure_format(path: Path) -> str:
    """The format for a file's extension; a `UserError` if there is none."""
    known = Figure().canvas.get_supported_filetypes()
    if (ending := path.suffix.lower().removeprefix(".")) not in known:
        raise UserError(f"cannot draw into '{path}': expected an ending such as .svg, .png or .pdf")
    return ending


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's extension; the same figure gives the same file."""
    ending = figure_format(path)
    metadata = {"Date": None} if ending == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "distpro"}), whole_file(path) as part:
        figure.savefig(part, format=ending, metadata=metadata)


def hues(count: int) -> list[Any]:
    """`count` colours: hand-picked ones if there are enough, else from a ramp."""
    ramp = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))
    return list(HUES[:count] if count <= len(HUES) else ramp)


def sample(process: Process) -> tuple[np.ndarray, np.ndarray]:
    """Relative times `[N]` in 0..1 and the weights there `[N, P]`; two times suffice for a constant process."""
    times = np.linspace(0, 1, POINTS if len(process.z) > 1 else 2)
    return times, np.stack([process.at(float(time)).detach().double().cpu().numpy() for time in times])


@matplotlib.rc_context(STYLE)
def plot_process(process: Process, narrow: bool = False) -> Figure:
    """The paper's Fig. 6: the weight of every pathway over the training, one panel per teacher stage.

    Colour shows the student's stage, line style the transform; a line ends in a cross where its pathway is
    dropped. The last panel shows the summed weights per teacher stage. `narrow` stacks the panels, for a phone.
    """
    times, weights = sample(process)
    pathways = process.pathways
    teachers = sorted({pathway.teacher for pathway in pathways})
    students = sorted({pathway.student for pathway in pathways})
    transforms = sorted({pathway.transform for pathway in pathways})
    hue = dict(zip(students, hues(len(students)), strict=True))
    dash = dict(zip(transforms, cycle(DASHES), strict=False))

    rows = len(teachers) if narrow else math.ceil(len(teachers) / 5)
    columns = math.ceil(len(teachers) / rows)
    size = (4.6, 2.1 * rows + 2.8) if narrow else (10, 2.7 * rows + 1.9)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.07), facecolor=PAPER)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.0] * rows + [0.8 if narrow else 0.55])
    first: Axes | None = None
    for place, stage in enumerate(teachers):
        axes = figure.add_subplot(grid[divmod(place, columns)], sharex=first, sharey=first)
        first = first or axes
        axes.axhline(1 / len(pathways), color=MUTED, linewidth=0.8, linestyle=DOTS)
        mine = [p for p, pathway in enumerate(pathways) if pathway.teacher == stage]
        for p in mine:
            look = {"color": hue[pathways[p].student], "linestyle": dash[pathways[p].transform]}
            _draw(axes, times, weights[:, p], gid=f"line-{pathways[p].name}", **look)
        gone = int((weights[-1, mine] == 0).sum())
        text = f"{gone} of {len(mine)} dropped at the end" if gone else f"{len(mine)} pathway{'s' * (len(mine) > 1)}"
        axes.set_title(f"Teacher stage {stage}" if stage else "Logits", pad=14)
        axes.text(0, 1.02, text, transform=axes.transAxes, color=MUTED, fontsize=8, in_layout=False)
        axes.tick_params(labelleft=place % columns == 0)
        if place % columns == 0:
            axes.set_ylabel("weight")
        _time(axes)
    if first is not None:
        first.set_ylim(*_limits(weights))
    _sums(figure.add_subplot(grid[rows, :]), times, weights, [pathway.teacher for pathway in pathways], narrow)

    uniform = Line2D([], [], color=MUTED, linewidth=0.8, linestyle=DOTS, label=f"uniform (1/{len(pathways)})")
    dropped = Line2D([], [], color=INK, linestyle="none", marker="x", markersize=4.5, label="dropped")
    key = [
        [
            Line2D([], [], color=hue[stage], linewidth=3, label=str(stage) if stage else "(logits)")
            for stage in students
        ],
        [Line2D([], [], color=INK, linestyle=dash[kind], label=kind) for kind in transforms],
        [uniform, dropped] if (weights == 0).any() else [uniform],
    ]
    for group, name in zip(key, ("student stage", "transform"), strict=False):
        group[0].set_label(f"{name} {group[0].get_label()}")
    _key(figure, key, most=6 if narrow else 14)
    return figure


def _draw(axes: Axes, times: np.ndarray, weights: np.ndarray, **look: Any) -> None:
    """Draw one pathway: a gap while it is dropped, a cross at the last point before."""
    kept = weights != 0
    ends = np.flatnonzero(kept[:-1] & ~kept[1:]).tolist()
    drawn = np.where(kept, weights, np.nan)
    axes.plot(times, drawn, marker="x", markersize=4.5, markeredgewidth=1.3, markevery=ends, **look)


def _sums(axes: Axes, times: np.ndarray, weights: np.ndarray, teacher: Sequence[int], narrow: bool) -> None:
    """Draw the summed weights of each teacher stage, stacked, or as lines if any is negative."""
    stages = sorted(set(teacher))
    sums = np.stack([weights[:, np.equal(teacher, stage)].sum(axis=1) for stage in stages])  # [stages, N]
    shades = SHADES(np.linspace(0, 1, len(stages)) if len(stages) > 1 else [0.5])
    labels = [f"stage {stage}" if stage else "logits" for stage in stages]
    if (sums < 0).any():
        for line, shade, label in zip(sums, shades, labels, strict=True):
            axes.plot(times, line, color=shade, linewidth=2, label=label)
    else:
        axes.stackplot(times, np.nan_to_num(sums), colors=shades, labels=labels, edgecolor=PAPER, linewidth=0.8)
        axes.set_ylim(*_limits(sums.sum(axis=0)))
    _time(axes)
    axes.set_xlabel("share of the training (%)")
    axes.set_ylabel("sum of weights")
    axes.set_title("Sum by teacher stage", pad=20 if narrow else 6)
    axes.legend(loc="lower left" if narrow else "lower right", bbox_to_anchor=(0 if narrow else 1, 1), borderpad=0,
                ncols=12, borderaxespad=0.4, handlelength=1, columnspacing=1)  # fmt: skip


def _key(figure: Figure, groups: Sequence[Sequence[Line2D]], most: int) -> None:
    """One legend above the panels: a single row if it has at most `most` entries, else separate rows per group."""
    if sum(map(len, groups)) <= most:
        groups = [[line for group in groups for line in group]]
    rows = [group[start : start + most] for group in groups for start in range(0, len(group), most)]
    blank = Line2D([], [], linestyle="none", label=" ")
    columns = zip_longest(*rows, fillvalue=blank)  # a legend fills column by column
    figure.legend(handles=list(chain.from_iterable(columns)), ncols=max(map(len, rows)),
                  loc="outside upper left", labelspacing=0.3)  # fmt: skip


def _time(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))


def _limits(weights: np.ndarray) -> tuple[float, float]:
    """Axis limits: from 0, or a little below the least weight if negative, to a little above the greatest."""
    finite = weights[np.isfinite(weights)]
    low, high = finite.min(initial=0), finite.max(initial=0)
    return 1.08 * low, 1.08 * high if high > low else 1


@matplotlib.rc_context(STYLE)
def plot_curves(rows: Iterable[Row], narrow: bool = False) -> Figure:
    """Test top-1 against the epoch, one line per method.

    Long trainings get a second panel for the last third, where methods differ by fractions of a point.
    """
    drawn = [(entry, *entry.curve("test_top1")) for entry in map(Entry, rows)]
    drawn = sorted((one for one in drawn if one[1]), key=lambda one: -np.nan_to_num(one[2][-1]))
    last = max((epochs[-1] for _, epochs, _ in drawn), default=1)
    panels = 2 if last >= 9 else 1
    size = (4.6, 2.7 * panels + 0.2 * len(drawn) + 0.3) if narrow else (10, 3.4)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.07), facecolor=PAPER)
    whole, *late = figure.subplots(*((panels, 1) if narrow else (1, panels)), squeeze=False).flat
    colours = iter(hues(len(drawn)))
    for entry, epochs, top1 in drawn:
        look = {"color": MUTED if entry.method == "none" else next(colours)}
        look |= {"linewidth": 2.4, "zorder": 3} if entry.method == "distpro" else {}
        look |= {"marker": "o", "markersize": 4} if len(epochs) == 1 else {}
        for axes in (whole, *late):
            axes.plot(
                epochs,
                top1,
                label=f"{decimal(top1[-1], 1)} %  {entry.label}",
                gid=f"line-{entry.label}",
                **look,
            )
    for axes in (whole, *late):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    whole.set_title("Whole training")
    whole.set_ylabel("top-1 (%)")
    for axes in late:
        start = math.floor(last * 2 / 3)
        best = max((top1[-1] for _, _, top1 in drawn if math.isfinite(top1[-1])), default=math.nan)
        close = [(epochs, top1) for _, epochs, top1 in drawn if top1[-1] >= best - 10]  # none that diverged
        seen = [y for xs, ys in close for x, y in zip(xs, ys, strict=True) if x >= start and math.isfinite(y)]
        if seen:
            slack = 0.06 * (max(seen) - min(seen)) or 1
            axes.set_ylim(min(seen) - slack, max(seen) + slack)
        axes.set_xlim(start, last)
        axes.set_title("Last third")
    if drawn:
        figure.legend(handles=whole.lines, title="after the last epoch", alignment="left",
                      loc="outside lower left" if narrow else "outside right upper")  # fmt: skip
    return figure
