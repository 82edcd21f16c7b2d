"""The one door to the native layer, the compiled module `distpro._C`; nothing else imports it.

The environment variable DISTPRO_NATIVE decides, once a process:

    unset   use the native layer if it is there; otherwise warn once and use the references in PyTorch
    0       never use it
    1       a missing native layer is an error (tests: a pass must not mean that the references passed)
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
    """`distpro._C`, or None where the references take its place; a `UserError` if DISTPRO_NATIVE=1."""
    module, reason = _load()
    if module is None and _mode() != "0":
        sentence = f"the native layer is not in use: {reason}; {REMEDY}"
        if _mode() == "1":
            raise UserError(f"{sentence}, or drop DISTPRO_NATIVE=1")
        _warn_once(f"{sentence}. The references in PyTorch are right, but slower.")
    return module


def serves(device_type: str, index: int | None = None) -> bool:
    """Whether the kernels work on tensors of such a device; False: the references do, as `native` would have it.

    index: of a GPU, whose architecture and driver are then asked about, too.
    """
    module = native()
    if module is None or device_type in ("cpu", "meta"):
        return module is not None
    lacking = _cuda_why_not(index) if device_type == "cuda" else f"none for device '{device_type}'"
    if lacking:
        sentence = f"the native layer has no kernels for {device_type} tensors: {lacking}"
        if _mode() == "1":
            raise UserError(f"{sentence}; build with nvcc at hand, or drop DISTPRO_NATIVE=1")
        _warn_once(f"{sentence}. The references in PyTorch are right, but slower.")
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
    """Why the native layer is not in use, or None if it is. Never warns, never raises for a missing layer."""
    return _load()[1]


def build_info() -> dict[str, Any] | None:
    """What the native layer was built with (compiler, flags, CUDA, ...), or None if it is not in use."""
    module, _ = _load()
    return None if module is None else module.build_info()


def _mode() -> str:
    mode = os.environ.get("DISTPRO_NATIVE", "")
    if mode not in ("", "0", "1"):
        raise UserError(f"DISTPRO_NATIVE is '{mode}', expected 0 (never), 1 (always) or unset (where it is built)")
    return mode


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The module, or None and the reason."""
    if _mode() == "0":
        return None, "DISTPRO_NATIVE=0"
    # torch first: `_C` then finds torch's OpenMP runtime loaded and shares it and its threads.
    import torch  # noqa: F401

    try:
        return importlib.import_module("distpro._C"), None
    except ModuleNotFoundError:
        return None, "distpro._C is not built for this Python"
    except ImportError as error:  # built, but does not load: say what the loader says
        return None, str(error)


@functools.cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=3)
