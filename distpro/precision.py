"""The numeric types and the memory format of a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """How a step computes. Parameters, their gradients and the optimizer's state stay float32.

    amp: autocast type of the student and of the method's blocks; bfloat16 needs no loss scaling. None: an autocast of
        your own around the call applies.
    channels_last: use the channels_last (NHWC) memory format.
    teacher: run a copy of the teacher in this type, with its BN folded into its convolutions; later changes of the
        teacher's weights have no effect. None: run the teacher itself, under `amp` like the student.
    """

    amp: torch.dtype | None = None
    channels_last: bool = False
    teacher: torch.dtype | None = None

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        # Without its cache, which an autocast around whole steps would keep: steps would not see weight updates.
        return nullcontext() if self.amp is None else torch.autocast(device.type, self.amp, cache_enabled=False)

    def layout(self, x: Tensor) -> Tensor:
        """Return `x` `[N, C, H, W]` in the step's memory format."""
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def lay_out(self, module: nn.Module) -> nn.Module:
        """Convert the module's convolution weights to the step's memory format, in place."""
        return module.to(memory_format=torch.channels_last) if self.channels_last else module


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; a copy from the CPU to a GPU does not block the host."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


PLAIN = Precision()
