"""`python -m distpro.train`: the main command."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any

import yaml

from distpro import parallel, phases
from distpro.config import Filled
from distpro.console import Console
from distpro.env import collect, commit, device_name
from distpro.errors import run_command
from distpro.files import whole_file
from distpro.flags import parse
from distpro.job import Job
from distpro.process import Process
from distpro.report import write_report
from distpro.run_folder import check_folder, open_folder, resumable, write_summary


def train(config: Filled, command: str = "") -> dict[str, Any]:
    """Run the job and return the results, which the command prints last."""
    started = time.perf_counter()
    console = Console()
    job = Job(config, console)
    if config.resume and not (job.folder / "args.yaml").is_file():
        console.warn(f"--resume: '{job.folder}' contains no run yet: starting one")
    open_folder(job.folder, job.config)
    console.say(
        f"{job.data.name}: {len(job.data.train)} training and {len(job.data.test)} {config.eval_split} images "
        f"{list(job.data.shape)}, {job.data.num_classes} classes; device {job.device}; results in {job.folder}"
    )
    process: Process | None = job.given
    rows: list[dict[str, Any]] = []
    with resumable(job.folder):
        teacher = phases.prepare_teacher(job) if job.needs_teacher else None
        if "distpro" in job.methods and config.process == "search":
            process = phases.search(job)
        for method in job.methods:
            row = phases.run_method(job, method, process if method == "distpro" else None)
            process = row.pop("process") or process  # an online one is known only now
            rows.append(row)
            write_summary(job.folder, rows)

    length = f"{config.epochs} epochs" + (f" stopped after {config.max_steps} steps" if config.max_steps else "")
    title = f"{config.student} on {job.data.name}, {length}, seed {config.seed}"
    if teacher is not None:
        title = f"{config.teacher} -> {title}"
    console.table(title, rows)
    result = {
        "title": title,
        "command": command,
        "args": config.plain(),
        "environment": {k: v for section in ("software", "cpu", "cuda") for k, v in collect()[section].items()},
        "dataset": {"name": job.data.name, "train": len(job.data.train), config.eval_split: len(job.data.test)},
        "teacher": {
            "name": config.teacher,
            "top1": teacher.top1,
            "params": sum(p.numel() for p in job.teacher.parameters()),
        }
        if teacher is not None
        else None,
        "student": {"name": config.student, "params": job.student_params},
        "rows": rows,
        "process": process,
        "search": process.facts if process is not None else None,
    }
    write_report(job.folder / "report.html", result)
    console.say(f"report: {job.folder / 'report.html'}")
    brief = {
        "dataset": job.data.name,
        "teacher": config.teacher,
        "teacher_top1": teacher.top1 if teacher is not None else None,
        "student": config.student,
        "measured_on": config.eval_split,
        "epochs": config.epochs,
        "max_steps": config.max_steps,
        "seed": config.seed,
        "device": device_name(job.device),
        "commit": commit(),
        "top1": {row["method"]: round(row["top1"], 3) for row in rows},
        "top5": {row["method"]: round(row["top5"], 3) for row in rows},
        "train_seconds": {row["method"]: round(row["seconds"], 2) for row in rows},
        "images_per_second": {row["method"]: round(row["images_per_second"], 1) for row in rows},
        "compute_images_per_second": {row["method"]: round(row["compute_images_per_second"], 1) for row in rows},
        "waiting_for_data": {row["method"]: round(row["waiting"], 4) for row in rows},
        "search_seconds": round(sum(row["search_seconds"] for row in rows), 2),
        "call_seconds": round(time.perf_counter() - started, 2),  # of this call alone, if a run was resumed
        "output": str(job.folder),
    }
    with whole_file(job.folder / "result.json") as part:
        part.write_text(json.dumps(brief, indent=2))
    return brief


def main() -> None:
    config = parse()
    if config.dry_run:
        check_folder(Job(config, Console(stderr=True)).folder, config)  # stdout gets the YAML alone
        if parallel.is_primary():
            print(yaml.safe_dump(replace(config, dry_run=False).plain(), sort_keys=False), end="")
        parallel.end()
        return
    result = train(config, " ".join(["python -m distpro.train", *sys.argv[1:]]))
    if parallel.is_primary():
        print(json.dumps(result))
    parallel.end()


if __name__ == "__main__":
    run_command(main)
