"""Access to the native layer, the compiled module `distpro._C`, which nothing else imports.

The environment variable DISTPRO_NATIVE selects it:

    unset   use the native layer if it is built; otherwise warn once and use the PyTorch references
    0       never use it
    1       raise an error if it is missing (for tests, which must not pass on the references instead)
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Any

from distpro.errors import UserError

REMEDY = "run `pip install .` in the checkout, with a C++17 compiler at hand"


def native() -> ModuleType | None:
    """Return `distpro._C`, or None to use the references; with DISTPRO_NATIVE=1, raise a `UserError` instead."""
    module, reason = _load()
    if module is None and _mode() != "0":
        sentence = f"the native layer is not in use: {reason}; {REMEDY}"
        if _mode() == "1":
            raise UserError(f"{sentence}, or drop DISTPRO_NATIVE=1")
        _warn_once(f"{sentence}. Falling back to the PyTorch references, which give the same results but are slower.")
    return module


def has_kernels(device_type: str, index: int | None = None) -> bool:
    """Return whether the kernels support such a device; if not, use the references, or raise as `native` does.

    index: of a GPU, to check its architecture and driver, too.
    """
    module = native()
    if module is None or device_type in ("cpu", "meta"):
        return module is not None
    lacking = _cuda_why_not(index) if device_type == "cuda" else f"none for device '{device_type}'"
    if lacking:
        sentence = f"the native layer has no kernels for {device_type} tensors: {lacking}"
        if _mode() == "1":
            raise UserError(f"{sentence}; build with nvcc at hand, or drop DISTPRO_NATIVE=1")
        _warn_once(f"{sentence}. Falling back to the PyTorch references, which give the same results but are slower.")
    return not lacking


@functools.cache
def _cuda_why_not(index: int | None) -> str | None:
    module, _ = _load()
    assert module is not None
    lacking = module.build_info()["cuda_why_not"]
    if lacking or index is None:
        return lacking
    try:
        module.kernel_arch(index)
    except RuntimeError as error:  # built for other architectures, or with a runtime that is newer than the driver
        return f"those that were built do not run on device {index}: {error}"
    return None


def why_not() -> str | None:
    """Return why the native layer is not in use, or None if it is; never warn, nor raise for a missing layer."""
    return _load()[1]


def build_info() -> dict[str, Any] | None:
    """Return how the native layer was built (compiler, flags, CUDA, ...), or None if it is not in use."""
    module, _ = _load()
    return None if module is None else module.build_info()


def _mode() -> str:
    mode = os.environ.get("DISTPRO_NATIVE", "")
    if mode not in ("", "0", "1"):
        raise UserError(f"DISTPRO_NATIVE is '{mode}', expected 0 (never), 1 (always) or unset (where it is built)")
    return mode


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Return (module, None), or (None, reason)."""
    if _mode() == "0":
        return None, "DISTPRO_NATIVE=0"
    # torch first, so that `_C` shares its OpenMP runtime and threads.
    import torch  # noqa: F401

    try:
        return importlib.import_module("distpro._C"), None
    except ModuleNotFoundError:
        return None, "distpro._C is not built for this Python"
    except ImportError as error:  # built, but does not load: the loader says why
        return None, str(error)


@functools.cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=3)
