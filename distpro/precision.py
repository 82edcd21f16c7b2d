"""In which numbers and in which memory layout a step is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """How a step computes. The parameters, their gradients and the optimizer stay float32 throughout.

    amp: autocast of the student and of the method's blocks; bfloat16, which needs no loss scaling. None: an autocast
        of your own around the call holds, where there is one.
    channels_last: maps in NHWC order in memory.
    teacher: run a copy of the teacher in this type, its BN folded into its convolutions; a later change of the
        teacher's weights is then not seen. None: the teacher itself, under `amp` like the student.
    """

    amp: torch.dtype | None = None
    channels_last: bool = False
    teacher: torch.dtype | None = None

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        # Without its cache, which an autocast around whole steps would keep alive: no step would see the one before.
        return nullcontext() if self.amp is None else torch.autocast(device.type, self.amp, cache_enabled=False)

    def layout(self, x: Tensor) -> Tensor:
        """`x` `[N, C, H, W]` in the layout of the step."""
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def lay_out(self, module: nn.Module) -> nn.Module:
        """The same module with its convolutions' weights in the layout of the step."""
        return module.to(memory_format=torch.channels_last) if self.channels_last else module


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same there; a GPU fetches it when it comes to it, and the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


PLAIN = Precision()
