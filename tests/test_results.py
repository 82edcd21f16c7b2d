"""Every table of RESULTS.md is what its own command prints from the committed CSV."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "RESULTS.md").read_text()
BLOCKS = re.findall(r"<!-- (python -m distpro\.sweep [^\n]*) -->\n(.*?)<!-- end -->", RESULTS, re.S)


def test_every_csv_is_shown():
    shown = {word for command, _ in BLOCKS for word in shlex.split(command) if word.endswith(".csv")}
    there = {f"benchmarks/results/{path.name}" for path in (ROOT / "benchmarks/results").glob("*.csv")}
    assert shown == there


@pytest.mark.parametrize(("command", "table"), BLOCKS, ids=[shlex.split(command)[3] for command, _ in BLOCKS])
def test_the_table_comes_from_its_command(command, table):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "distpro.sweep"]
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == table.strip()
