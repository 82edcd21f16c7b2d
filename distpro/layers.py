"""Outputs of submodules of any network, read by name while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distpro.errors import UserError, unknown
from distpro.transforms import Size


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module in eval mode and restore every part's mode afterwards."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class Layers:
    """Captures the outputs of the named submodules of a network, until this object is deleted.

    names: as in `model.named_modules()`, shallow first.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        if len(set(names)) < len(self.names):
            raise UserError(f"a layer is named twice: {' '.join(names)}")
        self._caught: dict[str, Any] = {}
        known = [name for name, _ in model.named_modules() if name]
        for name in names:
            if name not in known:
                raise unknown(f"layer of {type(model).__name__}", name, known)
            # not a bound method: the hook would keep this object alive
            hook = model.get_submodule(name).register_forward_hook(_Catch(self._caught, name))
            weakref.finalize(self, hook.remove)

    def run(self, model: nn.Module, x: Tensor) -> tuple[Any, list[Tensor]]:
        """Return `model(x)` and a map `[N, C, H, W]` per layer; `model` may be a copy that has the hooks."""
        self._caught.update(dict.fromkeys(self.names))
        try:
            output = model(x)
            caught = [self._caught[name] for name in self.names]
        finally:
            self._caught.clear()
        maps = []
        for name, found in zip(self.names, caught, strict=True):
            if found is None:
                raise UserError(f"layer '{name}' of {type(model).__name__} was not run by its forward")
            given, version = found
            if _version(given) != version:
                raise UserError(
                    f"layer '{name}' of {type(model).__name__} is overwritten in place by what follows it, as "
                    "ReLU(inplace=True) does: name the layer after it, or make that one inplace=False"
                )
            maps.append(as_map(given, x.shape[2:], name))
        return output, maps


class _Catch:
    """A forward hook that stores a submodule's output during `Layers.run`.

    Unlike a function it can be copied and pickled with the network, and as it stores nothing in other passes, a copy
    never includes a tensor of an autograd graph.
    """

    def __init__(self, caught: dict[str, Any], name: str) -> None:
        self.caught, self.name = caught, name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.name in self.caught:
            self.caught[self.name] = output, _version(output)


def _version(output: Any) -> int | None:
    """Return how often a tensor was written to; None where torch does not count (when compiling, in inference mode)."""
    if torch.compiler.is_compiling() or not isinstance(output, Tensor) or output.is_inference():
        return None
    return output._version


def as_map(output: Any, image: Size, name: str) -> Tensor:
    """Return a layer's output as `[N, C, H, W]`; it may be that, `[N, H, W, C]`, or row-major tokens `[N, L, C]`.

    The layout is inferred from the aspect ratio of the image `[H, W]`, which maps usually keep. Channels are last if
    the first two sides have this ratio (to within a pixel), the last two do not, and there are at least as many
    channels as rows and columns; in doubt they are first. Tokens must fill a grid of exactly this ratio; an additional
    first one is a class token, which is dropped.
    """
    if isinstance(output, Tensor) and output.ndim == 4:
        _, *sides, last = output.shape
        channels_last = _alike(sides, image) and not _alike((sides[1], last), image) and last >= max(sides)
        return output.permute(0, 3, 1, 2) if channels_last else output
    if isinstance(output, Tensor) and output.ndim == 3:
        for first in (0, 1):
            count = output.shape[1] - first
            rows = round((max(0, count) * image[0] / image[1]) ** 0.5)
            columns = count // max(1, rows)
            if 0 < rows * columns == count and rows * image[1] == columns * image[0]:
                return output[:, first:].transpose(1, 2).unflatten(2, (rows, columns))
    found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise UserError(
        f"layer {name} gives {found}: expected a map [N, C, H, W] or [N, H, W, C], or tokens [N, L, C] that fill the "
        f"image of {image[0]}x{image[1]}, with a class token before them or none"
    )


def _alike(size: Size, image: Size) -> bool:
    """Return whether `size` has the image's aspect ratio, to within a pixel."""
    return abs(size[0] * image[1] - size[1] * image[0]) < max(image)
