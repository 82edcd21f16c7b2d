"""pathway_loss with kernels against its reference, everywhere it may run. Memory is poisoned before each test."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings

import pytest
import torch

from distpro import _native
from distpro.errors import UserError
from distpro.ops import _library, pathway_loss, reference
from distpro.ops._library import memory_format

pytestmark = pytest.mark.skipif(_native.native() is None, reason=f"no native layer: {_native.why_not()}")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Of a loss and of a gradient, as norm of the difference over norm; a 16-bit gradient is rounded when stored.
BOUNDS = {F64: (1e-13, 1e-13), F32: (1e-6, 1e-6), BF16: (1e-6, 2e-2), F16: (1e-6, 2e-2)}
SHAPES = [
    *((2, 16, n, n) for n in (1, 2, 3, 4, 5, 7, 8, 14, 16, 28, 32, 56)),
    *((2, 5, *hw) for hw in ((7, 5), (3, 9), (14, 6), (9, 2), (2, 16), (5, 1), (1, 6), (12, 20))),
    *((1, 3, 8, 8), (3, 37, 4, 4), (1, 1, 13, 13), (5, 70, 6, 6), (1, 40, 112, 112)),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not (torch.cuda.is_available() and _native.has_kernels("cuda")):
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def poison():
    """Every new tensor starts as NaN: an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the references' pooling is not deterministic on CUDA
        yield
    torch.use_deterministic_algorithms(False)


def maps(shapes, dtype=F32, device="cpu", last=False, shared=1, seed=0):
    """Students, teachers (each `shared` students in a row have one) and weights."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape):
        x = torch.randn(shape, generator=generator, dtype=F64).to(device, dtype)
        return x.to(memory_format=torch.channels_last) if last else x

    students = [one(shape).requires_grad_() for shape in shapes]
    teachers = [one(shapes[i]) for i in range(0, len(shapes), shared)]
    kind = reference.accumulation(dtype)
    weights = torch.rand(len(shapes), generator=generator, dtype=F64).to(device, kind).requires_grad_()
    return students, [teachers[p // shared] for p in range(len(shapes))], weights


def results(function, students, teachers, weights, distance="hcl", upstream=None):
    """Both outputs and all gradients, the students' and the weights', of a combination of both."""
    loss, per_pathway = function(students, teachers, weights, distance)
    g = torch.linspace(0.5, 2, len(students), device=weights.device, dtype=weights.dtype)
    return [per_pathway, loss], torch.autograd.grad(0.7 * loss + (g * per_pathway).sum(), [*students, weights])


def relative(got, want):
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-300)).item()


def compare(students, teachers, weights, distance="hcl"):
    """Kernel against the reference in float64 on the same numbers."""
    dtype = students[0].dtype
    outputs, gradients = results(pathway_loss, students, teachers, weights, distance)
    exact = [[x.detach().double() for x in xs] for xs in (students, teachers, [weights])]
    inputs = [x.requires_grad_() for x in exact[0]], exact[1], exact[2][0].requires_grad_()
    want, wanted = results(reference.pathway_loss, *inputs, distance)
    for got, expected in zip(outputs, want, strict=True):
        assert got.dtype == reference.accumulation(dtype)
        assert relative(got, expected) < BOUNDS[dtype][0]
    for p, (got, expected) in enumerate(zip(gradients, wanted, strict=True)):
        assert relative(got, expected) < BOUNDS[dtype][p < len(students)]
    for s, g in zip(students, gradients, strict=False):
        assert (g.dtype, memory_format(g)) == (s.dtype, memory_format(s))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_hcl_on_every_shape(device, dtype, last):
    for shape in SHAPES:
        compare(*maps([shape], dtype, device, last))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_plain_distances_and_tokens(device, dtype, distance, last):
    compare(*maps([(2, 5, 7, 3), (1, 130, 9, 9)], dtype, device, last), distance)
    compare(*maps([(2, 197, 24), (3, 7), (70000,)], dtype, device), distance)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pathways", [1, 27, 64, 300])
def test_many_pathways_of_mixed_shapes(device, pathways, last):
    sides = itertools.cycle([(2, 8, 8, 8), (2, 24, 7, 7), (2, 4, 16, 16)])
    shapes = [shape for shape, _ in zip(sides, range(-(-pathways // 3)), strict=False) for _ in range(3)][:pathways]
    compare(*maps(shapes, F32, device, last, shared=3))


def test_real_sizes_in_many_tiles(device):
    compare(*maps([(8, 32, 32, 32)] * 3 + [(8, 64, 16, 16)] * 3 + [(8, 128, 8, 8)] * 3, F32, device, shared=3))


def test_special_numbers_of_16_bit_types(device):
    """Every bit pattern is read as PyTorch reads it, and gradients are rounded as PyTorch rounds them."""
    for dtype in (BF16, F16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
        for factor in (1.0, 0.03, 3e-6, 1e3):
            s = x.reshape(1, -1).detach().requires_grad_()
            weight = torch.full((1,), factor * s.numel() / 2, device=device)
            (got,) = torch.autograd.grad(pathway_loss([s], [torch.zeros_like(s)], weight, "l2")[0], s)
            scale = torch.tensor(2.0, dtype=F64) * weight.cpu().double() / s.numel()
            want = (scale.float().to(device) * s.detach().float()).to(dtype)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_weight_zero_is_not_read(device):
    students, teachers, weights = maps([(2, 4, 8, 8)] * 3, F32, device)
    for x in (students[1], teachers[1]):
        x.detach().fill_(torch.nan)
    weights.detach()[1] = 0
    for function in (pathway_loss, reference.pathway_loss):
        (per_pathway, loss), gradients = results(function, students, teachers, weights)
        assert loss.isfinite()
        assert per_pathway[1] == 0
        assert gradients[1].eq(0).all()
        assert gradients[-1][1] == 0
        assert per_pathway[[0, 2]].gt(0).all()
    weights.detach()[0] = torch.nan  # is a weight, and shows
    assert pathway_loss(students, teachers, weights)[0].isnan()


def test_other_memory_is_copied(device):
    """Students with gaps or other orders, teachers in another layout, types that differ: the same numbers."""
    students, teachers, weights = maps([(2, 6, 8, 8)] * 2, F32, device)
    wide = torch.randn(2, 6, 8, 16, device=device)
    odd = [wide[..., ::2].requires_grad_(), students[1].detach().permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)]
    odd[1].requires_grad_()
    teachers[1] = teachers[1].to(memory_format=torch.channels_last)
    got, gradients = results(pathway_loss, odd, teachers, weights)
    want, wanted = results(reference.pathway_loss, odd, teachers, weights)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients, wanted)
    half = [t.bfloat16() for t in teachers]
    torch.testing.assert_close(
        pathway_loss(students, half, weights)[1], reference.pathway_loss(students, half, weights)[1]
    )


def test_a_shared_map_is_copied_once(device):
    x, last = torch.randn(2, 3, 4, 5, device=device), torch.channels_last
    numbers, (a, b, c) = _library.dense_once([x, x, x], [last, last, torch.contiguous_format])
    assert numbers == (0, 0, 1)
    assert a is b
    assert a.is_contiguous(memory_format=last)
    assert c.data_ptr() == x.data_ptr()


def test_same_bits_every_time(device):
    given = maps([(8, 32, 32, 32)] * 6 + [(8, 40, 7, 7)] * 6, F32, device, shared=3)
    before = torch.get_num_threads()
    kept = []
    for threads in (1, 2, 3, 7, 7):
        torch.set_num_threads(threads)
        kept.append(results(pathway_loss, *given))
    torch.set_num_threads(before)
    for outputs, gradients in kept[1:]:
        for got, want in zip([*outputs, *gradients], [*kept[0][0], *kept[0][1]], strict=True):
            assert torch.equal(got, want)


def test_errors():
    s, t, one = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.ones(1)
    cases = [
        (([s], [t.clone().requires_grad_()], one), "detach it"),
        (([s], [t[:1]], one), r"pathway 0: the student's map is \[2, 3, 4, 4\], the teacher's \[1, 3, 4, 4\]"),
        (([s], [t, t], one), "1 student maps, 2 teacher maps, 1 weights"),
        (([s], [t], torch.ones(2)), "2 weights"),
        (([s[0]], [t[0]], one), "use l2 or l1 for tokens"),
        (([s], [t], one, "l3"), "did you mean"),
        (([s.int()], [t.int()], one), "no kernel for int32"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            pathway_loss(*arguments)
    with pytest.raises(ValueError, match="must be at least 1"):
        pathway_loss([s[:0]], [t[:0]], one)


@pytest.mark.slow
@pytest.mark.parametrize("simd", ["baseline", "avx2"])
def test_lesser_instruction_sets(simd):
    """The same tests with the kernels that other processors would choose."""
    best = _native.native().simd()
    if simd == best or best == "baseline":
        pytest.skip(f"this processor's best is {best}")
    environment = os.environ | {"DISTPRO_SIMD": simd}
    said = [sys.executable, "-c", "import torch, distpro._native as n; print(n.native().simd())"]
    assert subprocess.run(said, env=environment, capture_output=True, text=True).stdout.strip() == simd
    tests = "cpu and (every_shape or plain or special)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
