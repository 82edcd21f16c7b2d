"""A user's own network by name: `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
import re

from torch import nn

from distpro.errors import UserError, nearest

OWN = re.compile(r"(?!timm:|cifar:|zoo:|hf_hub:)([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def is_own(name: str) -> bool:
    return OWN.fullmatch(name) is not None


def own_network(name: str, role: str, num_classes: int, in_chans: int) -> nn.Module | None:
    """The network that `package.module:function` returns; None for names of other kinds.

    The function is called with whichever of timm's `num_classes` and `in_chans` it has parameters for. role: "teacher"
    or "student", for the `UserError` if the module or function does not exist or returns no network.
    """
    own = OWN.fullmatch(name)
    if own is None:
        return None
    module, function = own[1], own[2]
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--{role} {module}:{function}: {error}") from error
    names = [name for name, value in vars(found).items() if inspect.isfunction(value) or inspect.isclass(value)]
    if not hasattr(found, function):
        close = nearest(function, names)
        raise UserError(
            f"--{role} {module}:{function}: {module} has no '{function}'"
            + (f"; did you mean '{close[0]}'?" if close else "")
        )
    make = getattr(found, function)
    if isinstance(make, nn.Module) or not callable(make):
        raise UserError(
            f"--{role} {module}:{function} is a {type(make).__name__}, expected a function that makes a network"
        )
    taken = inspect.signature(make).parameters
    given = {key: value for key, value in (("num_classes", num_classes), ("in_chans", in_chans)) if key in taken}
    needed = [
        p.name for p in taken.values() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    more = [key for key in needed if key not in given]
    if more:
        raise UserError(
            f"--{role} {module}:{function} needs {', '.join(more)}: expected a function that needs no more than "
            "num_classes and in_chans"
        )
    model = make(**given)
    if not isinstance(model, nn.Module):
        raise UserError(f"--{role} {module}:{function}() returned a {type(model).__name__}, expected an nn.Module")
    return model
