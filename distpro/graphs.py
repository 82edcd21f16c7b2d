"""Work on the device as CUDA graphs: hundreds of launches become one.

A graph replays its kernels on the same memory, so only the contents of tensors may change between calls.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from distpro.precision import to_device

WARM_UPS = 3  # eager calls before a capture, in which libraries choose kernels and an optimizer creates its state
MOST_GRAPHS = 4  # kept at once; a process seldom returns to an earlier set of pathways


class Backend(Protocol):
    """How work is captured."""

    device: torch.device

    def warm(self, work: Callable[[], Any]) -> Any:
        """Run it once, eagerly, under the conditions of a capture."""

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return a function that replays it, and the result that each replay overwrites; run nothing."""


class CudaGraphs:
    """CUDA's graphs, on one dedicated stream and with one memory pool, since replays never overlap."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = torch.cuda.graph_pool_handle()

    def warm(self, work: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        gc.collect()  # an autograd graph that is still alive would refer to another stream
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # other threads, such as DALI's, may keep using the device
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError as error:
            self._tidy(current)
            raise error.__context__ or error from None  # the work's own error; torch's says only that it failed
        return graph.replay, result

    def _tidy(self, current: torch.cuda.Stream) -> None:
        """Reset the stream, the allocator and the generator, which a failed capture leaves set (torch 2.11)."""
        torch.cuda.set_stream(current)
        with suppress(AttributeError, RuntimeError):  # a private API, which raises if torch has cleaned up itself
            torch._C._cuda_endAllocateToPool(current.device_index, self.pool)
            torch._C._cuda_releasePool(current.device_index, self.pool)  # the reference that the capture took
        with suppress(AttributeError, RuntimeError):
            generator = torch.cuda.default_generators[current.device_index]
            fresh = torch.Generator(generator.device)
            fresh.set_state(generator.get_state())
            generator.graphsafe_set_state(fresh)


class CaptureError(Exception):
    """The work cannot be captured, for the given reason."""


class _Capturing:
    now = False

    def __enter__(self) -> None:
        _Capturing.now = True

    def __exit__(self, *error: object) -> None:
        _Capturing.now = False


def capturing() -> bool:
    """Return whether a capture is in progress, when neither the device nor its generators may be queried."""
    return _Capturing.now


class Captured:
    """A function of tensors that runs eagerly for the first calls and replays its captured kernels afterwards.

    The result, tensors in any structure, is overwritten by the next call. Inputs are copied to where the kernels read.
    """

    def __init__(self, function: Callable[..., Any], backend: Backend) -> None:
        self.function, self.backend, self.left = function, backend, WARM_UPS
        self.inputs: list[Tensor] = []
        self.replay: Callable[[], None] | None = None
        self.result: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        there = [to_device(t, self.backend.device) for t in inputs]
        if self.left:
            self.left -= 1
            return self.backend.warm(lambda: self.function(*there))
        if self.replay is None:
            self.inputs = [t.clone() for t in there]
            try:
                with _Capturing():
                    self.replay, self.result = self.backend.capture(lambda: self.function(*self.inputs))
            except RuntimeError as error:
                raise CaptureError(str(error).splitlines()[0]) from error
        for ours, given in zip(self.inputs, there, strict=True):
            ours.copy_(given)
        self.replay()
        return self.result


class Graphs:
    """`graphs(key, function, *inputs)`: `function(key, *inputs)`, captured once per key and layout of the inputs."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.known: dict[Hashable, Captured] = {}  # least recently used first

    def __call__(self, key: tuple[Any, ...], function: Callable[..., Any], *inputs: Tensor) -> Any:
        full = (key, tuple((t.shape, t.dtype, t.stride()) for t in inputs))
        found = self.known.pop(full, None) or Captured(partial(function, key), self.backend)
        self.known[full] = found
        if len(self.known) > MOST_GRAPHS:
            del self.known[next(iter(self.known))]
        return found(*inputs)
