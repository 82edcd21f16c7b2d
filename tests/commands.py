"""Commands as a user calls them."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

import distpro.train
from distpro.errors import run_command

SHORT = ["--teacher", "resnet8", "--student", "wrn_10_1", "--batch-size", "64"]
SHORT += ["--epochs", "1", "--search-epochs", "1", "--teacher-epochs", "2"]


def run(*words, module="distpro.train"):
    return subprocess.run([sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, timeout=300)


def called(main, *words):
    """The same in this process, without the seconds that imports take; `main` is a command's."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["distpro", *map(str, words)])
        try:
            run_command(main)
        except SystemExit as left:
            code = left.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def mistake(*words):
    """The one sentence that these words of a command line earn; the exit code is checked."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distpro.train", *map(str, words)])
        patch.setattr("distpro.errors.print", lambda line, **_: lines.append(line), raising=False)
        with pytest.raises(SystemExit) as left:
            run_command(distpro.train.main)
    assert left.value.code == 2
    assert len(lines) == 1
    return lines[0].removeprefix("distpro: error: ")
