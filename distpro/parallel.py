"""One job in several processes, one a GPU, as torchrun starts them: `torchrun --nproc-per-node=8 -m distpro.train ...`

Every process runs the same program on its share of each batch. What makes them one job is here: gradients, losses and
statistics are averaged, and rank 0 alone speaks and writes. In a process of its own, all of this does nothing.

Gradients are averaged after the backward, not by DistributedDataParallel during it: the search takes its gradients
from `torch.autograd.grad`, which DDP's hooks do not see, and a dropped pathway has none, which DDP must search for.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

from distpro.errors import UserError

T = TypeVar("T")


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU, where torchrun started several processes; else `device`, as it is."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return device if alone or device.type != "cuda" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def begin(device: torch.device) -> torch.device:
    """Make this process's device, which it gives, the one of the process, and join those that torchrun started."""
    device = local_device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def end() -> None:
    """Leave the other processes, once all of them are done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_primary() -> bool:
    """Whether this process is the one that speaks and writes."""
    return rank() == 0


def _reduced(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise UserError(
            f"rank {rank()} of {world_size()} lost another process of the job, whose own message says why; "
            f"--resume goes on from the last whole epoch ({str(error).splitlines()[0]})"
        ) from error
    return tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks, as a new tensor."""
    return tensor if world_size() == 1 else _reduced(tensor.clone())


@torch.no_grad()
def all_reduce_mean(tensors: Iterable[Tensor | None]) -> None:
    """Let each tensor be its mean over the ranks, in place; None, on every rank, is left alone. One call a dtype."""
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
    """What rank 0 says it is."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_gather(tensor: Tensor) -> Tensor:
    """`tensor` of every rank, `[ranks, ...]`; it may lie on any device."""
    if world_size() == 1:
        return tensor[None]
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, tensor.cpu())
    return torch.stack(boxes)


def settle(modules: Sequence[nn.Module], others: Sequence[Tensor] = ()) -> None:
    """Before and after an epoch: one set of BN statistics for all ranks, their mean, as timm's `--dist-bn reduce`.

    A `UserError` where parameters, or `others`, are not the same on every rank: they have to be, bit for bit, since
    they begin with one seed, and each rank moves them by the same averaged gradients.
    """
    if world_size() == 1:
        return
    all_reduce_mean(b for module in modules for b in module.buffers() if b.is_floating_point())
    values = [p.detach() for module in modules for p in module.parameters()] + list(others)
    sums = torch.stack([value.double().sum() for value in values])
    if not bool((all_gather(sums) == sums.cpu()).all()):
        raise UserError(
            f"rank {rank()}: the networks of the {world_size()} processes are not the same; every process has to make "
            "them from the same seed, before it draws anything of its own"
        )


class _Mean(torch.autograd.Function):
    """The mean over the ranks, with both derivatives: of a loss that is the sum of the ranks' own losses."""

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
    """BN over the batches of all ranks together, which have the same size; see `convert_sync_batchnorm`.

    torch.nn.SyncBatchNorm runs on no CPU and has no forward mode, which the exact hypergradient needs.
    The statistics are of at least float32, the variance about the mean that is known then: E[x^2] - E[x]^2 in one
    message would lose all digits of a channel whose mean is 1000 deviations.
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
        if not self.track_running_stats:  # a usual way to let them rest for a while
            return
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            weight = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            unbiased = variance * (count / max(1, count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)

    def _after(self, x: Tensor) -> Tensor:
        """timm's normalisations hold a dropout and the activation."""
        for part in ("drop", "act"):  # no class attribute could be their default: it would hide the submodule
            if isinstance(after := getattr(self, part, None), nn.Module):
                x = after(x)
        return x

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions."""


KNOWN = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)


def convert_sync_batchnorm(module: nn.Module) -> None:
    """Make every BN in `module` a `SyncBatchNorm` where it stands: its keys stay, and whoever reads it by hooks."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            if type(part).forward not in KNOWN and type(part).__name__ not in ("BatchNormAct2d", "SyncBatchNormAct"):
                raise UserError(f"--sync-bn: the {type(part).__name__} of this network has a forward of its own")
            if is_parametrized(part):  # its class holds what its weight is made of
                raise UserError("--sync-bn: a BN of this network is parametrised (torch.nn.utils.parametrize)")
            part.__class__ = SyncBatchNorm
