"""User errors: one clear sentence each, and exit code 2."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable

GRACE_SECONDS = 10.0  # seconds for torchrun to end the ranks other than 0, so that an error is printed once


class UserError(Exception):
    """Invalid input: the message says what is wrong, what was expected, and the nearest valid choice."""


def nearest(name: str, choices: Iterable[str], most: int = 3) -> list[str]:
    """Return the valid names most similar to `name`, best first, ignoring case."""
    known = {choice.lower(): choice for choice in choices}
    return [known[hit] for hit in difflib.get_close_matches(name.lower(), known, n=most, cutoff=0.5)]


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """Return the error for a name that is not in `choices`, which suggests the nearest ones or lists a few of all.

    Equivalent to: UserError("unknown dataset 'cifar10O': did you mean 'cifar100' or 'cifar10'?")
    """
    choices = sorted(choices)
    if not choices:
        return UserError(f"unknown {kind} '{name}': none exists yet")
    close = nearest(name, choices)
    if close:
        return UserError(f"unknown {kind} '{name}': did you mean {' or '.join(repr(c) for c in close)}?")
    shown = ", ".join(choices[:12]) + (f" and {len(choices) - 12} more" if len(choices) > 12 else "")
    return UserError(f"unknown {kind} '{name}': expected one of {shown}")


def flag(name: str) -> str:
    """Return the flag of a field of the configuration: --kd-weight for `kd_weight`."""
    return "--" + name.replace("_", "-")


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; print one line to standard error for a `UserError` (exit 2), Ctrl-C or SIGTERM (130)."""
    # torch warns of its own forward-mode formulas, which are scripted
    warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=FutureWarning)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's preemption ends a job as Ctrl-C does
    primary = os.environ.get("RANK", "0") == "0"
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails to flush at exit
        sys.exit(1)
    except UserError as error:
        if not primary:
            time.sleep(GRACE_SECONDS)
        print(f"distpro: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        if primary:
            print("; ".join(["distpro: interrupted", *map(str, error.args)]), file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        print(f"distpro: error: a process that decodes images died ({reason}): try fewer --workers", file=sys.stderr)
        sys.exit(2)
