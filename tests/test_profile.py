"""Where a step's time goes: every part is told apart, and the parts make up the step."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from distpro.errors import UserError
from distpro.profile import Probe, rows_of


class Slow(torch.autograd.Function):
    """Waits: so many seconds forward, so many backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward)
        return gradient, None, None


def test_a_backward_belongs_to_what_it_is_the_backward_of():
    x = torch.zeros(3, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        with record_function("student"):
            y = Slow.apply(x, 0.01, 0.02)
        with record_function("losses"):
            with record_function("transforms"):
                y = Slow.apply(y, 0.03, 0.06)
            y = Slow.apply(y, 0.005, 0.04)
        with record_function("backward"):
            y.sum().backward()
        with record_function("validation"):
            Slow.apply(x, 0.015, 0.015).sum().backward()
        time.sleep(0.02)
        wall = time.perf_counter() - started
    rows = rows_of(profiler.events(), wall)
    expected = {
        "student": 0.01,
        "student backward": 0.02,
        "transforms": 0.03,
        "transforms backward": 0.06,
        "losses": 0.005,
        "losses backward": 0.04,
        "validation": 0.03,
        "other": 0.02,
    }
    for name, seconds in expected.items():
        assert rows[name] == pytest.approx(seconds, abs=0.012), name
    assert sum(rows.values()) == pytest.approx(wall, rel=1e-6)


def test_too_few_steps_are_refused():
    with pytest.raises(UserError, match="search has 12 steps, --steps 5 needs 13"):
        Probe(5, torch.device("cpu")).start("search", 12, 0)


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "distpro.profile", "--method", "distpro", "--search-by", "gradient"]
    command += ["--steps", "2", "--trace", "t.json"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert list(result) == ["search", "distpro"]
    for phase, found in result.items():
        assert sum(found["parts"].values()) == pytest.approx(found["milliseconds"], abs=0.02)
        assert {"teacher", "student", "student backward", "transforms", "transforms backward"} <= set(found["parts"])
        assert ("hypergradient" in found["parts"]) == (phase == "search")
        names = {event.get("name") for event in json.loads((tmp_path / f"t-{phase}.json").read_text())["traceEvents"]}
        assert {"transforms", "teacher", "backward"} <= names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t-distpro.json", "t-search.json"]  # and no run folder


def test_its_own_flags_are_in_the_help():
    run = subprocess.run([sys.executable, "-m", "distpro.profile", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert {"--steps", "--trace", "--student"} <= set(run.stdout.split())


def test_wrong_flags_earn_one_sentence(tmp_path):
    for flags, sentence in ((["--steps", "0"], "--steps must be 1 or more"), (["--studnt", "x"], "--student")):
        run = subprocess.run(
            [sys.executable, "-m", "distpro.profile", *flags], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 2
        assert sentence in run.stdout + run.stderr
    assert not list(tmp_path.iterdir())
