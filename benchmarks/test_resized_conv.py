"""Resizing and a 3x3 convolution as one transposed convolution, against the two apart, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distpro.transforms import ResizedConv2d

# channels in and out, side of the student's and of the teacher's map
CIFAR = {"s2-t1": (32, 32, 16, 32), "s3-t1": (32, 32, 8, 32), "s3-t2": (64, 64, 8, 16)}
IMAGENET = {"s2-t1": (64, 64, 28, 56), "s4-t1": (64, 64, 7, 56), "s4-t3": (256, 256, 7, 14)}
MAPS = [("cifar", name, *shape) for name, shape in CIFAR.items()]
MAPS += [("imagenet", name, *shape) for name, shape in IMAGENET.items()]
KINDS = {"float32": (torch.float32, torch.contiguous_format), "bfloat16": (torch.bfloat16, torch.channels_last)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("data", "name", "inputs", "outputs", "small", "large"), MAPS)
def test_resized_conv(compare_steps, device, request, benchmark, kind, data, name, inputs, outputs, small, large):
    dtype, layout = KINDS[kind]
    count = request.config.getoption(f"--{data}-batch")
    torch.manual_seed(0)
    conv = ResizedConv2d(inputs, outputs, (small, small), (large, large)).to(device)
    x = torch.randn(count, inputs, small, small, device=device).contiguous(memory_format=layout).requires_grad_()
    gradient = torch.randn(count, outputs, large, large, device=device, dtype=dtype).contiguous(memory_format=layout)

    def plain() -> torch.Tensor:
        return F.conv2d(F.interpolate(x, (large, large), mode="nearest"), conv.weight, padding=1)

    def passes(call):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = call()
        return y, torch.autograd.grad(y, (x, conv.weight), gradient)

    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    # TF32 rounds sums of weights in one, single weights in the other: they would differ by 3e-4
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        results = [(y, *g) for y, g in map(passes, (lambda: conv(x), plain))]
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()
    steps = {"one": lambda: passes(lambda: conv(x)), "two": lambda: passes(plain)}
    ratio = compare_steps(steps, "one", batch=count, shape=(inputs, outputs, small, large))
    benchmark.extra_info["two / one"] = ratio["two"]["one"]
    print("", f"{data} {name} {kind}: two / one {ratio['two']['one']}", sep="\n")
