"""One job in several processes, one per GPU, as started by `torchrun --nproc-per-node=8 -m distpro.train ...`

Every rank runs the same program on its share of each batch; gradients, losses and statistics are averaged, and only
rank 0 prints and writes. In a single process, all of this does nothing.

Gradients are averaged after the backward, not by DistributedDataParallel during it: the search takes its gradients
from `torch.autograd.grad`, which bypasses DDP's hooks, and a dropped pathway has none, which DDP must search for.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

from distpro.errors import UserError

T = TypeVar("T")


def local_device(device: torch.device) -> torch.device:
    """Return this rank's GPU if torchrun started several processes, else `device` unchanged."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return device if alone or device.type != "cuda" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def begin(device: torch.device) -> torch.device:
    """Select this rank's device, join the process group of torchrun, if any, and return the device."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        raise UserError(
            "WORLD_SIZE is set, but RANK or LOCAL_RANK is not: start the processes with torchrun, or unset it"
        )
    device = local_device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def end() -> None:
    """Leave the process group, at the end of a job."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_primary() -> bool:
    """Return whether this is the rank that prints and writes."""
    return rank() == 0


def _reduced(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise UserError(
            f"rank {rank()} of {world_size()} lost another process of the job (see its own message); "
            f"--resume continues from the last complete epoch ({str(error).splitlines()[0]})"
        ) from error
    return tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over all ranks, as a new tensor."""
    return tensor if world_size() == 1 else _reduced(tensor.clone())


@torch.no_grad()
def all_reduce_mean(tensors: Iterable[Tensor | None]) -> None:
    """Average each tensor over the ranks in place, with one call per dtype; skip what is None (on every rank)."""
    if world_size() == 1:
        return
    alike: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor is not None:
            alike[tensor.dtype].append(tensor)
    for group in alike.values():
        flat = _reduced(torch.cat([tensor.reshape(-1) for tensor in group])) / world_size()
        parts = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view_as(tensor) for part, tensor in zip(parts, group, strict=True)])


def broadcast(value: T) -> T:
    """Return the value of rank 0."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def is_file(path: Path) -> bool:
    """Return whether the file exists; raise a `UserError` on a rank that sees it otherwise than rank 0."""
    there = path.is_file()
    if broadcast(there) != there:
        raise UserError(f"rank {rank()} and rank 0 do not see the same '{path}': all ranks need the same output folder")
    return there


def all_gather(tensor: Tensor) -> Tensor:
    """Return the stacked tensors of all ranks, `[ranks, ...]`; they may be on any device."""
    if world_size() == 1:
        return tensor[None]
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, tensor.cpu())
    return torch.stack(boxes)


def sync_ranks(modules: Sequence[nn.Module], others: Sequence[Tensor] = ()) -> None:
    """Average the BN statistics over the ranks, as timm's `--dist-bn reduce`.

    Raise a `UserError` if parameters, or `others`, differ between ranks: they must agree bit for bit, since they start
    from one seed and every rank updates them with the same averaged gradients.
    """
    if world_size() == 1:
        return
    all_reduce_mean(b for module in modules for b in module.buffers() if b.is_floating_point())
    values = [p.detach() for module in modules for p in module.parameters()] + list(others)
    sums = torch.stack([value.double().sum() for value in values])
    if not bool((all_gather(sums) == sums.cpu()).all()):
        raise UserError(
            f"rank {rank()}: the networks of the {world_size()} processes are not the same: create them from the same "
            "seed on every rank, before any random numbers of the rank's own"
        )


class _Mean(torch.autograd.Function):
    """The mean over the ranks, with reverse and forward derivatives, for a loss that is the sum of the ranks'."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _reduced(tensor.clone()) / world_size()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _reduced(gradient.clone()) / world_size()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _reduced(tangent.clone()) / world_size()


class SyncBatchNorm(nn.BatchNorm2d):
    """BN over the batches of all ranks, which have the same size; see `convert_sync_batchnorm`.

    torch.nn.SyncBatchNorm does not run on a CPU and has no forward mode, which the exact hypergradient needs.
    Statistics are at least float32, and the variance is computed about the reduced mean: E[x^2] - E[x]^2 in one
    message would lose all digits of a channel whose mean is 1000 standard deviations.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return self._after(super().forward(x))
        wide = x.float() if x.element_size() < 4 else x
        axes = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        mean = _Mean.apply(wide.mean(axes))
        centred = wide - mean.view(shape)
        variance = _Mean.apply(centred.square().mean(axes))
        self._remember(mean.detach(), variance.detach(), world_size() * x.numel() // x.shape[1])
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        out = centred * scale.view(shape)
        return self._after((out if self.bias is None else out + self.bias.view(shape)).to(x.dtype))

    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        if not self.track_running_stats:  # a usual way to freeze them temporarily
            return
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            weight = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            unbiased = variance * (count / max(1, count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)

    def _after(self, x: Tensor) -> Tensor:
        """Apply the dropout and the activation that timm's normalisations contain."""
        for part in ("drop", "act"):  # a default as class attribute would hide the submodule
            if isinstance(after := getattr(self, part, None), nn.Module):
                x = after(x)
        return x

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept any number of dimensions."""


KNOWN = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)


def convert_sync_batchnorm(module: nn.Module) -> None:
    """Turn every BN in `module` into a `SyncBatchNorm` in place, keeping its state-dict keys and hooks."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            if type(part).forward not in KNOWN and type(part).__name__ not in ("BatchNormAct2d", "SyncBatchNormAct"):
                raise UserError(f"--sync-bn: the {type(part).__name__} of this network overrides forward")
            if is_parametrized(part):  # its class defines how its weight is computed
                raise UserError("--sync-bn: a BN of this network is parametrised (torch.nn.utils.parametrize)")
            part.__class__ = SyncBatchNorm
