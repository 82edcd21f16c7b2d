"""Folding the BN of a network that only teaches into its convolutions: fewer passes over its maps."""

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
    """Counts the calls that a tensor goes into; reading a shape is one too, and forbids a folding for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
        return func(*args, **(kwargs or {}))


def folded(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[nn.Module, int]:
    """A copy of `model` in eval mode with each BN that alone reads a convolution folded into it, and how many were.

    run: calls the network it is given on a sample and returns everything of it that is ever read (logits, maps).
        What is found holds for the path that this call takes.

    A pair is a `BatchNorm2d` with running statistics whose input is the very tensor that a `Conv2d` gave, both
    called once and the tensor used by nothing else and not returned. In the copy the BN is an identity, or timm's
    activation after it. The weights are folded in float64. The model itself is not touched. Where the folded copy does
    not say what the model says (convolutions that standardise their weights, a BN with a forward of its own, or one
    that is called past its name), nothing is folded.

    Equivalent to: a copy with weight = weight * gamma / sqrt(var + eps) and the bias that belongs to it.
    """
    twin = _copy(model)
    made: dict[int, nn.Conv2d] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, Tensor]] = []
    calls: Counter[nn.Module] = Counter()
    uses = _Uses()
    kept: list[Tensor] = []  # alive to the end, so that no id is given out twice

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            if "weight" not in module._parameters:
                return  # it is made anew at every call, of others
            made[id(output)] = module
            uses.count[id(output)] = 0  # an earlier tensor, gone by now, may have had this id
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
            rest._forward_hooks.update(bn._forward_hooks)  # somebody reads this layer
            for place in names[bn]:
                owner, _, name = place.rpartition(".")
                setattr(twin.get_submodule(owner), name, rest)
            count += 1
    with torch.no_grad():  # a wrong folding is a tenth away and more
        alike = all(close(a, b, 0.02) for a, b in zip(tree_leaves(run(twin)), said, strict=True))
    return (twin, count) if alike else (_copy(model), 0)


def _copy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    for own, its in zip(model.modules(), twin.modules(), strict=True):
        its._forward_hooks.update(own._forward_hooks)  # who reads the model by hooks reads the copy, too
    return twin


def close(a: Tensor, b: Tensor, share: float) -> bool:
    """Whether the two are apart by at most that share of b's largest value; on `meta` there are no values to tell."""
    return a.is_meta or torch.allclose(a, b, rtol=0, atol=share * float(b.abs().max()), equal_nan=True)


def _uses_by(bn: nn.BatchNorm2d, x: Tensor) -> int:
    """How often the BN itself goes to its input: reading its dimensions is counted too."""
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
    """What is left of a BN: timm's hold a dropout and an activation."""
    rest = [part for name in ("drop", "act") if isinstance(part := getattr(bn, name, None), nn.Module)]
    return nn.Sequential(*rest) if rest else nn.Identity()
