"""Folding the BN of a frozen network into its convolutions, for fewer passes over its maps."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class _Uses(TorchFunctionMode):
    """Counts the calls that use a tensor; reading its shape counts, too, and may needlessly prevent a folding."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
        return func(*args, **(kwargs or {}))


def folded(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[nn.Module, int]:
    """Return a copy of `model` in eval mode with BN folded into convolutions, and the number of BN folded.

    run: calls the given network on a sample and returns all of its outputs that are ever read (logits, maps).
        The result holds for the execution path of this call.

    A `BatchNorm2d` with running statistics is folded if its input is the output tensor of a `Conv2d`, both are called
    once, and the tensor is neither returned nor used elsewhere. In the copy, an identity replaces the BN, or the
    dropout and activation of timm's BN. Weights are folded in float64. `model` itself does not change. If the outputs
    of the copy differ from the model's (convolutions that standardise their weights, a BN with a forward of its own,
    or one called by another reference), nothing is folded.

    Equivalent to: a copy with weight = weight * gamma / sqrt(var + eps) and the corresponding bias.
    """
    twin = _copy(model)
    made: dict[int, nn.Conv2d] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, Tensor]] = []
    calls: Counter[nn.Module] = Counter()
    uses = _Uses()
    kept: list[Tensor] = []  # kept alive, so that no id is reused

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            if "weight" not in module._parameters:
                return  # the weight is computed from others at every call
            made[id(output)] = module
            uses.count[id(output)] = 0  # a freed tensor may have had this id
            kept.append(output)
        elif id(inputs[0]) in made and isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            pairs.append((made[id(inputs[0])], module, inputs[0]))

    hooks = [
        module.register_forward_hook(after, prepend=True)
        for module in twin.modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    ]
    with torch.no_grad(), uses:
        said = tree_leaves(run(twin))
    returned = {id(leaf) for leaf in said}
    for hook in hooks:
        hook.remove()

    names = defaultdict(list)
    for name, module in twin.named_modules(remove_duplicate=False):
        names[module].append(name)
    count = 0
    for conv, bn, between in pairs:
        by_bn = _uses_by(bn, between)
        if calls[conv] == calls[bn] == 1 and uses.count[id(between)] == by_bn and id(between) not in returned:
            _fold(conv, bn)
            rest = _after(bn)
            rest._forward_hooks.update(bn._forward_hooks)  # hooks that read this layer
            for place in names[bn]:
                owner, _, name = place.rpartition(".")
                setattr(twin.get_submodule(owner), name, rest)
            count += 1
    with torch.no_grad():  # a wrong folding is off by a tenth or more
        alike = all(close(a, b, 0.02) for a, b in zip(tree_leaves(run(twin)), said, strict=True))
    return (twin, count) if alike else (_copy(model), 0)


def _copy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    for own, its in zip(model.modules(), twin.modules(), strict=True):
        its._forward_hooks.update(own._forward_hooks)  # what reads the model by hooks reads the copy, too
    return twin


def close(a: Tensor, b: Tensor, share: float) -> bool:
    """Return whether a and b differ by at most `share` of b's largest value; True on `meta`, without values."""
    return a.is_meta or torch.allclose(a, b, rtol=0, atol=share * float(b.abs().max()), equal_nan=True)


def _uses_by(bn: nn.BatchNorm2d, x: Tensor) -> int:
    """Return how often the BN itself uses its input; reading dimensions counts, too."""
    uses = _Uses()
    with torch.no_grad(), uses:
        bn(x)
    return uses.count[id(x)]


def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    def double(x: Tensor | None) -> Any:
        return None if x is None else x.detach().double()

    statistics = double(bn.running_mean), double(bn.running_var), bn.eps, double(bn.weight), double(bn.bias)
    weight, bias = fuse_conv_bn_weights(double(conv.weight), double(conv.bias), *statistics)
    kind = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(kind), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(kind), requires_grad=False)


def _after(bn: nn.BatchNorm2d) -> nn.Module:
    """Return what remains of a folded BN: timm's contains a dropout and an activation."""
    rest = [part for name in ("drop", "act") if isinstance(part := getattr(bn, name, None), nn.Module)]
    return nn.Sequential(*rest) if rest else nn.Identity()
