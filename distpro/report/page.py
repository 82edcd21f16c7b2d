"""One run's result as a single static HTML file: no network access, no scripts, figures inline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape as plain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from distpro.files import whole_file
from distpro.report.figures import plot_curves, plot_process, sample
from distpro.report.results import (
    Entry,
    Row,
    decimal,
    duration,
    fact,
    find,
    headline,
    remarks,
    signed,
)
from distpro.report.style import CSS
from distpro.report.svg import inline

if TYPE_CHECKING:
    from distpro.process import Process

NAMES = {"top1": "top-1", "top5": "top-5", "params": "parameters", "seconds": "time"}
MOST = 5  # pathways listed at each moment


def write_report(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write `result` to `path` as one HTML page; on failure an existing page stays unchanged.

    Keys, left out of the page if missing or None: title, command, args, environment, dataset, teacher,
    student, rows (one per method), process, search. The headline compares the row whose method is "distpro",
    else the last one, with the methods "none" and "uniform".
    """
    text = page(result)
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def page(result: Mapping[str, Any]) -> str:
    """The HTML of `result`, see `write_report`."""
    title = escape(str(result.get("title") or "Distillation report"))
    student, teacher = result.get("student") or {}, result.get("teacher") or {}
    rows = result.get("rows") or []
    entries = [Entry(row) for row in rows]
    measured = (result.get("args") or {}).get("eval_split", "test")
    parts = ["<header>", f"<p class='title'>{title}</p>"]
    if entries:
        parts.append(f"<h1>{escape(headline(str(student.get('name') or 'The student'), entries))}</h1>")
        parts.append(f"<p class='lead'>{escape(' '.join(remarks(entries, teacher)))}</p>")
    if result.get("command"):
        parts.append(f"<pre>{escape(str(result['command']))}</pre>")
    parts.append("</header>")
    if entries:
        parts += ["<h2>Results</h2>", _results(entries, measured)]
    if result.get("process") is not None:
        parts += ["<h2>The process</h2>", _process(result["process"])]
    if any(entry.curve("test_top1")[0] for entry in entries):
        parts += ["<h2>Accuracy</h2>", _curves(rows, measured)]
    groups = {
        "Teacher": teacher,
        "Student": student,
        "Data": result.get("dataset"),
        "Search": {key: value for key, value in (result.get("search") or {}).items() if key != "distances"},
    }
    known = [f"<section><h3>{name}</h3>{_facts(facts)}</section>" for name, facts in groups.items() if facts]
    if known:
        parts += ["<h2>Networks, data and search</h2>", f"<div class='side'>{''.join(known)}</div>"]
    for name, key in (("All arguments", "args"), ("Environment", "environment")):
        if result.get(key):
            parts.append(f"<details><summary>{name}</summary>{_facts(result[key])}</details>")
    return (
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{title}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """`text` escaped for HTML; percent signs follow a non-breaking space."""
    return plain(text).replace(" %", "&nbsp;%")


def _table(head: Sequence[str], body: Iterable[Sequence[str]], kind: str = "", main: int | None = None) -> str:
    """A table of cells that are already HTML; row `main` is highlighted."""
    lines = ["".join(f"<th scope='col'>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in line) for line in body]
    rows = [f"<tr{' class=main' if i - 1 == main else ''}>{line}</tr>" for i, line in enumerate(lines)]
    return f"<div class='scroll'><table class='{kind}'>{''.join(rows)}</table></div>"


def _results(entries: Sequence[Entry], measured: str) -> str:
    alone, main = find(entries, "none"), find(entries, "distpro")
    top5 = any(math.isfinite(entry.value("top5")) for entry in entries)

    def lead(entry: Entry) -> str:
        return "" if alone is None or entry is alone else signed(entry.value("top1") - alone.value("top1"))

    columns: list[tuple[str, Callable[[Entry], str], bool]] = [  # (heading, cell, whether to show the column)
        ("method", lambda entry: escape(entry.label), True),
        ("top-1, %", lambda entry: decimal(entry.value("top1")), True),
        ("against training alone", lead, alone is not None and len(entries) > 1),
        ("top-5, %", lambda entry: decimal(entry.value("top5")), top5),
        ("training", lambda entry: duration(entry.value("seconds")), True),
        ("search", _search_time, any(map(_search_time, entries))),
    ]
    shown = [(name, cell) for name, cell, wanted in columns if wanted]
    body = [[cell(entry) for _, cell in shown] for entry in entries]
    table = _table([name for name, _ in shown], body, "results", entries.index(main) if main else None)
    text = f"Accuracy on the {measured} images after the last epoch, n = 1."
    return f"{table}<p class='note'>{text}</p>"


def _search_time(entry: Entry) -> str:
    seconds = entry.value("search_seconds")
    return duration(seconds) if seconds > 0 else ""


def _process(process: Process) -> str:
    moments = len(process.z)
    searched = f"searched in {process.facts.get('steps', moments):,} steps" if moments > 1 else "constant"
    tau = "nothing is dropped" if process.tau is None else f"dropped where z ≤ {process.tau:g}"
    caption = (
        "The weight of each pathway over the training; one panel for each teacher stage. "
        f"Pathways: {len(process.pathways)}; normalisation: {process.normalisation}; {tau}; "
        f"{searched}. "
        "Hover over a line to see its name: t1-s2-A is teacher stage 1 to student stage 2 through transform A."
    )
    times, weights = sample(process)
    columns = {"Start": 0, "Middle": len(times) // 2, "End": -1} if moments > 1 else {"At all times": 0}
    tables = "".join(_moment(process, weights[i], name) for name, i in columns.items())
    figures = _figures("process", plot_process(process), plot_process(process, narrow=True), caption)
    return f"{figures}<div class='side moments'>{tables}</div>{_dropped(times, weights)}{_distances(process)}"


def _moment(process: Process, weights: np.ndarray, name: str) -> str:
    """The pathways with the greatest weights at one time; `weights`: `[P]`."""
    names = [pathway.name for pathway in process.pathways]
    kept = [p for p in np.argsort(-weights, kind="stable") if weights[p] != 0 and np.isfinite(weights[p])]
    if not kept:
        text = "<p class='note'>All pathways have weight 0.</p>"
    elif len(kept) > 1 and np.ptp(weights[kept]) < 1e-6 * abs(weights[kept[0]]):
        text = f"<p class='note'>{len(kept)} pathways, all alike: {decimal(weights[kept[0]], 4)} each.</p>"
    else:
        bars = np.maximum(weights, 0) / abs(weights[kept]).max()
        body = [[escape(names[p]), decimal(weights[p], 4), f"<i style='width:{bars[p]:.0%}'></i>"] for p in kept[:MOST]]
        text = _table(["pathway", "weight", ""], body)
    return f"<section><h3>{name}</h3>{text}</section>"


def _dropped(times: np.ndarray, weights: np.ndarray) -> str:
    """The share of pathways with weight 0, over time."""
    share = 100 * (weights == 0).mean(axis=1)
    if not share.any():
        return "<p>No pathway is dropped at any time.</p>"
    if len(share) == 2:
        return f"<p>{share[0]:.0f} % of the pathways are dropped, and cost nothing.</p>"
    quarters = np.linspace(0, len(times) - 1, 5).round().astype(int)
    head = ["share of the training", *(escape(f"{100 * times[i]:.0f} %") for i in quarters), "on average"]
    body = ["pathways dropped", *(escape(f"{value:.0f} %") for value in (*share[quarters], share.mean()))]
    return f"<h3 class='apart'>Dropped pathways: they cost nothing</h3>{_table(head, [body])}"


def _distances(process: Process) -> str:
    """What a search by distance measured: a row per teacher stage, a column per student stage and transform."""
    found = process.facts.get("distances")
    if not found:
        return ""
    columns = sorted({(pathway.student, pathway.transform) for pathway in process.pathways})
    body = []
    for stage in sorted({pathway.teacher for pathway in process.pathways}):
        mine = {(p.student, p.transform): found[p.name] for p in process.pathways if p.teacher == stage}
        kept = min(mine, key=mine.__getitem__)
        cells = {at: decimal(value / (mine[kept] or 1), 3) for at, value in mine.items()}
        cells[kept] = f"<b>{cells[kept]}</b>"
        body.append([f"teacher stage {stage}", *(cells.get(at, "") for at in columns), f"{mine[kept]:.4g}"])
    head = ["", *(f"student stage {student}, {transform}" for student, transform in columns), "least"]
    text = (
        "Distance on held-out images after a training with uniform weights, in multiples of the least in its row. "
        "Each stage of the teacher keeps the closest, weighted by the inverse root of the least."
    )
    return f"<h3 class='apart'>Why these pathways</h3>{_table(head, body)}<p class='note'>{text}</p>"


def _curves(rows: Sequence[Row], measured: str) -> str:
    caption = f"Accuracy on the {measured} images after each epoch, n = 1."
    return _figures("curves", plot_curves(rows), plot_curves(rows, narrow=True), caption)


def _figures(name: str, wide: Figure, narrow: Figure, caption: str) -> str:
    """One figure in two layouts; the page shows the one that fits the screen."""
    both = "".join(
        inline(figure, f"{name}-{kind}").replace("<svg", f'<svg class="{kind}"', 1)
        for kind, figure in (("wide", wide), ("narrow", narrow))
    )
    return f"<figure>{both}<figcaption>{escape(caption)}</figcaption></figure>"


def _facts(facts: Mapping[str, Any]) -> str:
    lines = [(escape(NAMES.get(name, str(name))), escape(fact(name, value))) for name, value in facts.items()]
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in lines)}</dl>"
