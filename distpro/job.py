"""The whole job: data, teacher, search, one student a method, and the run folder they leave."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distpro import parallel, searching, zoo
from distpro.checks import NO_FILES
from distpro.config import Filled
from distpro.console import Console
from distpro.data import Growing, Loader, Split, arranged, create_dataset
from distpro.distill import distill
from distpro.distiller import Distiller
from distpro.env import find_device
from distpro.errors import UserError
from distpro.features import Features, Teacher
from distpro.loop import cost
from distpro.methods import METHODS
from distpro.models import create_model, load_checkpoint, own_network, published_classes, save_weights
from distpro.pathways import all_pathways
from distpro.planned_step import check_graphs
from distpro.process import Process
from distpro.tasks import Classification, Metrics

LABELS = {
    "none": "student alone",
    "kd": "KD",
    "reviewkd": "ReviewKD",
    "uniform": "uniform process",
    "distpro": "searched process",
}
TEST_BATCH = 500
FINE_TUNING = 0.1  # of the learning rate, for a teacher whose published body is kept
MOST_LOST = 0.3  # points of top-1 that a teacher's short type may cost before a warning


class Job:
    """A configuration made real. Making one checks everything that can be checked before work is done.

    Nothing is written before `open_folder`, so a mistake leaves no half-made folder.
    """

    def __init__(self, config: Filled, console: Console) -> None:
        self.config, self.console = config, console
        self.device = parallel.begin(find_device(config.device))
        check_graphs(self.device, config.cuda_graphs)
        console.rich.quiet = not parallel.first()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        whole = create_dataset(
            config.dataset,
            config.data,
            image_size=config.image_size,
            device=self.device,
            num_workers=config.workers,
            loader=config.loader,
            channels_last=config.channels_last,
            mean=config.mean,
            std=config.std,
            alternating_flip=config.alternating_flip,
            cuda_graphs=config.cuda_graphs,
        )
        self.data = arranged(whole, config.eval_split, samples=config.train_samples)
        name, weights = config.teacher, config.teacher_checkpoint
        if name.startswith(zoo.PREFIX):
            weights, name = zoo.find("teacher", name), name.rpartition("/")[2]
        self.teacher = self.network(name, "teacher", config.teacher_pretrained)
        if weights is not None:
            load_checkpoint(self.teacher, weights)
        kept = published_classes(self.teacher) == self.data.num_classes  # else timm leaves the classifier out
        self.teacher_ready = weights is not None or (config.teacher_pretrained and kept)
        student = self.network(config.student, "student")
        readers = {
            "teacher": Features(self.teacher, self.data.shape, config.teacher_layers, config.pooled),
            "student": Features(student, self.data.shape, config.student_layers, config.pooled),
        }
        for role, reader in readers.items():
            if reader.classes != self.data.num_classes:
                raise UserError(
                    f"the {role} {getattr(config, role)} tells {reader.classes} classes apart, "
                    f"{self.data.name} has {self.data.num_classes}"
                )
        for side in config.size_schedule:
            for role, reader in readers.items():
                try:
                    reader.check((self.data.shape[0], side, side))
                except UserError as error:
                    raise UserError(f"--size-schedule {side} does not suit the {role}: {error}") from error
        if config.method == "all" or METHODS[config.method].reads_maps:
            for reader in readers.values():
                reader.need_stages()
        stages = len(readers["teacher"].shapes), len(readers["student"].shapes)
        self.pathways = all_pathways(*stages, config.transforms, config.pathways, config.logit_pathways)
        self.student_params = sum(p.numel() for p in student.parameters())
        self.given = self._given_process()
        self.methods = self._methods_that_fit(student)
        self.needs_teacher = any(METHODS[_kind(method)].needs_teacher for method in self.methods)
        self.loader = self.train_loader(self.data.train)
        self.growing = self._growing()
        if "distpro" in self.methods and config.process in ("search", "online"):
            searching.check(self)
        self.test = self.test_loader(self.data.test)
        name = f"{config.dataset}-{config.student.replace(':', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
        self.folder = config.output or Path("output") / parallel.said(name)

    # -- what the configuration names ------------------------------------------------------------------------------

    def train_loader(self, split: Split) -> Loader:
        """This process's share of batches of `--batch-size` pictures, augmented."""
        return self._loader(split, self.config.seed, augment=True, drop_last=True)

    def _growing(self) -> Loader | Growing:
        """The batches of a student's training, as --size-schedule has them."""
        config, train = self.config, self.data.train
        if not config.size_schedule:
            return self.loader
        return Growing(lambda side: self.train_loader(train.sized(side)), config.size_schedule, config.epochs)

    def judging_loader(self, split: Split) -> Loader:
        """The same for the validation loss of a search: batches of one size, if there is a whole one."""
        whole = len(split) >= self.config.batch_size
        return self._loader(split, self.config.seed + 1, augment=False, drop_last=whole)

    def _loader(self, split: Split, seed: int, augment: bool, drop_last: bool) -> Loader:
        ranks, batch = parallel.ranks(), self.config.batch_size
        if batch % ranks:
            raise UserError(f"--batch-size is that of all processes together: {batch} cannot be shared by {ranks}")
        loader = split.loader(batch // ranks, shuffle=True, augment=augment, seed=seed, drop_last=drop_last)
        return loader.shard(parallel.rank(), ranks)

    def test_loader(self, split: Split) -> Loader:
        """This process's share of pictures to measure top-1 on, each once."""
        return split.loader(TEST_BATCH, shuffle=False, augment=False).shard(parallel.rank(), parallel.ranks())

    def network(self, name: str, role: str, pretrained: bool = False, seed: int | None = None) -> nn.Module:
        """A fresh network, the same for the same seed; the configuration's by default."""
        torch.manual_seed(self.config.seed if seed is None else seed)
        channels, size = self.data.shape[0], self.data.shape[1]
        model = own_network(name, role, self.data.num_classes, channels)
        if model is not None and pretrained:
            raise UserError(f"--teacher-pretrained is of timm's networks: give --teacher-checkpoint for {name}")
        if model is None:
            model = create_model(name, self.data.num_classes, channels, pretrained, size)
        return model.to(self.device)

    def _methods_that_fit(self, student: nn.Module) -> list[str]:
        """What is to be run. One that does not fit the pair is a mistake, or among "all" left out with a warning."""
        if self.config.method != "all":
            self._check(student, self.config.method)
            return [self.config.method]
        fitting = set()
        for kind in METHODS:
            try:
                self._check(student, kind)
                fitting.add(kind)
            except UserError as error:
                self.console.warn(f"{kind} is left out: {error}")
        every = dict.fromkeys([*LABELS, *METHODS])
        if self.config.process == "uniform":  # then that is what distpro is
            del every["uniform"]
        return [method for method in every if _kind(method) in fitting]

    def _check(self, student: nn.Module, kind: str) -> None:
        """Make the method for this pair once, for the mistakes it finds."""
        Distiller(
            student,
            self.teacher,
            image=self.data.shape,
            method=kind,
            student_layers=self.config.student_layers,
            teacher_layers=self.config.teacher_layers,
            **self.options(kind, self.given),
        )

    def options(self, kind: str, process: Process | None) -> dict[str, Any]:
        """The options of a method that the configuration gives."""
        values = {**self.config.plain(), "process": process}
        if kind == "reviewkd":
            values["kd_weight"] = self.config.reviewkd_weight
        return {name: values[name] for name in METHODS[kind].options if values.get(name) is not None}

    def _given_process(self) -> Process | None:
        """The process of a file, fitted to this pair; None where it is to be searched or uniform."""
        what = self.config.process
        if self.config.method not in ("all", "distpro") or what in NO_FILES:
            return None
        process = Process.load(zoo.process_file(what.removeprefix("final:"))).fit(self.pathways)
        if self.config.tau is not None:
            process = process.clipped(self.config.tau)
        return process.final() if what.startswith("final:") else process

    # -- the parts -------------------------------------------------------------------------------------------------

    def prepare_teacher(self) -> Metrics:
        """Train the teacher where no weights were given; measure it, and say so."""
        config, name = self.config, self.config.teacher
        if not self.teacher_ready:
            published = "its published weights tell other classes apart: fine-tuning"
            how = published if config.teacher_pretrained else "training"
            self.console.say(f"{how} the teacher {name} first ({config.teacher_epochs} epochs)")
            self._fit(self.teacher, "none", "teacher", config.teacher_epochs)
            save_weights(self.teacher, self.folder / "teacher.safetensors")
        metrics = Classification().evaluate(self.teacher, self.test)
        top = f"top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %"
        self.console.say(f"teacher {name}: {top} on the {config.eval_split} pictures")
        if config.teacher_precision is not None:
            self._check_precision(metrics)
        chance = 100 / self.data.num_classes
        if metrics.top1 < 2 * chance:
            self.console.warn(
                f"the teacher's top-1 of {metrics.top1:.2f} % is near chance ({chance:.2f} %): are its checkpoint, "
                f"its classes and the normalisation of its pictures those it was trained with?"
            )
        return metrics

    def _check_precision(self, full: Metrics) -> None:
        """Say what the teacher is worth in the type that it will run in."""
        config = self.config
        reader = Teacher(self.teacher, self.data.shape, config.teacher_layers, config.pooled, config.precision())
        top1 = Classification().evaluate(reader, self.test).top1
        sentence = f"as it will run, folded in {config.teacher_precision}: top-1 {top1:.2f} %"
        if full.top1 - top1 > MOST_LOST:
            self.console.warn(f"{sentence}, {full.top1 - top1:.2f} points below float32: leave --teacher-precision out")
        else:
            self.console.say(sentence)

    def search(self) -> Process:
        """Phase 1 on the training pictures, split anew; `process.safetensors` is its result."""
        config, path = self.config, self.folder / "process.safetensors"
        if config.resume and path.is_file():
            return Process.load(path).fit(self.pathways)
        find = searching.by_trials if config.search_by == "trials" else searching.by_gradient
        process = find(self)
        process.save(path)
        self.console.say(f"searched: {process}; saved as {path}")
        return process

    def _fit(
        self, student: nn.Module, method: str, name: str, epochs: int | None = None, process: Process | None = None
    ) -> list[dict[str, float]]:
        config = self.config
        single = config.method != "all" and name != "teacher"
        recipe = config.student_recipe(epochs)
        if name == "teacher" and config.teacher_pretrained:
            recipe = replace(recipe, lr=FINE_TUNING * recipe.lr)
        return distill(
            student,
            self.teacher if METHODS[method].needs_teacher else None,
            self.loader if name == "teacher" else self.growing,
            recipe,
            method=method,
            test=self.test,
            image=self.data.shape,
            student_layers=config.teacher_layers if name == "teacher" else config.student_layers,
            teacher_layers=config.teacher_layers,
            name=name,
            checkpoint=self.folder / "last.pt" if single else self.folder / name / "last.pt",
            resume=config.resume,
            observer=self.console,
            precision=config.precision(),
            sync_bn=config.sync_bn,
            cuda_graphs=config.cuda_graphs,
            compile=config.compile,
            **self.options(method, process),
        )

    def run_method(self, method: str, process: Process | None = None) -> dict[str, Any]:
        """Train one student; `method` is a method's name, or "uniform" for distpro with uniform weights."""
        student = self.network(self.config.student, "student")
        if method == "distpro" and self.config.process == "online":
            self.console.say("the process is learned online: a part of the training pictures judges it")
            history, process = searching.online(self, student)
            process.save(self.folder / "process.safetensors")
        else:
            history = self._fit(student, _kind(method), method, process=process)
        folder = self.folder / method if self.config.method == "all" else self.folder
        save_weights(student, folder / "student.safetensors")
        label = LABELS.get(method, method)
        if method == "distpro" and self.config.process != "search":
            label = f"process {self.config.process}"
        return {
            "method": method,
            "label": label,
            "top1": history[-1]["test_top1"],
            "top5": history[-1]["test_top5"],
            **cost(history),
            "search_seconds": process.facts["seconds"] if process and self.config.process == "search" else 0.0,
            "process": process if method == "distpro" else None,
            "history": history,
        }


def _kind(method: str) -> str:
    """The name in `METHODS`: "uniform" is distpro with uniform weights."""
    return "distpro" if method == "uniform" else method
