"""Mistakes of the user: one clear sentence each, and exit code 2."""

from __future__ import annotations

import difflib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable

FIRST_SPEAKS = 10.0  # seconds in which torchrun ends the other processes, so that a mistake is told once


class UserError(Exception):
    """Something the user gave is wrong: the message says what, what was expected, and the nearest valid choice."""


def nearest(name: str, choices: Iterable[str], most: int = 3) -> list[str]:
    """The valid names most like `name`, best first; letter case does not count."""
    known = {choice.lower(): choice for choice in choices}
    return [known[hit] for hit in difflib.get_close_matches(name.lower(), known, n=most, cutoff=0.5)]


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a name that is not among `choices`: names the nearest ones, or lists a few of all.

    Equivalent to: UserError("unknown dataset 'cifar10O': did you mean 'cifar100' or 'cifar10'?")
    """
    choices = sorted(choices)
    if not choices:
        return UserError(f"unknown {kind} '{name}': there is none yet")
    close = nearest(name, choices)
    if close:
        return UserError(f"unknown {kind} '{name}': did you mean {' or '.join(repr(c) for c in close)}?")
    shown = ", ".join(choices[:12]) + (f" and {len(choices) - 12} more" if len(choices) > 12 else "")
    return UserError(f"unknown {kind} '{name}': expected one of {shown}")


def flag(name: str) -> str:
    """The flag of a configuration's value: `kd_weight` is --kd-weight."""
    return "--" + name.replace("_", "-")


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` becomes one line on standard error and exit code 2, Ctrl-C one and 130."""
    # torch's own forward mode scripts its formulas, and torch warns of that
    warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=FutureWarning)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes once more, and complains
        sys.exit(1)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(FIRST_SPEAKS)
        print(f"distpro: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print("; ".join(["distpro: interrupted", *map(str, error.args)]), file=sys.stderr)
        sys.exit(130)
