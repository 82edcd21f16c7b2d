"""Every table of RESULTS.md is what its own command prints from the committed CSV, every figure has its command."""

import re
import shlex
from pathlib import Path

import pytest
from commands import called

import distpro.sweep
import distpro.zoo.__main__

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "RESULTS.md").read_text()
FIGURES = re.findall(r"<!-- (python -m distpro\.zoo [^\n]*) -->\n!\[[^\]]+\]\((.*?)\)", RESULTS)
BLOCKS = re.findall(r"<!-- (python -m distpro\.sweep [^\n]*) -->\n(.*?)<!-- end -->", RESULTS, re.S)


def test_every_csv_is_shown():
    shown = {word for command, _ in BLOCKS for word in shlex.split(command) if word.endswith(".csv")}
    there = {f"benchmarks/results/{path.name}" for path in (ROOT / "benchmarks/results").glob("*.csv")}
    assert shown == there


@pytest.mark.parametrize(("command", "table"), BLOCKS, ids=[shlex.split(command)[3] for command, _ in BLOCKS])
def test_the_table_comes_from_its_command(command, table, tmp_path, monkeypatch):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "distpro.sweep"]
    if "--figure" in words:
        place = words.index("--figure") + 1
        assert (ROOT / words[place]).is_file()
        assert f"]({words[place]})" in RESULTS
        words[place] = str(tmp_path / "drawn.svg")
    monkeypatch.chdir(ROOT)
    done = called(distpro.sweep.main, *words[3:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == table.strip()
    assert "--figure" not in words or (tmp_path / "drawn.svg").stat().st_size > 1000


@pytest.mark.parametrize(("command", "figure"), FIGURES)
def test_the_figure_of_a_process_comes_from_its_command(command, figure, tmp_path, monkeypatch):
    words = shlex.split(command)
    assert words[-2:] == ["--figure", figure]
    assert (ROOT / figure).is_file()
    monkeypatch.chdir(ROOT)
    done = called(distpro.zoo.__main__.main, *words[3:-1], tmp_path / "drawn.svg")
    assert done.returncode == 0, done.stderr
    titles = [set(re.findall(r"<!-- (.*?) -->", file.read_text())) for file in (ROOT / figure, tmp_path / "drawn.svg")]
    assert titles[0] == titles[1]  # what is written in it; lines differ in their last digits from version to version
