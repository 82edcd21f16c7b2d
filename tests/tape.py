"""A CUDA graph without a GPU: the operators of a capture on tape, played again on the same memory.

As in a real capture, nothing counts that happens while it is recorded, Python does not run again, every operator reads
and writes where it did, and what would have to wait for a value (`item`, a branch on a tensor) fails.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
READS_BACK = (ATEN._local_scalar_dense, ATEN.equal, ATEN.nonzero, ATEN.masked_select, ATEN.unique_dim, ATEN._unique2)
INDEXES = (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_)  # by a mask: it has to be counted


class Recorder(TorchDispatchMode):
    """Records what runs. Memory that was there before, and is written, is put back by `undo`."""

    def __init__(self):
        super().__init__()
        self.tape, self.kept, self.made = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = function.overloadpacket
        if kind in READS_BACK or (kind in INDEXES and any(t.dtype == torch.bool for t in tensors(args[1]))):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(given):
                    self._keep(tensor)
        if "batch_norm" in str(function) and "backward" not in str(function):
            for tensor in tensors(args[3:5]):  # the running statistics, which the schema does not say are written
                self._keep(tensor)
        read = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        result = function(*args, **kwargs)
        fresh = [t for t in tensors(result) if t.untyped_storage()._cdata not in read]
        self.made |= {t.untyped_storage()._cdata for t in fresh}
        self.tape.append((function, args, kwargs, result, bool(fresh)))
        return result

    def _keep(self, tensor):
        where = tensor.untyped_storage()._cdata
        if where not in self.made and where not in self.kept:
            self.kept[where] = (tensor, tensor.detach().clone())

    @torch.no_grad()
    def undo(self):
        for tensor, value in self.kept.values():
            tensor.copy_(value)

    @torch.no_grad()
    def play(self):
        for function, args, kwargs, result, fresh in self.tape:
            again = function(*args, **kwargs)
            if fresh:
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    old.copy_(new)


def tensors(tree):
    """Those with memory: a tangent that is zero has none."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf._is_zerotensor()]


class Tape:
    """A backend of `distpro.graphs` for the CPU; counts what it did."""

    device = torch.device("cpu")

    def __init__(self):
        self.warmed = self.captures = self.replays = 0

    def warm(self, work):
        self.warmed += 1
        return work()

    def capture(self, work):
        self.captures += 1
        recorder = Recorder()
        try:
            with recorder:
                result = work()
        finally:
            recorder.undo()

        def replay():
            self.replays += 1
            recorder.play()

        return replay, result
