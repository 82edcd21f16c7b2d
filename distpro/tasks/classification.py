"""Image classification."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro import parallel
from distpro.errors import UserError
from distpro.layers import evaluating
from distpro.precision import to_device


class Metrics(NamedTuple):
    """Top-1 and top-5 accuracy in percent, and the mean cross-entropy."""

    top1: float
    top5: float
    loss: float


class Classification:
    """Cross-entropy, with optional label smoothing, and accuracy in percent."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of logits `[N, K]` and classes `[N]`, or probabilities `[N, K]` as mixup gives them."""
        return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> Metrics:
        """Run the model in eval mode over the whole loader, then restore its modes. It returns logits or an `Output`.

        In a distributed job each process's loader has its own share; the metrics cover all of them.
        """
        device = next(model.parameters(), torch.zeros(0)).device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        count = 0
        with evaluating(model):
            for x, y in loader:
                x, y = to_device(x, device), to_device(y, device)
                out = model(x)
                logits = out if isinstance(out, Tensor) else out.logits
                hits = logits.topk(min(5, logits.shape[1]), 1).indices == y[:, None]
                loss = F.cross_entropy(logits, y, reduction="sum").double()
                sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss])
                count += len(y)  # on the host: moving it would wait for the device at every batch
        *values, images = parallel.all_reduce_sum(torch.cat([sums, sums.new_tensor([count])])).tolist()
        if not images:
            raise ValueError("nothing to evaluate: the loader is empty")
        top1, top5, total = (value / images for value in values)
        return Metrics(100 * top1, 100 * top5, total)


def after_epochs(
    network: Callable[[], nn.Module], test: Iterable[tuple[Tensor, Tensor]] | None, task: Any = None
) -> Callable[[], dict[str, float]] | None:
    """What `fit` measures after every epoch: `network()` on the loader `test`, as "test_top1" etc.; None if no `test`.

    Accuracy needs class targets `[N]`: with a custom `task` the first batch is checked now, and others are refused.
    """
    if test is None:
        return None
    for _, y in itertools.islice(test, 1) if task is not None else ():
        if y.ndim != 1 or y.is_floating_point():
            raise UserError(
                f"accuracy needs classes [N], the test targets are {list(y.shape)}, {y.dtype}: omit `test` and "
                "evaluate yourself"
            )

    def measure() -> dict[str, float]:
        metrics = Classification().evaluate(network(), test)
        return {f"test_{name}": value for name, value in metrics._asdict().items()}

    return measure
