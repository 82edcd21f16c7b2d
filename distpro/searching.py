"""The searches of a job: by gradient, by trials, or online, each on training pictures alone."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from torch import nn

from distpro.data import Split, arranged, holdout
from distpro.gradient_search import search_by_gradient
from distpro.process import TAU, Process
from distpro.recipe import Recipe
from distpro.trials import search_by_trials

if TYPE_CHECKING:
    from distpro.job import Job


def check(job: Job) -> None:
    """A `UserError` where the training pictures are too few to be split, before a teacher is trained."""
    train, validation = _split(job)
    job.train_loader(train)
    job.judging_loader(validation)


def by_gradient(job: Job) -> Process:
    """Down the validation loss of one step ahead; the student is thrown away."""
    student = job.network(job.config.student, "student")
    return _by_gradient(job, student, job.config.search_recipe(), "search.pt")


def online(job: Job, student: nn.Module) -> tuple[list[dict[str, float]], Process]:
    """The same, but the student is the result: one training, no search before it. Its history, and the process."""
    history: list[dict[str, float]] = []
    recipe = job.config.student_recipe()
    process = _by_gradient(job, student, recipe, "last.pt", test=job.test, history=history, name="online")
    return history, process


def by_trials(job: Job) -> Process:
    """By short trainings, on the same split of the training pictures."""
    config = job.config
    train, validation = _split(job)
    process = search_by_trials(
        lambda seed: job.network(config.student, "student", seed=seed),
        job.teacher,
        job.train_loader(train),
        job.test_loader(validation),
        config.student_recipe(config.search_epochs),
        seeds=range(config.seed, config.seed + config.trial_seeds),
        record=job.folder / "trials.json",
        image=job.data.shape,
        student_layers=config.student_layers,
        teacher_layers=config.teacher_layers,
        precision=config.precision(),
        sync_bn=config.sync_bn,
        cuda_graphs=config.cuda_graphs,
        observer=job.console,
        **job.options("distpro", None),
    )
    process.facts = _facts(job, config.search_epochs) | {"hypergradient": "none: trials"} | process.facts
    return process


def _by_gradient(job: Job, student: nn.Module, recipe: Recipe, checkpoint: str, **options: Any) -> Process:
    config = job.config
    train, validation = _split(job)
    process = search_by_gradient(
        student,
        job.teacher,
        job.train_loader(train),
        job.judging_loader(validation),
        recipe,
        image=job.data.shape,
        student_layers=config.student_layers,
        teacher_layers=config.teacher_layers,
        precision=config.precision(),
        sync_bn=config.sync_bn,
        cuda_graphs=config.cuda_graphs,
        normalisation=config.normalisation,
        tau=TAU if config.tau is None else config.tau,
        hypergradient=config.hypergradient,
        alpha_lr=config.alpha_lr,
        alpha_first=config.alpha_first,
        alpha_every=config.alpha_every,
        literal_xi=config.literal_xi,
        checkpoint=job.folder / checkpoint,
        resume=config.resume,
        observer=job.console,
        **job.options("distpro", None),
        **options,
    )
    process.facts = _facts(job, recipe.epochs) | process.facts
    return process


def _split(job: Job) -> tuple[Split, Split]:
    """The pictures that a search trains on, and those that judge it: training pictures all of them."""
    samples = None if job.config.process == "online" else job.config.search_samples
    whole = arranged(job.data, samples=samples).train
    return holdout(whole, job.config.val_fraction, job.config.seed)


def _facts(job: Job, epochs: int | None) -> dict[str, Any]:
    """What a process file says of where it is from."""
    config = job.config
    return {
        "teacher": config.teacher,
        "student": config.student,
        "dataset": job.data.name,
        "pictures": config.search_samples or len(job.data.train),
        "epochs": epochs,
        "hypergradient": config.hypergradient,
        "seed": config.seed,
        "date": f"{datetime.now():%Y-%m-%d}",
    }
