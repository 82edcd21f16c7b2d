"""A user's own network by name: `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
import re

from torch import nn

from distpro.errors import UserError, nearest

OWN = re.compile(r"(?!timm:|cifar:|zoo:|hf_hub:)([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def own_network(name: str, role: str) -> nn.Module | None:
    """What `package.module:function` makes, called without arguments; None for names of other kinds.

    role: "teacher" or "student", for the `UserError` where there is no such module or function, or no network.
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
    model = getattr(found, function)()
    if not isinstance(model, nn.Module):
        raise UserError(f"--{role} {module}:{function}() gives {type(model).__name__}, expected an nn.Module")
    return model
