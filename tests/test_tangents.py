"""Forward mode through batch norm: as torch's own rule has it, in fewer passes."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from distpro.tangents import FastTangents

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def case(shape, dtype, layout=torch.contiguous_format):
    torch.manual_seed(0)
    x, dx = (torch.randn(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(2))
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], dtype=dtype)
    nn.init.normal_(norm.weight, 1)
    nn.init.normal_(norm.bias)
    return norm, 3 + 2 * x, dx, [torch.randn_like(p) for p in norm.parameters()]


def through(norm, x, dx, tangents):
    """The output, its tangent, and the running statistics afterwards."""
    norm.load_state_dict(norm.state_dict() | {"running_mean": torch.zeros(len(norm.weight))})
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(norm.parameters(), tangents, strict=True)]
        parameters = dict(zip(("weight", "bias"), duals, strict=True))
        y = torch.func.functional_call(norm, parameters, (forward_ad.make_dual(x, dx) if dx is not None else x,))
        primal, tangent = forward_ad.unpack_dual(y)
    return primal, tangent, norm.running_mean.clone()


@pytest.mark.parametrize("shape", [(16, 5, 7, 6), (9, 4), (2, 3, 1, 1)])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_it_is_torchs_own_rule(shape, dtype):
    norm, *inputs = case(shape, dtype)
    wanted = through(norm, *inputs)
    with FastTangents():
        found = through(norm, *inputs)
    tolerance = 1e-12 if dtype == F64 else 1e-5
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_bfloat16_it_is_off_by_roundings(layout):
    norm, *inputs = case((32, 8, 9, 9), BF16, layout)
    theirs = through(norm, *inputs)[1]
    with FastTangents():
        ours = through(norm, *inputs)[1]
    x, dx, tangents = inputs
    exact = through(norm.double(), x.double(), dx.double(), [t.double() for t in tangents])[1]
    error, its = ((t.double() - exact).norm() / exact.norm() for t in (ours, theirs))  # one is 2^-9 to 2^-8
    assert ours.dtype == BF16
    assert ours.is_contiguous(memory_format=layout)
    assert error < 1.5 * its < 1e-2


def test_what_it_does_not_know_is_left_to_torch():
    norm, x, dx, tangents = case((8, 3, 4, 4), F64)
    for training, given in ((False, (x, dx, tangents)), (True, (x, None, tangents))):
        norm.train(training)
        wanted = through(norm, *given)
        with FastTangents():
            found = through(norm, *given)
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_on_a_gpu_a_tangent_in_bfloat16_stays_so(kind):
    """Without a GPU: fake tensors have the types that its kernels return."""
    with FakeTensorMode(), torch.no_grad(), forward_ad.dual_level(), FastTangents():
        dual = forward_ad.make_dual(*(torch.randn(4, 6, dtype=BF16, device="cuda") for _ in range(2)))
        if kind == "layer":
            y = F.layer_norm(dual, (6,))
        else:  # parameters at rest
            y = F.batch_norm(dual, *(torch.zeros(6, device="cuda") for _ in range(2)), training=True)
        assert forward_ad.unpack_dual(y).tangent.dtype == BF16
