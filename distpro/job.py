"""A configuration made real: data, networks, loaders, and what is to be run (`distpro.phases` runs it)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distpro import parallel, zoo
from distpro.checks import NO_FILES
from distpro.config import Filled
from distpro.console import Console
from distpro.data import Growing, Loader, Split, arranged, create_dataset, holdout
from distpro.distiller import Distiller
from distpro.env import find_device
from distpro.errors import UserError, flag
from distpro.features import Features
from distpro.methods import METHODS
from distpro.models import create_model, load_checkpoint, own_network, published_classes
from distpro.pathways import all_pathways
from distpro.planned_step import check_graphs
from distpro.process import Process

LABELS = {
    "none": "student alone",
    "kd": "KD",
    "reviewkd": "ReviewKD",
    "uniform": "uniform process",
    "distpro": "searched process",
}
TEST_BATCH = 500


class Job:
    """A configuration made real. Making one checks everything that can be checked before work is done.

    Nothing is written before `open_folder`, so a mistake leaves no half-made folder.
    """

    def __init__(self, config: Filled, console: Console) -> None:
        self.config, self.console = config, console
        self.device = parallel.begin(find_device(config.device))
        check_graphs(self.device, config.cuda_graphs)
        console.rich.quiet = not parallel.is_primary()
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
        unseen = int((torch.bincount(self.data.train.labels, minlength=self.data.num_classes) == 0).sum())
        if unseen:
            console.warn(f"{unseen} of {self.data.num_classes} classes have no picture to train on")
        name, weights = config.teacher, config.teacher_checkpoint
        if name.startswith(zoo.PREFIX):
            weights, name = zoo.find("teacher", name), name.rpartition("/")[2]
        self.teacher = self.network(name, "teacher", config.teacher_pretrained)
        if weights is not None:
            self._same_pictures(load_checkpoint(self.teacher, weights), str(weights))
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
        self.needs_teacher = any(METHODS[base(method)].needs_teacher for method in self.methods)
        self.loader = self.train_loader(self.data.train)
        self.growing = self._growing()
        if "distpro" in self.methods and config.process in ("search", "online"):
            train, validation = self.search_splits()  # too few pictures: told before a teacher is trained
            self.train_loader(train)
            self.judging_loader(validation)
        self.test = self.test_loader(self.data.test)
        name = f"{config.dataset}-{config.student.replace(':', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
        self.folder = config.output or Path("output") / parallel.broadcast(name)

    def normalised(self) -> dict[str, str]:
        """How a folder's pictures are normalised, for the header of weights that learn from them."""
        told = {"mean": self.config.mean, "std": self.config.std}
        return {name: " ".join(map(str, values)) for name, values in told.items() if values is not None}

    def _same_pictures(self, facts: Mapping[str, Any], where: str) -> None:
        """A `UserError` where the weights have learned from pictures that were normalised otherwise."""
        theirs = {name: facts[name] for name in ("mean", "std") if name in facts}
        if theirs and theirs != self.normalised():
            flags = " ".join(f"{flag(name)} {value}" for name, value in theirs.items())
            raise UserError(f"'{where}' has learned from pictures that were normalised otherwise: give {flags}")

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
        ranks, batch = parallel.world_size(), self.config.batch_size
        if batch % ranks:
            raise UserError(f"--batch-size is that of all processes together: {batch} cannot be shared by {ranks}")
        loader = split.loader(batch // ranks, shuffle=True, augment=augment, seed=seed, drop_last=drop_last)
        return loader.shard(parallel.rank(), ranks)

    def test_loader(self, split: Split) -> Loader:
        """This process's share of pictures to measure top-1 on, each once."""
        return split.loader(TEST_BATCH, shuffle=False, augment=False).shard(parallel.rank(), parallel.world_size())

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
        return [method for method in every if base(method) in fitting]

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

    def search_splits(self) -> tuple[Split, Split]:
        """The pictures that a search trains on, and those that judge it: training pictures all of them."""
        config = self.config
        samples = None if config.process == "online" else config.search_samples
        return holdout(arranged(self.data, samples=samples).train, config.val_fraction, config.seed)

    def shared(self) -> dict[str, Any]:
        """What every training of the job is called with."""
        config = self.config
        return {
            "image": self.data.shape,
            "student_layers": config.student_layers,
            "teacher_layers": config.teacher_layers,
            "precision": config.precision(),
            "sync_bn": config.sync_bn,
            "cuda_graphs": config.cuda_graphs,
            "observer": self.console,
        }

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


def base(method: str) -> str:
    """The name in `METHODS`: "uniform" is distpro with uniform weights."""
    return "distpro" if method == "uniform" else method
