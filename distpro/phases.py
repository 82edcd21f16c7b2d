"""The phases of a job: prepare the teacher, search a process, train a student per method."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

from distpro import parallel
from distpro.distance_search import search_by_distance
from distpro.distillation import distill
from distpro.features import Teacher
from distpro.gradient_search import search_by_gradient
from distpro.job import LABELS, Job, method_name
from distpro.loop import cost
from distpro.methods import METHODS
from distpro.models import save_weights
from distpro.process import TAU, Process
from distpro.recipe import Recipe
from distpro.tasks import Classification, Metrics
from distpro.trials import search_by_trials

FINE_TUNING = 0.1  # times the learning rate, for a pretrained teacher with a new classifier
NEAR_CHANCE = 0.1  # of the way from chance to 100 %, or twice chance if that is less: a teacher there is suspicious
MOST_LOST = 0.3  # points of top-1 that --teacher-precision may cost without a warning


# -- the teacher -----------------------------------------------------------------------------------------------------


def prepare_teacher(job: Job) -> Metrics:
    """Train the teacher if it has no weights for these classes; evaluate it and report its accuracy."""
    config, console = job.config, job.console
    if not job.teacher_ready:
        _train_teacher(job)
    metrics = Classification().evaluate(job.teacher, job.test)
    top = f"top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %"
    console.say(f"teacher {config.teacher}: {top} on the {config.eval_split} images")
    if config.teacher_precision is not None:
        _check_precision(job, metrics)
    chance = 100 / job.data.num_classes
    if metrics.top1 - chance < min(chance, NEAR_CHANCE * (100 - chance)):
        console.warn(
            f"the teacher's top-1 of {metrics.top1:.2f} % is near chance ({chance:.2f} %): check its "
            f"checkpoint, the order of its classes and the normalisation of the images"
        )
    return metrics


def _train_teacher(job: Job) -> None:
    config, recipe = job.config, job.config.student_recipe(job.config.teacher_epochs)
    how = "training"
    if config.teacher_pretrained:
        how = "its published weights are for other classes: fine-tuning"
        recipe = replace(recipe, lr=FINE_TUNING * recipe.lr)
    job.console.say(f"{how} the teacher {config.teacher} first ({config.teacher_epochs} epochs)")
    distill(
        job.teacher,
        None,
        job.loader,
        recipe,
        method="none",
        test=job.test,
        name="teacher",
        checkpoint=job.folder / "teacher" / "last.pt",
        resume=config.resume,
        compile=config.compile,
        **job.shared() | {"student_layers": config.teacher_layers},
    )
    save_weights(job.teacher, job.folder / "teacher.safetensors", job.normalised())


def _check_precision(job: Job, full: Metrics) -> None:
    """Report the teacher's accuracy in the type that it will run in."""
    config = job.config
    reader = Teacher(job.teacher, job.data.shape, config.teacher_layers, config.pooled, config.precision())
    top1 = Classification().evaluate(reader, job.test).top1
    sentence = f"as it will run, with folded BN in {config.teacher_precision}: top-1 {top1:.2f} %"
    if full.top1 - top1 > MOST_LOST:
        job.console.warn(f"{sentence}, {full.top1 - top1:.2f} points below float32: leave --teacher-precision out")
    else:
        job.console.say(sentence)


# -- the search ------------------------------------------------------------------------------------------------------


def search(job: Job) -> Process:
    """Search a process on a split of the training images and save it, or load a finished one with --resume."""
    config, path = job.config, job.folder / "process.safetensors"
    if config.resume and parallel.is_file(path):
        return Process.load(path).reordered(job.pathways)
    if config.search_by == "trials":
        process = _by_trials(job)
    elif config.search_by == "distance":
        process = _by_distance(job)
    else:
        student = job.network(config.student, "student")  # thrown away
        process = _by_gradient(job, student, config.search_recipe(), checkpoint=job.folder / "search.pt")
    process.save(path)
    job.console.say(f"searched: {process}; saved as {path}")
    return process


def _by_trials(job: Job) -> Process:
    config = job.config
    train, validation = job.search_splits()
    return search_by_trials(
        lambda seed: job.network(config.student, "student", seed=seed),
        job.teacher,
        job.train_loader(train),
        job.test_loader(validation),
        config.student_recipe(config.search_epochs),
        seeds=range(config.seed, config.seed + config.trial_seeds),
        record=job.folder / "trials.json",
        facts=_facts(job, config.search_epochs) | {"hypergradient": "none: trials"},
        **job.shared(),
        **job.options("distpro", None),
    )


def _by_distance(job: Job) -> Process:
    config = job.config
    train, validation = job.search_splits()
    return search_by_distance(
        job.network(config.student, "student"),  # thrown away
        job.teacher,
        job.train_loader(train),
        job.test_loader(validation),
        config.student_recipe(config.search_epochs),
        facts=_facts(job, config.search_epochs) | {"hypergradient": "none: distances"},
        checkpoint=job.folder / "search.pt",
        resume=config.resume,
        **job.shared(),
        **job.options("distpro", None),
    )


def _by_gradient(job: Job, student: Any, recipe: Recipe, **options: Any) -> Process:
    config = job.config
    train, validation = job.search_splits()
    return search_by_gradient(
        student,
        job.teacher,
        job.train_loader(train),
        job.validation_loader(validation),
        recipe,
        normalisation=config.normalisation,
        tau=TAU if config.tau is None else config.tau,
        hypergradient=config.hypergradient,
        alpha_lr=config.alpha_lr,
        alpha_first=config.alpha_first,
        alpha_every=config.alpha_every,
        literal_xi=config.literal_xi,
        val_ema=config.val_ema or None,
        facts=_facts(job, recipe.epochs) | {"val_ema": config.val_ema},
        resume=config.resume,
        **job.shared(),
        **job.options("distpro", None),
        **options,
    )


def _facts(job: Job, epochs: int) -> dict[str, Any]:
    """Return the metadata of a process file."""
    config = job.config
    return {
        "teacher": config.teacher,
        "student": config.student,
        "dataset": job.data.name,
        "images": config.search_samples or len(job.data.train),
        "epochs": epochs,
        "hypergradient": config.hypergradient,
        "seed": config.seed,
        "date": f"{datetime.now():%Y-%m-%d}",
    }


# -- the students ----------------------------------------------------------------------------------------------------


def run_method(job: Job, method: str, process: Process | None = None) -> dict[str, Any]:
    """Train one student and return its results; method "uniform" is distpro with uniform weights."""
    config, kind = job.config, method_name(method)
    student = job.network(config.student, "student")
    folder = job.folder / method if config.method == "all" else job.folder
    history: list[dict[str, float]] = []
    if method == "distpro" and config.process == "online":
        job.console.say("the process is learned online and validated on a held-out part of the training images")
        options = {"checkpoint": folder / "last.pt", "test": job.test, "history": history, "name": "online"}
        process = _by_gradient(job, student, config.student_recipe(), **options)
        process.save(job.folder / "process.safetensors")
    else:
        history = distill(
            student,
            job.teacher if METHODS[kind].needs_teacher else None,
            job.student_loader,
            config.student_recipe(),
            method=kind,
            test=job.test,
            name=method,
            checkpoint=folder / "last.pt",
            resume=config.resume,
            compile=config.compile,
            **job.shared(),
            **job.options(kind, process),
        )
    save_weights(student, folder / "student.safetensors", job.normalised())
    label = LABELS.get(method, method)
    if method == "distpro" and config.process != "search":
        label = f"process {config.process}"
    return {
        "method": method,
        "label": label,
        "top1": history[-1]["test_top1"],
        "top5": history[-1]["test_top5"],
        **cost(history),
        "search_seconds": process.facts["seconds"] if process and config.process == "search" else 0.0,
        "process": process if method == "distpro" else None,
        "history": history,
    }
