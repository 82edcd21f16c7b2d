"""The training loop of teachers, searches and all methods."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.profiler import record_function

from distpro import parallel
from distpro.errors import UserError
from distpro.files import whole_file
from distpro.transforms import as_shape

CHECK_EVERY = 100  # steps between checks that the loss is finite, each of which synchronises with the device


class Step(Protocol):
    """One training step: updates the parameters and returns the losses of a batch, "loss" among them, on the device."""

    def __call__(self, x: Tensor, y: Tensor, progress: float) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def sync_ranks(self) -> None:
        """Synchronise the state of all ranks, before the first epoch and after each."""


class Observer:
    """Callbacks of a training; here they do nothing."""

    def start(self, name: str, steps: int, done: int) -> None:
        """A training of `steps` steps begins, `done` of which an earlier run took."""

    def advance(self) -> None:
        """A step was taken."""

    def epoch(self, row: dict[str, float]) -> None:
        """An epoch ended, with this row of the history."""

    def note(self, sentence: str) -> None:
        """A message about how the training runs."""

    def stop(self) -> None:
        """The training ended or was interrupted."""


def image_shape(loader: Any, image: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Return `image`, or else the shape of a loader's images; raise a `UserError` if `fit` cannot use the loader."""
    expected = "expected an iterable of batches (x [N, C, H, W], y [N]) with a length"
    if not hasattr(loader, "__len__"):
        raise UserError(f"a {type(loader).__name__} has no length: {expected}")
    if not len(loader):
        raise UserError(f"the loader is empty: {expected}")
    if image is None:
        batches = iter(loader)
        if batches is loader:
            raise UserError(
                f"a {type(loader).__name__} is its own iterator, so looking at its first batch may lose it: pass "
                "image=(C, H, W), and a loader that restarts at every epoch"
            )
        batch = next(batches)
        parts = (
            [t.shape if isinstance(t, Tensor) else type(t) for t in batch] if isinstance(batch, (tuple, list)) else []
        )
        if len(parts) != 2 or not isinstance(batch[0], Tensor) or batch[0].ndim != 4:
            raise UserError(f"a batch is a {type(batch).__name__}{parts or ''}: {expected}")
        image = batch[0].shape[1:]
    return as_shape(image)


def fit(
    step: Step,
    loader: Any,
    scheduler: LRScheduler,
    epochs: int,
    *,
    name: str = "train",
    evaluate: Callable[[], dict[str, float]] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    max_steps: int | None = None,
) -> list[dict[str, float]]:
    """Train for `epochs` passes over `loader` and return one row per epoch: losses, lr, the results of `evaluate`.

    A row also has the cost: "seconds", the "images" of all ranks, and "wait_seconds", the time this rank waited for
    batches: an upper bound on the cost of data loading, since a GPU may have been busy meanwhile.

    step: is called with the progress of the training, from 0 at the first step to 1 at the last.
    loader: iterable of `(x, y)` with a length; if it has `set_epoch`, epoch e is the same in every run.
    checkpoint: written atomically after every epoch; with `resume`, training continues from it, to the same results
        (the last epoch is evaluated again).
    max_steps: stop after this many steps, with the learning rates of the whole training; a partial epoch is not saved.

    A loss that is not finite ends the training with a `UserError`; the last checkpoint is kept.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        # its cache would keep 16-bit copies of the weights, so that a step would not see the update of the one before
        raise UserError(
            "training inside torch.autocast is not supported: give it precision=Precision(amp=torch.bfloat16) instead"
        )
    observer = observer or Observer()
    history: list[dict[str, float]] = []
    length = len(loader)
    if resume and checkpoint is not None and parallel.is_file(checkpoint):
        history = _restore(checkpoint, step, scheduler, length)
        if history and evaluate:
            history[-1] |= evaluate()
    else:
        step.sync_ranks()  # fails at once if the ranks start from different networks
        if parallel.rank():
            torch.manual_seed(torch.initial_seed() + parallel.rank())  # dropout differs from rank 0's
    total = epochs * length
    last = total if max_steps is None else min(total, max_steps)
    observer.start(name, last, len(history) * length)
    try:
        for epoch in range(len(history), -(-last // length)):
            whole = (epoch + 1) * length <= last
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            started = time.perf_counter()
            lr = float(scheduler.get_last_lr()[0])
            batches = _Batches(loader, None if whole else last - epoch * length)
            means = _epoch(step, batches, scheduler, epoch * length, total, observer, f"{name}, epoch {epoch + 1}")
            row: dict[str, float] = {"epoch": epoch + 1, "lr": lr, **means, "seconds": time.perf_counter() - started}
            row |= {"images": batches.images * parallel.world_size(), "wait_seconds": batches.waited}
            step.sync_ranks()
            history.append(row)
            if checkpoint is not None and whole:
                _save(checkpoint, step, scheduler, history, length)  # before the evaluation, which may fail
            row |= evaluate() if evaluate else {}
            observer.epoch(row)
    finally:
        observer.stop()
    return history


def cost(history: list[dict[str, float]]) -> dict[str, float]:
    """Return a training's seconds, images per second, the same without waits for data, and the fraction of waiting."""
    seconds, images, waited = (sum(row[key] for row in history) for key in ("seconds", "images", "wait_seconds"))
    return {
        "seconds": seconds,
        "images_per_second": images / seconds,
        "compute_images_per_second": images / (seconds - waited),
        "waiting": waited / seconds,
    }


def _epoch(
    step: Step,
    batches: Iterable[tuple[Tensor, Tensor]],
    scheduler: LRScheduler,
    done: int,
    total: int,
    observer: Observer,
    where: str,
) -> dict[str, float]:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}  # a step need not have every loss
    for count, (x, y) in enumerate(batches, 1):
        losses = step(x, y, (done + count - 1) / max(1, total - 1))
        scheduler.step()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()  # stays on the device
            counts[name] = counts.get(name, 0) + 1
        if count % CHECK_EVERY == 0:
            _finite(float(sums["loss"]), where)
        observer.advance()
    if not counts:
        raise UserError(f"the loader has no batches left ({where}): expected one that restarts at every epoch")
    parallel.all_reduce_mean(sums.values())
    means = {f"train_{name}": float(value) / counts[name] for name, value in sums.items()}
    _finite(means["train_loss"], where)
    return means


class _Batches:
    """One pass over a loader, or its first `most` batches, that counts the images and the seconds of waiting."""

    def __init__(self, loader: Iterable[tuple[Tensor, Tensor]], most: int | None) -> None:
        self.source = itertools.islice(loader, most)
        self.images, self.waited = 0, 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            asked = time.perf_counter()
            with record_function("data"):
                batch = next(self.source, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.images += len(batch[1])
            yield batch


def _finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the loss is no longer finite ({where}): lower --lr or --kd-weight")


def _save(path: Path, step: Step, scheduler: LRScheduler, history: list[dict[str, float]], length: int) -> None:
    rng = parallel.all_gather(torch.get_rng_state())
    device_rng = None
    if torch.cuda.is_initialized():  # dropout draws from the generator of the rank's GPU
        device_rng = parallel.all_gather(torch.cuda.get_rng_state())
    if not parallel.is_primary():  # the others would write all the weights to a discarded file
        return
    state: dict[str, Any] = {"step": step.state_dict(), "scheduler": scheduler.state_dict(), "history": history}
    state |= {"rng": rng, "device_rng": device_rng, "length": length}
    with whole_file(path) as part:
        torch.save(state, part)


def _restore(path: Path, step: Step, scheduler: LRScheduler, length: int) -> list[dict[str, float]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if len(state["rng"]) != parallel.world_size():
            raise UserError(f"it was saved by {len(state['rng'])} processes, this job has {parallel.world_size()}")
        if state.get("length", length) != length:
            raise UserError(f"its epochs have {state['length']} batches, those of this data set {length}")
        step.load_state_dict(state["step"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"][parallel.rank()].clone())  # of a view, torch 2.14 reads data outside it
        if state.get("device_rng") is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(state["device_rng"][parallel.rank()].clone())
        return state["history"]
    except Exception as error:  # a truncated or foreign file: torch has no common error for them
        raise UserError(f"cannot resume from '{path}': {str(error).splitlines()[0]}") from error


def repeated(loader: Any, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches endlessly, epoch after epoch, from batch `start` on."""
    epoch, step = divmod(start, len(loader))
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        batch = None
        for batch in itertools.islice(loader, step, None):
            yield batch
        if batch is None:
            raise UserError("the validation batches have run out: expected a loader that restarts at every epoch")
        epoch, step = epoch + 1, 0
