"""Where the time of a training step goes: `python -m distpro.profile`, with the flags of `python -m distpro.train`.

Steps run without CUDA graphs, whose parts cannot be told apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from distpro import parallel
from distpro.console import Console
from distpro.errors import UserError, run_command
from distpro.files import whole_file
from distpro.flags import parse
from distpro.job import Job
from distpro.phases import run_method, search

SKIPPED = 3  # steps before measuring
FORWARD = ("student", "transforms", "losses")  # whose backwards are told apart
PARTS = ("data", "teacher", *FORWARD, "backward", "validation", "hypergradient", "optimizer")
USER_SCOPE = 7  # RecordScope::USER_SCOPE: a record_function range, not an operator of the same name
ENGINE = "autograd::engine::evaluate_function"


class Enough(Exception):
    """All steps were measured."""


class Probe(Console):
    """Stops a training after timing some steps and profiling as many more."""

    def __init__(self, steps: int, device: torch.device) -> None:
        super().__init__()
        self.wanted, self.device = steps, device
        self.seen, self.seconds, self.began = 0, [0.0], 0.0
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self.profiler = profile(activities=kinds)

    def say(self, sentence: str) -> None:
        """Print only the table."""

    def start(self, name: str, steps: int, done: int) -> None:
        least = SKIPPED + 2 * self.wanted
        if steps < least:
            raise UserError(f"{name} has {steps} steps, --steps {self.wanted} needs {least}: lower it or train longer")
        self.seen, self.seconds = 0, []

    def epoch(self, row: dict[str, float]) -> None:
        """Print nothing."""

    def advance(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seen += 1
        timed = self.seen - SKIPPED
        if 0 < timed <= self.wanted:
            self.seconds.append(now - self.began)
        if timed == self.wanted:
            self.profiler.start()
        if timed == 2 * self.wanted:
            self.profiler.stop()
            raise Enough
        self.began = time.perf_counter()


def rows_of(events: Any, wall: float, device_time: bool = False) -> dict[str, float]:
    """Return the seconds of each part of a profile of `wall` seconds; "other" is what no part accounts for.

    Backward time is attributed to the parts of the forward: an autograd node has the sequence number of the operator
    that created it. On a GPU a part's time is that of its kernels, and "other" is the device's idle time.
    """
    attribute = "device_time_total" if device_time else "cpu_time_total"
    ranges = _ranges(events)
    rows: Counter[str] = Counter()
    for event in ranges:
        rows[event.name] += getattr(event, attribute)
    rows["losses"] -= rows["transforms"]  # nested inside

    def inside(event: Any, names: tuple[str, ...]) -> str | None:
        """Return the innermost of the named parts that an event began in."""
        at = event.time_range.start
        found = [e for e in ranges if e.name in names and e.time_range.start <= at <= e.time_range.end]
        return max(found, key=lambda e: e.time_range.start).name if found else None

    made_in: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(ENGINE):
            part = inside(event, (*FORWARD, "validation", "hypergradient", "backward"))
            if part in FORWARD:
                made_in[event.sequence_nr] = part
    told_apart: Counter[str] = Counter()
    for event in events:
        if event.name.startswith(ENGINE) and inside(event, ("backward", "validation")) == "backward":
            told_apart[made_in.get(event.sequence_nr, "other")] += getattr(event, attribute)
    whole = sum(told_apart.values()) if device_time else rows["backward"]
    del rows["backward"]
    for part in FORWARD:
        if told_apart[part]:
            rows[f"{part} backward"] = told_apart[part]
    rows["rest of the backward"] = whole - sum(told_apart[part] for part in FORWARD)
    seconds = {name: max(0.0, time / 1e6) for name, time in rows.items() if time > 0}
    return seconds | {"other": max(0.0, wall - sum(seconds.values()))}


def _ranges(events: Any) -> list[Any]:
    return [event for event in events if event.name in PARTS and event.scope == USER_SCOPE]


def measure(probe: Probe, run: Callable[[], Any]) -> dict[str, float]:
    """Return milliseconds per step by part: the parts' shares when profiled, times the median step without profiler."""
    with contextlib.suppress(Enough):
        run()
    events = probe.profiler.events()
    assert events is not None
    ranges = _ranges(events)
    wall = (max(e.time_range.end for e in ranges) - min(e.time_range.start for e in ranges)) / 1e6
    rows = rows_of(events, wall, probe.device.type == "cuda")
    step = 1e3 * statistics.median(probe.seconds)
    whole = sum(rows.values())
    return {name: step * seconds / whole for name, seconds in rows.items()}


def table_of(title: str, rows: dict[str, float], batch: int) -> Table:
    step = sum(rows.values())
    table = Table(title=f"{title}: {step:.1f} ms a step, {1e3 * batch / step:.0f} images/s", title_justify="left")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for name, milliseconds in sorted(rows.items(), key=lambda row: -row[1]):
        table.add_row(name, f"{milliseconds:.2f}", f"{milliseconds / step:.1%}")
    return table


def main() -> None:
    """Profile the step of the search and of each method; all trained weights are discarded."""
    own = argparse.ArgumentParser("python -m distpro.profile", add_help=False, allow_abbrev=False)
    own.add_argument("--steps", type=int, default=5, help="Steps to measure, of each method (default: 5).")
    own.add_argument("--trace", type=Path, help="Write a Chrome trace of them, FILE-METHOD.json.")
    flags, words = own.parse_known_args(sys.argv[1:])
    if {"-h", "--help"} & set(words):
        own.print_help()  # before the flags of a training, which end the program
        print(flush=True)
    if flags.steps < 1:
        raise UserError(f"--steps must be 1 or more, got {flags.steps}")
    config = parse(words, "distpro.profile")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output=Path(folder) / "run", resume=False, cuda_graphs=False)
        console = Console()
        job = Job(config, console)
        runs: dict[str, Callable[[], Any]] = {}
        if "distpro" in job.methods and config.process == "search":
            runs["search"] = partial(search, job)
        for method in job.methods:
            if method != "uniform" or "distpro" not in job.methods:
                process = job.given if method == "distpro" else None
                runs[method] = partial(run_method, job, method, process)
        for name, run in runs.items():
            probe = Probe(flags.steps, job.device)
            job.console = probe
            rows = measure(probe, run)
            console.rich.print(table_of(name, rows, config.batch_size))
            step = sum(rows.values())
            result[name] = {
                "milliseconds": round(step, 3),
                "images_per_second": round(1e3 * config.batch_size / step, 1),
                "parts": {part: round(value, 3) for part, value in rows.items()},
            }
            if flags.trace:
                path = flags.trace.with_name(f"{flags.trace.stem}-{name}.json")
                with whole_file(path) as part_file:
                    probe.profiler.export_chrome_trace(str(part_file))
                result[name]["trace"] = str(path)
    if parallel.is_primary():
        print(json.dumps(result))
    parallel.end()


if __name__ == "__main__":
    run_command(main)
