"""`python -m distpro.sweep CONFIG`: a grid of resumable runs, with one table and one CSV of their results.

A configuration is YAML:

    title: the heading of the table
    flags: {dataset: cifar100, epochs: 10}            # of `distpro.train`, for every run
    teachers:                                         # trained first, once; use as `teacher_checkpoint: "@big"`
      big: {student: wrn_40_2, method: none}
    searches:                                         # then, once per seed; as `process: "@short"` or "final:@short"
      short: {search_epochs: 4}                       # (once in all if it sets a seed of its own)
    axes:                                             # every combination is a run; "@{pair}": the label on axis "pair"
                                                      # (an axis's flags do not apply to teachers and searches)
      method:                                         # labels, and the flags they stand for
        alone: {method: none}
        uniform: {method: distpro, process: uniform}
        searched: {method: distpro, process: "@short"}
      epochs: [10, 20]                                # or values of the flag of that name
    seeds: [0, 1, 2]
    compare: [[searched, uniform]]                    # on axis "method": paired differences, below the table
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from distpro.errors import UserError, run_command, unknown
from distpro.files import read_yaml
from distpro.flags import as_flags, command_line
from distpro.process import Process
from distpro.report import figure_format, save_figure, sweep_figure, sweep_table, write_csv
from distpro.run_folder import same_run
from distpro.runner import Flags, Run, Runner, places

KEYS = ("title", "flags", "teachers", "searches", "axes", "seeds", "compare")
EXAMPLE = "axes: {method: [kd, reviewkd]}"
LOCAL_PATHS: Flags = {"data": None, "teacher_checkpoint": None}  # paths that mean nothing on another machine


@dataclass
class Sweep:
    """The runs that a configuration asks for; `check` checks their flags."""

    config: Path
    output: Path
    title: str = ""
    runs: list[Run] = field(default_factory=list)
    compare: list[tuple[str, str]] = field(default_factory=list)
    axes: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: Path, output: Path | None = None) -> Sweep:
        """Read a YAML file; raise a `UserError` that names what is wrong in it."""
        settings = read_yaml(config, "sweep configuration", EXAMPLE)
        if not isinstance(settings.get("axes"), dict):
            raise UserError(f"'{config}' must hold 'axes', for instance {EXAMPLE}")
        for key in settings:
            if key not in KEYS:
                raise unknown(f"key in '{config}':", str(key), KEYS)
        output = output or Path("output") / f"sweep-{config.stem}"
        axes = {name: _labelled(name, values) for name, values in settings["axes"].items()}
        sweep = cls(config, output, settings.get("title", config.stem), axes=tuple(axes))
        seeds, compare = settings.get("seeds", [0]), settings.get("compare") or []
        if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
            raise UserError(f"'seeds' in '{config}' must be a list of numbers, such as [0, 1, 2]")
        if not isinstance(compare, list) or not all(isinstance(two, list) and len(two) == 2 for two in compare):
            raise UserError(
                f"'compare' in '{config}' must be a list of pairs of methods, such as [[searched, uniform]]"
            )
        sweep.compare = [(str(a), str(b)) for a, b in compare]
        for label in itertools.chain(*sweep.compare):
            if label not in axes.get("method", {}):
                raise unknown("method to compare", label, axes.get("method", {}))
        base = settings.get("flags") or {}
        plain = {key: value for key, value in base.items() if not key.startswith("teacher") and key != "process"}
        first = {
            kind: {str(name): {**shared, **(flags or {})} for name, flags in (settings.get(kind) or {}).items()}
            for kind, shared in (("teachers", plain), ("searches", {k: v for k, v in base.items() if k != "process"}))
        }
        for seed in seeds:
            for labels in itertools.product(*axes.values()):
                place = dict(zip(axes, labels, strict=True))
                flags = {**base, "seed": seed}
                for name, label in place.items():
                    flags |= axes[name][label]
                flags = {key: _placed(value, place) for key, value in flags.items()}
                folder = output.joinpath(*map(_slug, labels), f"seed-{seed}")
                sweep._add("distpro.train", {**place, "seed": seed}, flags, folder, first)
        return sweep

    def _add(self, module: str, labels: dict[str, Any], flags: Flags, folder: Path, first: Mapping) -> None:
        """Add this run, and before it those it refers to with "@NAME"."""
        for run in self.runs:
            if run.folder != folder:
                continue
            if run.labels == labels:
                return
            both = " and ".join("-".join(map(str, one.values())) for one in (run.labels, labels))
            raise UserError(
                f"{both} would share the folder '{folder}': give them labels that differ in letters or digits"
            )
        needs = []
        for flag, kind, file in (
            ("teacher_checkpoint", "teachers", "student.safetensors"),
            ("process", "searches", "process.safetensors"),
        ):
            text = str(flags.get(flag, ""))
            if "@" not in text:
                continue
            prefix, name = text.split("@", 1)
            if name not in first[kind]:
                raise unknown(f"name under {kind}:", name, first[kind])
            other = {**first[kind][name], "device": flags.get("device", "auto")}
            where = self.output / kind / _slug(name)
            if kind == "searches":
                other.setdefault("seed", flags["seed"])
                where /= f"seed-{other['seed']}"
            self._add("distpro.train" if kind == "teachers" else "distpro.search", {}, other, where, first)
            needs.append(where)
            flags = {**flags, flag: f"{prefix}{where / file}"}
        self.runs.append(Run(module, labels, flags, folder, tuple(needs)))

    def check(self) -> None:
        """Check every flag of every run, and that an existing folder holds this run and no other."""
        for run in self.runs:
            config = run.config()
            if run.labels and config.method == "all":
                raise UserError(f"a run of '{self.config}' has every method at once: give it one, or an axis 'method'")
            if (run.folder / "args.yaml").is_file():
                same_run(run.folder, config)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per finished run of the grid, for the table and the CSV."""
        rows = []
        for run in self.runs:
            if not run.labels or not run.result.is_file():
                continue
            result = json.loads(run.result.read_text())
            ((method, top1),) = result["top1"].items()
            search = result["search_seconds"]
            path = str(run.flags.get("process", "")).removeprefix("final:")
            if run.needs and path.endswith(".safetensors"):
                search = Process.load(path).facts.get("seconds", 0.0)
            rows.append(
                {
                    **run.labels,
                    "top1": top1,
                    "top5": result["top5"][method],
                    "teacher_top1": result["teacher_top1"],
                    "train_seconds": result["train_seconds"][method],
                    "search_seconds": search,
                    "device": result["device"],
                    "commit": result["commit"],
                    "command": " ".join(["python -m distpro.train", *as_flags(run.flags | LOCAL_PATHS, "")]),
                }
            )
        return rows


def _labelled(axis: str, values: Any) -> dict[Any, Flags]:
    """Return an axis's labels and their flags; a plain list holds values of the flag of that name."""
    if isinstance(values, dict) and values and all(isinstance(v, dict) for v in values.values()):
        return values
    if isinstance(values, list) and values:
        return {value: {axis: value} for value in values}
    raise UserError(f"axis '{axis}' must be a list of values of that flag, or labels that each hold flags")


def _placed(value: Any, place: Mapping[str, Any]) -> Any:
    """Substitute a run's labels in a flag's text: "@{pair}" becomes "@wrn_40_2-wrn_16_2"."""
    for axis, label in place.items() if isinstance(value, str) else ():
        value = value.replace("{" + axis + "}", str(label))
    return value


def _slug(label: Any) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in str(label))


@dataclass(frozen=True)
class Arguments:
    """Run a grid of distpro.train, one run at a time or one per GPU; finished runs are not repeated."""

    config: tyro.conf.Positional[Path]
    """YAML file; see configs/ for ready ones, and `distpro/sweep.py` for the format."""
    output: Path | None = None
    """Folder of the runs; default: output/sweep-NAME."""
    table: bool = False
    """Print the table of the finished runs, and run nothing."""
    csv: Path | None = None
    """With --table: read this file instead of the runs' own results."""
    figure: Path | None = None
    """Plot accuracy against training cost into this file (.svg, .png)."""
    jobs: int | None = None
    """Concurrent runs; default: one per GPU, or one without a GPU."""
    data: Path | None = None
    """Folder of the data set, for every run."""
    teacher_checkpoint: Path | None = None
    """File of the teacher's weights, for every run that names one."""


def main() -> None:
    arguments = command_line(Arguments, "distpro.sweep")
    if arguments.csv is not None and not arguments.table:
        raise UserError("--csv is read by --table only")
    if arguments.figure is not None:
        figure_format(arguments.figure)  # fail now, not after hours
    sweep = Sweep.read(arguments.config, arguments.output)
    here = {"data": arguments.data, "teacher_checkpoint": arguments.teacher_checkpoint}
    if arguments.teacher_checkpoint and not any("teacher_checkpoint" in run.flags for run in sweep.runs):
        raise UserError(
            f"no run of '{arguments.config}' names a teacher_checkpoint, so --teacher-checkpoint would do nothing: "
            f"write teacher_checkpoint: {arguments.teacher_checkpoint.name} among its flags"
        )
    sweep.runs = [replace(run, flags=_with_local_paths(run.flags, here)) for run in sweep.runs]
    failed: list[Run] = []
    path = sweep.output / "results.csv"
    if not arguments.table:
        sweep.check()
        failed = Runner(sweep.runs, places(arguments.jobs), lambda line: print(line, flush=True))()
        write_csv(path, sweep.rows())
    table = sweep_table(arguments.csv or sweep.rows(), sweep.axes, sweep.compare)
    print(f"\n{sweep.title}\n\n{table}" if not arguments.table else table)
    if arguments.figure is not None:
        save_figure(sweep_figure(arguments.csv or sweep.rows(), sweep.axes), arguments.figure)
    if failed:
        print(
            f"distpro: {len(failed)} of {len(sweep.runs)} runs failed; run the command again to retry them",
            file=sys.stderr,
        )
        sys.exit(1)


def _with_local_paths(flags: Flags, here: Mapping[str, Path | None]) -> Flags:
    """Return the flags with the paths given for this machine."""
    wanted = {"data"} | set(flags)
    return {**flags, **{name: str(path) for name, path in here.items() if path is not None and name in wanted}}


if __name__ == "__main__":
    run_command(main)
