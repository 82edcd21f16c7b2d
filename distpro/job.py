"""The objects that a configuration describes: data, networks, loaders, methods (`distpro.phases` runs them)."""

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
from distpro.data import Loader, ProgressiveResizing, Split, create_dataset, holdout, with_eval_split
from distpro.distance_search import check_choice
from distpro.distiller import Distiller
from distpro.env import emulates_bfloat16, find_device
from distpro.errors import UserError, flag
from distpro.features import Features
from distpro.methods import METHODS
from distpro.models import create_model, load_checkpoint, own_network, published_classes
from distpro.pathways import all_pathways
from distpro.planned_step import check_graphs
from distpro.process import Process, normaliser

LABELS = {
    "none": "student alone",
    "kd": "KD",
    "reviewkd": "ReviewKD",
    "uniform": "uniform process",
    "distpro": "searched process",
}
TEST_BATCH = 500


class Job:
    """The objects that a configuration describes. The constructor checks all that can be checked beforehand.

    It writes nothing (`open_folder` does), so an error leaves no incomplete folder.
    """

    def __init__(self, config: Filled, console: Console) -> None:
        self.config, self.console = config, console
        self.device = parallel.begin(find_device(config.device))
        check_graphs(self.device, config.cuda_graphs)
        console.rich.quiet = not parallel.is_primary()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.amp and emulates_bfloat16(self.device):
            console.warn(
                "this CPU has no instructions for bfloat16: --amp is slower than float32 (measured: 0.4 times as fast)"
            )
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
        self.data = with_eval_split(whole, config.eval_split, samples=config.train_samples)
        unseen = int((torch.bincount(self.data.train.labels, minlength=self.data.num_classes) == 0).sum())
        if unseen:
            console.warn(f"{unseen} of {self.data.num_classes} classes have no training image")
        name, weights = config.teacher, config.teacher_checkpoint
        if name.startswith(zoo.PREFIX):
            weights, name = zoo.find("teacher", name), name.rpartition("/")[2]
        self.teacher = self.network(name, "teacher", config.teacher_pretrained)
        if weights is not None:
            self._same_normalisation(load_checkpoint(self.teacher, weights), str(weights))
        kept = published_classes(self.teacher) == self.data.num_classes  # else timm drops the classifier's weights
        self.teacher_ready = weights is not None or (config.teacher_pretrained and kept)
        student = self.network(config.student, "student")
        readers = {
            "teacher": Features(self.teacher, self.data.shape, config.teacher_layers, config.pooled),
            "student": Features(student, self.data.shape, config.student_layers, config.pooled),
        }
        for role, reader in readers.items():
            if reader.classes != self.data.num_classes:
                raise UserError(
                    f"the {role} {getattr(config, role)} has {reader.classes} classes, but {self.data.name} has "
                    f"{self.data.num_classes}"
                )
        for side in config.size_schedule:
            for role, reader in readers.items():
                try:
                    reader.check((self.data.shape[0], side, side))
                except UserError as error:
                    raise UserError(f"--size-schedule {side} does not work with the {role}: {error}") from error
        if config.method == "all" or METHODS[config.method].reads_maps:
            for reader in readers.values():
                reader.need_stages()
        stages = len(readers["teacher"].shapes), len(readers["student"].shapes)
        self.pathways = all_pathways(*stages, config.transforms, config.pathways, config.logit_pathways)
        self.student_params = sum(p.numel() for p in student.parameters())
        self.given = self._given_process()
        self.methods = self._methods_that_fit(student)
        self.needs_teacher = any(METHODS[method_name(method)].needs_teacher for method in self.methods)
        self.loader = self.train_loader(self.data.train)
        self.student_loader = self._student_loader()
        if "distpro" in self.methods and config.process in ("search", "online"):  # fail before training a teacher
            normaliser(config.normalisation, self.pathways, torch.zeros(()))
            if config.search_by == "distance":
                check_choice(self.pathways)
            train, validation = self.search_splits()
            self.train_loader(train)
            self.validation_loader(validation)
        self.test = self.test_loader(self.data.test)
        name = f"{config.dataset}-{config.student.replace(':', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
        self.folder = config.output or Path("output") / parallel.broadcast(name)

    def normalised(self) -> dict[str, str]:
        """Return how a folder's images are normalised, for the header of weights trained on them."""
        values = {"mean": self.config.mean, "std": self.config.std}
        return {name: " ".join(map(str, channels)) for name, channels in values.items() if channels is not None}

    def _same_normalisation(self, facts: Mapping[str, Any], where: str) -> None:
        """Raise a `UserError` if the weights were trained on images normalised differently."""
        theirs = {name: facts[name] for name in ("mean", "std") if name in facts}
        if theirs and theirs != self.normalised():
            flags = " ".join(f"{flag(name)} {value}" for name, value in theirs.items())
            raise UserError(f"'{where}' was trained on images normalised differently: give {flags}")

    # -- what the configuration names ------------------------------------------------------------------------------

    def train_loader(self, split: Split) -> Loader:
        """Return this rank's share of augmented batches of `--batch-size` images."""
        return self._loader(split, self.config.seed, augment=True, drop_last=True)

    def _student_loader(self) -> Loader | ProgressiveResizing:
        """Return the batches of a student's training, with --size-schedule."""
        config, train = self.config, self.data.train
        parts = config.grad_accum_steps
        if parts > 1 and config.batch_size // parallel.world_size() < 2 * parts:
            raise UserError(f"--grad-accum-steps {parts} leaves less than 2 images to a micro-batch, which BN needs")
        if not config.size_schedule:
            return self.loader
        if config.max_steps is not None:
            first = config.size_schedule[0]
            self.console.warn(f"--max-steps measures the first sizes of --size-schedule alone, here {first} pixels")
        return ProgressiveResizing(
            lambda side: self.train_loader(train.sized(side)), config.size_schedule, config.epochs
        )

    def validation_loader(self, split: Split) -> Loader:
        """Return the batches of a search's validation loss: not augmented, and all full if at least one can be."""
        whole, processes = len(split) >= self.config.batch_size, parallel.world_size()
        if not whole and len(split) > processes:  # means over ranks are those over images if every rank has as many
            split = split.subset(range(len(split) // processes * processes))
        return self._loader(split, self.config.seed + 1, augment=False, drop_last=whole)

    def _loader(self, split: Split, seed: int, augment: bool, drop_last: bool) -> Loader:
        ranks, batch = parallel.world_size(), self.config.batch_size
        if batch % ranks:
            raise UserError(f"--batch-size {batch}, over all processes, is not divisible by their number, {ranks}")
        loader = split.loader(batch // ranks, shuffle=True, augment=augment, seed=seed, drop_last=drop_last)
        return loader.shard(parallel.rank(), ranks)

    def test_loader(self, split: Split) -> Loader:
        """Return this rank's share of the images to evaluate on, each once."""
        return split.loader(TEST_BATCH, shuffle=False, augment=False).shard(parallel.rank(), parallel.world_size())

    def network(self, name: str, role: str, pretrained: bool = False, seed: int | None = None) -> nn.Module:
        """Return a new network, initialised from `seed` (default: the configuration's)."""
        torch.manual_seed(self.config.seed if seed is None else seed)
        channels, size = self.data.shape[0], self.data.shape[1]
        model = own_network(name, role, self.data.num_classes, channels)
        if model is not None and pretrained:
            raise UserError(f"--teacher-pretrained is only for timm's networks: give --teacher-checkpoint for {name}")
        if model is None:
            model = create_model(name, self.data.num_classes, channels, pretrained, size)
        return model.to(self.device)

    def _methods_that_fit(self, student: nn.Module) -> list[str]:
        """Return the methods to run; raise if one does not fit the pair, or with "all" leave it out with a warning."""
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
        if self.config.process == "uniform":  # then distpro is the same
            del every["uniform"]
        return [method for method in every if method_name(method) in fitting]

    def _check(self, student: nn.Module, kind: str) -> None:
        """Create the method for this pair once, to raise its errors early."""
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
        """Split the training images into those that a search trains on and those that validate it."""
        config = self.config
        samples = None if config.process == "online" else config.search_samples
        return holdout(with_eval_split(self.data, samples=samples).train, config.val_fraction, config.seed)

    def shared(self) -> dict[str, Any]:
        """Return the arguments that all trainings of the job share."""
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
        """Return the options of a method that the configuration sets."""
        values = {**self.config.plain(), "process": process}
        if kind == "reviewkd":
            values["kd_weight"] = self.config.reviewkd_weight
        return {name: values[name] for name in METHODS[kind].options if values.get(name) is not None}

    def _given_process(self) -> Process | None:
        """Return the process of a file, fitted to this pair; None if it is searched, online or uniform."""
        what = self.config.process
        if self.config.method not in ("all", "distpro") or what in NO_FILES:
            return None
        process = Process.load(zoo.process_file(what.removeprefix("final:"))).reordered(self.pathways)
        if self.config.tau is not None:
            if process.normalisation == "none":
                raise UserError(
                    f"--tau drops pathways by their raw weight, and '{what}' has none: its weights are given"
                )
            process = process.with_tau(self.config.tau)
        return process.final() if what.startswith("final:") else process


def method_name(method: str) -> str:
    """Return the name in `METHODS`: "uniform" is distpro with uniform weights."""
    return "distpro" if method == "uniform" else method
