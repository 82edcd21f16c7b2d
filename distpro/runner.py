"""The runs of a sweep as subprocesses, several at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distpro.config import Filled
from distpro.errors import UserError
from distpro.flags import as_flags, parse

Flags = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One subprocess: a teacher, a search, or a cell of the grid."""

    module: str  # distpro.train or distpro.search
    labels: dict[str, Any]  # its place in the grid; empty if only other runs need it
    flags: Flags
    folder: Path
    needs: tuple[Path, ...] = ()  # folders of the runs that must be done before

    @property
    def name(self) -> str:
        return "/".join(self.folder.parts[-1 - max(1, len(self.labels)) :])

    @property
    def result(self) -> Path:
        """The file that exists once the run is done, and not before."""
        return self.folder / ("result.json" if self.module == "distpro.train" else "process.safetensors")

    def words(self) -> list[str]:
        return as_flags({**self.flags, "output": str(self.folder)}, str(self.folder))

    def config(self) -> Filled:
        return parse(self.words(), self.module)


class Runner:
    """Executes the runs, as many at once as there are `places`."""

    def __init__(self, runs: Iterable[Run], places: list[dict[str, str]], say: Any = print) -> None:
        self.runs = sorted(runs, key=lambda run: bool(run.labels))  # first those that others need
        self.places, self.say = places, say
        self.waiting = [run for run in self.runs if not run.result.is_file()]
        self.done = {run.folder for run in self.runs if run.result.is_file()}
        self.failed: list[Run] = []
        self.children: set[subprocess.Popen] = set()
        self.lock = threading.Condition()
        self.stopped = False

    def __call__(self) -> list[Run]:
        """Execute the runs that are not done and return those that failed; a signal terminates the subprocesses."""
        if self.done:
            self.say(f"{len(self.done)} of {len(self.runs)} runs are already done")
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        threads = [threading.Thread(target=self._work, args=(place,)) for place in self.places]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped:
            raise KeyboardInterrupt("run the command again to continue")
        return self.failed

    def _stop(self, number: int, frame: Any) -> None:
        self.stopped = True
        for child in list(self.children):
            child.terminate()

    def _next(self) -> Run | None:
        """Wait for a run whose needs are done and return it; None if nothing is left."""
        with self.lock:
            while self.waiting and not self.stopped:
                for run in self.waiting:
                    if any(need in {r.folder for r in self.failed} for need in run.needs):
                        self.waiting.remove(run)
                        self.failed.append(run)
                        self.say(f"{run.name}: skipped, because a run that it depends on failed")
                        break
                    if all(need in self.done for need in run.needs):
                        self.waiting.remove(run)
                        return run
                else:
                    self.lock.wait(timeout=1)
            return None

    def _work(self, place: dict[str, str]) -> None:
        while (run := self._next()) is not None:
            words = run.words()
            if (run.folder / "args.yaml").is_file():
                words.append("--resume")
            run.folder.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            with (run.folder / "log.txt").open("a") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", run.module, *words], stdout=log, stderr=log, env={**os.environ, **place}
                )
                self.children.add(child)
                if self.stopped:  # the signal came before this child was registered
                    child.terminate()
                code = child.wait()
                self.children.discard(child)
            seconds = time.perf_counter() - started
            with self.lock:
                if self.stopped:
                    return
                if code == 0 and run.result.is_file():
                    self.done.add(run.folder)
                    self.say(f"[{len(self.done)}/{len(self.runs)}] {run.name}: {_told(run)}{seconds:.0f} s")
                else:
                    self.failed.append(run)
                    last = [*(run.folder / "log.txt").read_text().splitlines(), "no output"][-2:][0]
                    self.say(f"{run.name}: failed with exit code {code}: {last} (see {run.folder / 'log.txt'})")
                self.lock.notify_all()


def _told(run: Run) -> str:
    if run.module != "distpro.train":
        return ""
    return "".join(f"top-1 {top1:.2f} %, " for top1 in json.loads(run.result.read_text())["top1"].values())


def places(jobs: int | None) -> list[dict[str, str]]:
    """Return the environment of each concurrent subprocess: its GPU, or its share of the CPU's cores."""
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs must be 1 or more, got {jobs}")
    gpus = torch.cuda.device_count()
    if gpus:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = given.split(",")[:gpus] if given else [str(i) for i in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": names[i % gpus]} for i in range(jobs or gpus)]
    threads = max(1, (os.cpu_count() or 1) // (jobs or 1))
    return [{"OMP_NUM_THREADS": str(threads)}] * (jobs or 1)
