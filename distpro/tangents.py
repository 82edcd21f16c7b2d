"""Forward mode through norms: batch norm by the kernel of its backward, 16-bit norms in their own type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BATCH_NORM = inspect.signature(F.batch_norm)


class FastTangents(TorchFunctionMode):
    """While active, takes a tangent through a train-mode batch norm in a few passes over the map; torch takes ten.

    The Jacobian of x_hat = (x - mean) / std with respect to x is symmetric: the backward kernel, given the tangent of x
    in place of a gradient, returns the tangent of the output.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return _in_own_type(func(*args, **kwargs)) if func is F.layer_norm else func(*args, **kwargs)
        given = _BATCH_NORM.bind(*args, **kwargs)
        given.apply_defaults()
        x, running_mean, running_var, weight, bias, training, momentum, eps = given.args
        primals, tangents = zip(*map(_parts, (x, weight, bias)), strict=True)
        if not training or any(tangent is None for tangent in tangents):
            return _in_own_type(func(*args, **kwargs))
        (x, weight, bias), (dx, d_weight, d_bias) = primals, tangents
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        tangent, _, _ = torch.ops.aten.native_batch_norm_backward(
            dx, x, weight, running_mean, running_var, mean, inverse, True, eps, [True, False, False]
        )
        scale = (inverse * d_weight).to(x.dtype)
        shift = (d_bias - mean * inverse * d_weight).to(x.dtype)
        return forward_ad.make_dual(y, tangent.add_(_per_channel(shift, x)).addcmul_(x, _per_channel(scale, x)))


def _in_own_type(dual: Tensor) -> Tensor:
    """On a GPU the statistics of a 16-bit norm are float32, and with them torch's tangent, which no layer accepts."""
    primal, tangent = forward_ad.unpack_dual(dual)
    return dual if tangent is None else forward_ad.make_dual(primal, tangent.to(primal.dtype))


def _parts(dual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if dual is None else tuple(forward_ad.unpack_dual(dual))


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 2))
