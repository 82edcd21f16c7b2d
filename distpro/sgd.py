"""SGD whose learning rates may be on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SGD(torch.optim.SGD):
    """torch.optim.SGD that also takes learning rates as tensors, so that a CUDA graph can capture its step.

    Torch's implementations cannot: foreach reads such a rate back to the host; fused takes neither a list in which only
    some parameters have a momentum buffer yet, as when a dropped pathway returns, nor a gradient whose strides differ
    from its parameter's. State and results are torch's, up to the rounding of the last product.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not any(isinstance(group["lr"], Tensor) for group in self.param_groups):
            return super().step(closure)
        assert closure is None, "a rate on the device goes with gradients that are there"
        for group in self.param_groups:
            assert not any(group[name] for name in ("dampening", "maximize")), "not with a rate on the device"
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            directions = [p.grad for p in moved]
            if group["weight_decay"]:
                directions = list(torch._foreach_add(directions, moved, alpha=group["weight_decay"]))
            if group["momentum"]:
                directions = self._with_momentum(moved, directions, group["momentum"], group["nesterov"])
            torch._foreach_sub_(moved, torch._foreach_mul(directions, group["lr"]))
        return None

    def _with_momentum(self, moved: list[Tensor], directions: list[Tensor], mu: float, nesterov: bool) -> list[Tensor]:
        old = [
            (p, direction)
            for p, direction in zip(moved, directions, strict=True)
            if self.state[p].get("momentum_buffer") is not None
        ]
        for p, direction in zip(moved, directions, strict=True):
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = direction.clone()
        if old:
            buffers = [self.state[p]["momentum_buffer"] for p, _ in old]
            torch._foreach_mul_(buffers, mu)
            torch._foreach_add_(buffers, [direction for _, direction in old])
        buffers = [self.state[p]["momentum_buffer"] for p in moved]
        return list(torch._foreach_add(directions, buffers, alpha=mu)) if nesterov else buffers
