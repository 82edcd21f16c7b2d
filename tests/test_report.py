"""Reports: what the figures show, and that the page is whole, honest and safe whatever the result lacks."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

from distpro.errors import UserError
from distpro.pathways import all_pathways
from distpro.process import Process
from distpro.report import plot_curves, plot_process, write_report
from distpro.report.results import Entry, duration, headline, quantity, remarks, signed


def process(stages=3, transforms="ABC", steps=40, **options):
    """Low teacher stages first and the high ones later; some sink below tau."""
    pathways = all_pathways(stages, stages, transforms, options.pop("direction", "all"))
    time = torch.linspace(0, 1, steps)[:, None]
    level = torch.tensor([(p.teacher - 1) / max(stages - 1, 1) for p in pathways])
    return Process(1 + (1 - 2 * level) * (0.8 - 1.6 * time), pathways, **options)


def row(method, label, top1, epochs=12, **more):
    history = [{"epoch": e + 1, "test_top1": top1 - 20 / (e + 1), "train_loss": 1.0} for e in range(epochs)]
    basic = {"method": method, "label": label, "top1": top1, "top5": None, "seconds": 12.34, "search_seconds": 0}
    return {**basic, "history": history, **more}


ROWS = [
    row("none", "training alone", 95.3),
    row("uniform", "uniform weights", 96.9),
    row("distpro", "searched process", 97.2, search_seconds=4.5),
]
FULL = {
    "title": "wrn_40_2 to wrn_10_1",
    "command": "python -m distpro.train --dataset digits",
    "args": {"--lr": 0.1, "--note": "<script>alert('x')</script>", "--resume": None},
    "environment": {"torch": "2.15.0"},
    "dataset": {"name": "digits", "train": 1437},
    "teacher": {"name": "wrn_40_2", "top1": 98.61, "params": 2_255_156},
    "student": {"name": "wrn_10_1", "params": 78_330},
    "rows": ROWS,
    "process": process(),
    "search": {"seconds": 4.5, "steps": 40, "hypergradient": "exact"},
}


class Page(HTMLParser):
    """Checks that tags close in order; collects tags, ids, links inside the page and the text."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            self.links += re.findall(r"url\(#(.*?)\)", value or "")
            self.links += [value[1:]] if name == "href" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def written(folder: Path, result) -> tuple[str, Page]:
    write_report(folder / "report.html", result)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def pathway_lines(axes):
    return [line for line in axes.lines if (line.get_gid() or "").startswith("line-")]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    ("made", "lines"),
    [
        (process(), [9, 9, 9]),
        (process(5, "A", direction="review", steps=12_500), [5, 4, 3, 2, 1]),
        (process(4, "ABCD"), [16] * 4),
        (process(8, "A"), [8] * 8),
        (process(1, "A", steps=1), [1]),
    ],
    ids=["27", "15", "64", "8 stages", "one, constant"],
)
def test_process_has_a_panel_for_each_teacher_stage(made, lines, narrow):
    figure = plot_process(made, narrow)
    assert isinstance(figure, Figure)
    *panels, total = figure.axes
    assert [len(pathway_lines(axes)) for axes in panels] == lines
    assert len({axes.get_ylim() for axes in panels}) == 1
    assert len(total.collections) == len(lines)
    assert max(len(line.get_xdata()) for axes in panels for line in axes.lines) <= 401
    assert len(figure.legends[0].get_texts()) < 27
    figure.draw_without_rendering()


def test_dropped_stretch_is_a_gap_that_begins_with_a_cross():
    made = process()
    first = pathway_lines(plot_process(made).axes[0])[0]
    drawn = torch.tensor(first.get_ydata())
    expected = torch.stack([made.at(k / 400)[0] for k in range(401)])
    assert 0 < drawn.isnan().sum() < 401
    assert torch.equal(drawn.isnan(), expected == 0)
    assert first.get_markevery() == [int((expected != 0).sum()) - 1]


def test_weights_below_zero_are_summed_as_lines():
    made = Process(torch.tensor([[1.0, -2.0], [-1.0, 2.0]]), all_pathways(2, 1, "A"), "l1", tau=None)
    *panels, total = plot_process(made).axes
    assert len(total.lines) == 2
    assert not total.collections
    assert panels[0].get_ylim()[0] < 0


def test_curves_have_a_line_for_each_method_and_zoom_on_long_trainings():
    assert [len(axes.lines) for axes in plot_curves(ROWS).axes] == [3, 3]
    short = plot_curves([row("kd", "KD", 90.0, epochs=2)])
    assert [len(axes.lines) for axes in short.axes] == [1]
    diverged = [*ROWS, row("kd", "KD", 10.0)]
    assert plot_curves(diverged).axes[1].get_ylim()[0] > 80
    assert not plot_curves([]).legends


def test_global_state_stays_and_user_style_does_not_leak_in(tmp_path):
    with matplotlib.rc_context({"axes.facecolor": "#123456", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        text, _ = written(tmp_path, {"process": FULL["process"]})
        assert dict(matplotlib.rcParams) == before
    assert "#123456" not in text


def test_page_is_whole_and_has_the_numbers(tmp_path):
    _, page = written(tmp_path, FULL)
    assert "wrn_10_1 reaches 97.2 % with the searched process: +1.9 points over training alone, +0.3 over" in page.text
    for told in ("97.20", "+1.90", "12.3 s", "4.5 s", "98.61 %", "2.26 M", "78.3 k", "1,437", "n = 1", "t3-s1-A",
                 "Environment", "biased-softmax", "dropped where z ≤ 0.5"):  # fmt: skip
        assert told in page.text, told
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert set(page.links) <= set(page.ids)
    assert page.tags.count("svg") == 4
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_page_is_safe_and_loads_nothing(tmp_path):
    nasty = "<script>\"'&$x_{$"
    rows = [row(nasty, nasty, 90.0), *ROWS]
    text, page = written(tmp_path, {**FULL, "process": None, "rows": rows, "title": nasty, "command": nasty})
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in text
    assert not re.search(r"https?:|src=|@import|url\((?!#)", text)


def test_a_failure_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot write .*report\.html': disk full"):
        write_report(path, {"rows": ROWS})
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "result",
    [
        {},
        dict.fromkeys(FULL),
        {"rows": ROWS[:1]},
        {"rows": [{"method": "distpro", "label": "searched process", "top1": None}]},
        {"rows": [row("kd", "KD", math.nan, seconds=None)], "teacher": {"name": "t", "top1": math.nan}},
        {"process": process(steps=1)},
        {"process": Process(torch.zeros(3, 4), all_pathways(2, 2, "A"))},
    ],
    ids=["empty", "all None", "one method", "no number", "nan", "constant", "all dropped"],
)
def test_missing_parts_are_left_out(tmp_path, result):
    _, page = written(tmp_path, result)
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text
    assert ("Results" in page.text) == bool(result.get("rows"))
    assert ("t1-s1-A" in page.text) == (result.get("process") is not None)


def test_headline_is_honest():
    def told(*rows):
        return headline("net", [Entry(row) for row in rows])

    none, uniform = row("none", "alone", 95.3), row("uniform", "equal", 97.6)
    searched = row("distpro", "searched process", 97.2)
    assert told(none, uniform, searched) == (
        "net reaches 97.2 % with the searched process: +1.9 points over training alone, "
        "\N{MINUS SIGN}0.4 against uniform weights."
    )
    assert "The best method here is uniform weights, with 97.6 %." in remarks(
        [Entry(row) for row in (none, uniform, searched)], {}
    )
    assert told(row("uniform", "equal", 97.21), searched).endswith("±0.0 points against uniform weights.")
    assert told(none) == "net reaches 95.3 % with training alone."
    assert told(none, row("kd", "KD (T = 4)", 96.0)).startswith("net reaches 96.0 % with KD (T = 4): +0.7 points over")
    assert "no accuracy" in told(none, row("distpro", "searched", math.nan))


def test_numbers_read_well():
    assert [duration(s) for s in (12.34, 99.96, 3599.7, 7500, math.nan)] == [
        "12.3 s", "1 min 40 s", "1 h 00 min", "2 h 05 min", "\N{EN DASH}",
    ]  # fmt: skip
    assert [quantity(n) for n in (78_330, 2_255_156, 12)] == ["78.3 k", "2.26 M", "12"]
    assert [signed(d, 1) for d in (0.3, -0.4, -0.04)] == ["+0.3", "\N{MINUS SIGN}0.4", "±0.0"]


def test_distances_say_why_pathways_are_kept(tmp_path):
    pathways = all_pathways(2, 3, "A", "review")  # t1 from s1, s2, s3; t2 from s2, s3
    distances = {"t1-s1-A": 0.3, "t1-s2-A": 0.2, "t1-s3-A": 0.25, "t2-s2-A": 8.0, "t2-s3-A": 10.008}
    found = Process(torch.ones(1, 5), pathways, facts={"distances": distances, "seconds": 2.0})
    write_report(tmp_path / "report.html", {**FULL, "process": found, "search": found.facts})
    text = (tmp_path / "report.html").read_text()
    Page(text)
    lines = re.findall(r"<tr>(.*?)</tr>", text[text.index("Why these pathways") :])
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line) for line in lines[:3]]
    assert cells == [
        ["", "student stage 1, A", "student stage 2, A", "student stage 3, A", "least"],
        ["teacher stage 1", "1.500", "<b>1.000</b>", "1.250", "0.2"],
        ["teacher stage 2", "", "<b>1.000</b>", "1.251", "8"],
    ]
    assert "0.25" not in text[text.index("<h3>Search</h3>") :].split("</section>")[0]  # once is enough
    write_report(tmp_path / "report.html", FULL)
    assert "Why these pathways" not in (tmp_path / "report.html").read_text()
