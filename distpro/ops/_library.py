"""What the operators share: the library they are registered in, and passing tensors to kernels as addresses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from distpro import _native
from distpro.errors import UserError

LIBRARY = torch.library.Library("distpro", "DEF")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Elements per tile: on the CPU the float32 tiles of two maps fill an eighth of a 1 MB L2 cache.
TILE_ELEMENTS = {"cpu": 16384, "cuda": 8192}
# Fewest channels of a channels_last tile. On the CPU 56x56 maps in bfloat16 ran at 0.34 of the bandwidth of a copy with
# 16 channels, and at 0.69 with 256: 16 are 32 bytes of each pixel, so half of each cache line was wasted.
TILE_CHANNELS = {"cpu": 256, "cuda": 16}


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Define an operator whose one implementation serves every device that has kernels; returns its full name."""
    name = f"distpro::{LIBRARY.define(schema)}"
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(name, fake, lib=LIBRARY)
    return name


@torch.compiler.assume_constant_result
def has_kernels(device_type: str, index: int | None) -> bool:
    """See `distpro._native.has_kernels`; decided once per compiled graph."""
    return _native.has_kernels(device_type, index)


def dtype_code(kernels: Any, dtype: torch.dtype) -> Any:
    return getattr(kernels.Dtype, str(dtype).removeprefix("torch."))


def check_dtype(what: str, dtype: torch.dtype, choices: Sequence[torch.dtype] = DTYPES) -> None:
    if dtype not in choices:
        names = ", ".join(str(choice).removeprefix("torch.") for choice in choices)
        raise UserError(f"{what} has no kernel for {str(dtype).removeprefix('torch.')}: expected one of {names}")


def refuse_forward_mode(what: str, tensors: Sequence[Tensor]) -> None:
    """Raise in forward mode: PyTorch treats an operator without a rule as constant, with tangents silently 0."""
    if forward_ad._current_level < 0:  # not in forward mode; checking 88 tensors took 27 of perturb's 500 us
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise UserError(
            f"{what} has no forward-mode derivative: DISTPRO_NATIVE=0 runs its reference, which has one, or compute "
            "the gradient and multiply it by the tangents"
        )


def register_autograd(name: str, backward: Callable[..., Any], setup: Callable[..., Any] | None = None) -> None:
    """Like torch.library.register_autograd, but refuses forward-mode tangents, which that one silently drops.

    `setup(ctx, inputs, output)` saves what `backward(ctx, *gradients)` needs; a list of tensors is one argument.
    """
    what = name.removeprefix("distpro::")
    operator = getattr(torch.ops.distpro, what).default

    def below(args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, lengths: list[int | None], returns: list[Any], *flat: Any) -> Any:
            inputs = _nested(lengths, flat)
            output = below(inputs)
            if setup is not None:
                setup(ctx, inputs, output)
            returns.append(_lengths(output if isinstance(output, tuple) else (output,)))
            ctx.lengths = returns[0]
            return tuple(_flat(output if isinstance(output, tuple) else (output,)))

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return None, None, *_flat(backward(ctx, *_nested(ctx.lengths, gradients)))

    def run(*args: Any) -> Any:
        flat = _flat(args)
        tensors = [x for x in flat if isinstance(x, Tensor)]
        refuse_forward_mode(what, tensors)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return below(args)
        returns: list[Any] = []
        output = Function.apply(_lengths(args), returns, *flat)
        output = _nested(returns[0], output)
        return output[0] if len(output) == 1 else tuple(output)

    LIBRARY.impl(name, run, "Autograd")


def _flat(values: Sequence[Any]) -> list[Any]:
    return [x for value in values for x in (value if isinstance(value, list | tuple) else [value])]


def _lengths(values: Sequence[Any]) -> list[int | None]:
    return [len(value) if isinstance(value, list | tuple) else None for value in values]


def _nested(lengths: Sequence[int | None], flat: Sequence[Any]) -> list[Any]:
    """Undoes `_flat`."""
    rest = iter(flat)
    return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths]


def refuse_backward(name: str, sentence: str) -> None:
    """Make backward raise; otherwise PyTorch would only warn and give no gradient."""

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{sentence}; DISTPRO_NATIVE=0 runs its reference, which PyTorch can differentiate")

    register_autograd(name, refuse)


def memory_format(x: Tensor) -> torch.memory_format:
    """The format to read a tensor in: channels_last if it is dense in that only, else contiguous (perhaps a copy)."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def dense(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor in the memory format of its counterpart in `like`, copied only if needed."""
    if all(x.is_contiguous() and (x is y or y.is_contiguous()) for x, y in zip(tensors, like, strict=True)):
        return list(tensors)
    return [x.contiguous(memory_format=memory_format(y)) for x, y in zip(tensors, like, strict=True)]


def dense_once(
    tensors: Sequence[Tensor], formats: Sequence[torch.memory_format]
) -> tuple[tuple[int, ...], list[Tensor]]:
    """An id for each tensor, equal for equal memory, and each tensor in its format, copied at most once."""
    numbers = same([(t.data_ptr(), t.shape, t.stride(), f) for t, f in zip(tensors, formats, strict=True)])
    made: dict[int, Tensor] = {}
    for number, tensor, wanted in zip(numbers, tensors, formats, strict=True):
        if number not in made:
            made[number] = tensor.contiguous(memory_format=wanted)
    return numbers, [made[number] for number in numbers]


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def same(keys: Sequence[Any]) -> tuple[int, ...]:
    """An id for each key, equal for equal keys: (a, b, a) -> (0, 1, 0)."""
    numbers: dict[Any, int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


@contextlib.contextmanager
def stream_on(device: torch.device) -> Any:
    """The stream to launch on, with `device` made current; None for the CPU."""
    if device.type == "cpu":
        yield None
    else:
        with torch.cuda.device(device):
            yield torch.cuda.current_stream(device).cuda_stream
