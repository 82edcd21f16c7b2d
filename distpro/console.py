"""What a job prints while it runs: progress bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from distpro.loop import Observer


class Console(Observer):
    """Prints the progress of each training (rate, time left), messages, warnings and the table of results."""

    def __init__(self, stderr: bool = False) -> None:
        self.rich = RichConsole(highlight=False, stderr=stderr)
        self.bars: Progress | None = None
        self.name, self.done, self.resumed, self.steps = "", 0, 0, 0
        self.started = 0.0

    def say(self, sentence: str) -> None:
        """Print a line."""
        self.rich.print(sentence, markup=False, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """Print a warning in red."""
        self.rich.print(f"warning: {sentence}", style="bold red", markup=False, soft_wrap=True)

    def start(self, name: str, steps: int, done: int) -> None:
        self.name, self.steps, self.done, self.resumed = name, steps, done, done
        self.started = time.perf_counter()
        if self.rich.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.bars = Progress(*columns, console=self.rich)
            self.bars.add_task(name, total=steps, completed=done, rate="")
            self.bars.start()
        elif done:
            self.say(f"{name}: {done} of {steps} steps are already done")

    def advance(self) -> None:
        self.done += 1
        if self.bars is not None:
            self.bars.update(self.bars.task_ids[0], advance=1, rate=f"{self._rate():.1f} steps/s")

    def epoch(self, row: dict[str, float]) -> None:
        if self.bars is not None:
            description = f"{self.name} epoch {row['epoch']:.0f}: loss {row['train_loss']:.3f}"
            description += f", top-1 {row['test_top1']:.2f}" if "test_top1" in row else ""
            self.bars.update(self.bars.task_ids[0], description=description)
            return
        rate = self._rate()
        test = f"  top-1 {row['test_top1']:.2f} %" if "test_top1" in row else ""
        left = (self.steps - self.done) / rate if rate else 0
        seconds, waited = row["seconds"], row["wait_seconds"]
        self.say(
            f"{self.name:<12} epoch {row['epoch']:>3.0f}  loss {row['train_loss']:.4f}{test}  lr {row['lr']:.4g}  "
            f"{row['images'] / seconds:.0f} img/s, {100 * waited / seconds:.0f} % of it waiting  {left:.0f} s left"
        )

    def note(self, sentence: str) -> None:
        self.say(f"{self.name}: {sentence}")

    def stop(self) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def _rate(self) -> float:
        elapsed = time.perf_counter() - self.started
        return (self.done - self.resumed) / elapsed if elapsed else 0.0

    def table(self, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Print the results, one row per method."""
        table = Table(title=title, title_justify="left")
        for heading in ("method", "top-1 %", "top-5 %", "vs alone", "img/s", "train s", "search s"):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        alone = next((row["top1"] for row in rows if row["method"] == "none"), None)
        for row in rows:
            gain = "" if alone is None or row["method"] == "none" else f"{row['top1'] - alone:+.2f}"
            search = f"{row['search_seconds']:.1f}" if row["search_seconds"] else ""
            table.add_row(
                row["label"],
                f"{row['top1']:.2f}",
                f"{row['top5']:.2f}",
                gain,
                f"{row['images_per_second']:.0f}",
                f"{row['seconds']:.1f}",
                search,
            )
        self.rich.print(table)
