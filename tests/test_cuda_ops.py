"""What only a GPU shows: streams, CUDA graphs, launches, and the shapes at which the CUDA kernels change their way.

test_native_ops.py and test_native_autograd.py compare the operators with their references on every device.
"""

from __future__ import annotations

import pytest
import torch
from test_native_ops import BF16, F16, F32, compare, maps, poison, relative  # noqa: F401

from distpro import _native
from distpro.ops import pathway_dots, pathway_loss, perturb

GPU = torch.cuda.is_available() and _native.native() is not None and _native.has_kernels("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device and a build with CUDA")]

LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
SHAPES = {
    "row bins behind the planes": (3, 300, 5, 5),
    "row bins behind the planes, six rows": (2, 300, 6, 9),
    "several chunks": (2, 700, 7, 7),
    "plane beyond shared memory": (2, 3, 96, 97),
    "row beyond shared memory": (1, 2, 7, 1300),
    "odd channels": (2, 33, 14, 14),
    "more channels than a chunk": (2, 1040, 4, 4),
    "one column": (2, 24, 9, 1),
}


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_way(shape, dtype, last):
    compare(*maps([shape, shape], dtype, "cuda", last, shared=2))


@pytest.mark.parametrize("distance", ["hcl", "l2", "l1"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_maps_off_the_16_byte_boundary(dtype, distance):
    students, teachers, weights = maps([(2, 32, 8, 8), (3, 5, 7, 7)], dtype, "cuda")

    def moved(x):
        memory = torch.empty(x.numel() + 8, dtype=dtype, device="cuda")
        return memory[1 : 1 + x.numel()].view(x.shape).copy_(x.detach())

    shifted = [moved(s).requires_grad_() for s in students]
    assert all(s.data_ptr() % 16 for s in shifted)
    compare(shifted, teachers, weights, distance)
    compare(students, [moved(t) for t in teachers], weights, distance)


def everything(students, teachers, weights, parameters, direction):
    """Every operator and the backward of the first; all results in one list."""
    loss, per_pathway = pathway_loss(students, teachers, weights)
    gradients = torch.autograd.grad(loss + per_pathway.sum(), [*students, weights])
    dots = pathway_dots(gradients[:-1], teachers)
    plus, minus, epsilon = perturb(parameters, direction, 0.01)
    return [loss, per_pathway, *gradients, dots, *plus, *minus, epsilon]


def inputs(seed=0, dtype=F32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 32, 16, 16)] * 3 + [(4, 64, 7, 7)] * 2 + [(4, 10, 1, 1)]
    vectors = [
        [torch.randn(size, generator=generator).cuda() for size in (1000, 7, 30000, 513)] for _ in ("theta", "v")
    ]
    students, teachers, weights = maps(shapes, dtype, "cuda", seed=seed)
    return [students, teachers, weights, *vectors]


def flat(nested):
    return [x for item in nested for x in (item if isinstance(item, list) else [item])]


@torch.no_grad()
def overwrite(old, new):
    for x, y in zip(flat(old), flat(new), strict=True):
        x.copy_(y)


def equal(got, want):
    return all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_works_on_the_current_stream():
    """Inputs that a busy stream will write: kernels on any other stream would meet what stood there before."""
    fresh = inputs(seed=1)
    want = everything(*fresh)
    stale = inputs(seed=2)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        everything(*stale)  # kernels are loaded and memory is at hand: below nothing waits for either
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        overwrite(stale, fresh)
        got = everything(*stale)
        done = torch.cuda.Event()
        done.record(stream)
    assert not done.query()  # nothing above waited for the stream
    stream.synchronize()
    assert equal(got, want)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_graph_replays_with_other_inputs(dtype):
    static = inputs(seed=0, dtype=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(*static)
    for seed in (1, 2, 3):
        fresh = inputs(seed, dtype)
        if seed == 3:  # a pathway that the replay drops: nothing of it may be read
            fresh[2].detach()[1] = 0
            for x in (fresh[0][1], fresh[1][1]):
                x.detach().fill_(torch.nan)
        overwrite(static, fresh)
        for x in captured:
            x.detach().fill_(torch.nan)
        graph.replay()
        got = [x.detach().clone() for x in captured]
        want = everything(*static)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert captured[0].isfinite()


def test_nothing_waits_for_the_device():
    given = inputs()
    everything(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_every_time():
    given = inputs()
    want = everything(*given)
    noise = torch.randn(4096, 4096, device="cuda")
    other = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(other):  # other work shuffles which blocks run when
            noise @ noise
        assert equal(everything(*given), want)


def test_number_of_launches():
    students, teachers, weights, parameters, direction = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss, per_pathway = pathway_loss(students, teachers, weights)
        torch.autograd.grad(loss + per_pathway.sum(), students)
        pathway_dots(students, teachers)
        perturb(parameters, direction, 0.01)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    if not names:
        pytest.skip("the profiler sees no kernels on this machine")
    for name, launches in {
        "forward_kernel": 1,
        "backward_kernel": 1,
        "sums_kernel": 2,  # of the loss and of the dots
        "dots_kernel": 1,
        "norm_kernel": 1,
        "epsilon_kernel": 1,
        "perturb_kernel": 1,
    }.items():
        assert sum(f"distpro::cuda::{name}" in n or f"::{name}<" in n for n in names) == launches, name


@LAYOUTS
def test_more_elements_than_31_bits_count(last):
    shape = (33, 16384, 64, 64)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    shape = (shape[0], shape[2], shape[3], shape[1]) if last else shape
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)  # no time for poison
    memory = [torch.empty(shape, dtype=BF16, device="cuda").normal_() for _ in range(2)]
    student, teacher = [x.permute(0, 3, 1, 2) if last else x for x in memory]
    student.requires_grad_()
    assert student.numel() > 2**31
    weights = torch.ones(1, device="cuda")
    loss, _ = pathway_loss([student], [teacher], weights)
    (gradient,) = torch.autograd.grad(loss, student)
    part = student.detach()[30:].requires_grad_()
    part_loss, _ = pathway_loss([part], [teacher[30:]], weights)
    (part_gradient,) = torch.autograd.grad(part_loss, part)
    others, _ = pathway_loss([student.detach()[:30]], [teacher[:30]], weights)
    assert relative(loss, (part_loss * 3 + others * 30) / 33) < 1e-6
    assert relative(gradient[30:] * 11.0, part_gradient) < 2e-2
