"""`python -m distpro.search`: the search (phase 1) alone."""

from __future__ import annotations

import json

from distpro import parallel, phases
from distpro.console import Console
from distpro.errors import run_command
from distpro.flags import parse
from distpro.job import Job
from distpro.report import save_figure
from distpro.run_folder import open_folder, resumable


def main() -> None:
    """Prepare the teacher, search a process and plot it, in a run folder like that of `python -m distpro.train`."""
    job = Job(parse(program="distpro.search"), Console())
    open_folder(job.folder, job.config)
    with resumable(job.folder):
        phases.prepare_teacher(job)
        process = phases.search(job)
    save_figure(process.plot(), job.folder / "process.svg")
    if parallel.is_primary():
        print(json.dumps({"process": str(job.folder / "process.safetensors"), **process.facts}))
    parallel.end()


if __name__ == "__main__":
    run_command(main)
