"""A matplotlib figure as SVG inside an HTML page."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.figure import Figure

from distpro.report.figures import GRID, INK, MUTED, PAPER

COLOURS = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}


def inline(figure: Figure, name: str) -> str:
    """`figure` as an `<svg>` element; `name`, unique on the page, becomes the prefix of its ids.

    Text stays text, in the page's font and colours; a line with the id `line-NAME` shows its NAME on hover.
    """
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "distpro"}):
        figure.savefig(stream, format="svg", facecolor="none", edgecolor="none", metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", text, count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(rf'<g id="{name}-line-([^"]*)">', r'<g class="line"><title>\1</title>', text)
    text = re.sub(r" ?font-family: [^;]*;", "", text)
    text = re.sub(r'\b(?:d|x|y)="[^"]*"', lambda place: re.sub(r"(\.\d\d)\d+", r"\1", place[0]), text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text)
