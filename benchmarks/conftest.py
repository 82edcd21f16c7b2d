"""How the benchmarks measure: contenders take turns in every round, so that the machine's load affects all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import distpro
from distpro import _native
from distpro.env import device_name

Clock = Callable[[], float]  # in seconds
HEAD_START = 60_000_000  # cycles, some 30 ms: more than the host needs for the 1,160 launches of eager PyTorch
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes copied to measure the bandwidth: more than the caches hold


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("distpro")
    group.addoption("--cifar-batch", type=int, default=64, help="images in a batch of CIFAR maps")
    group.addoption("--imagenet-batch", type=int, default=2, help="images in a batch of ImageNet maps")
    group.addoption("--rounds", type=int, default=7, help="times that each contender runs")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--all-pairs", action="store_true", help="hours to finish of every pair of the paper on a CPU too")
    group.addoption("--jpegs", type=int, default=48, help="JPEGs of an epoch")
    group.addoption("--jpeg-batch", type=int, default=16, help="JPEGs of a batch")
    group.addoption("--jpeg-folder", type=Path, help="an ImageFolder in place of drawn JPEGs")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if _native.native() is None or not _native.has_kernels(name):
        pytest.skip(f"no native layer for {name}: {_native.why_not()}")
    return torch.device(name)


@pytest.fixture
def compare_ops(
    benchmark: Any, request: pytest.FixtureRequest, device: torch.device
) -> Callable[[dict[str, Callable[[], Any]], int, Any], None]:
    """`compare_ops(contenders, counted_bytes, shapes)`: times each contender and writes `extra_info`.

    `contenders["native"]` is what pytest-benchmark reports; the ratios to the others are quartiles over rounds of the
    ratio within a round. `counted_bytes`: the least that the work has to move.
    """

    def run(contenders: dict[str, Callable[[], Any]], counted_bytes: int, shapes: Any) -> None:
        copied = COPIED[device.type]
        source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
        target = torch.empty_like(source).fill_(0)
        contenders = {"copy": lambda: target.copy_(source), **contenders}
        rounds: int = request.config.getoption("--rounds")
        took = interleaved(contenders, rounds, device, calls=1)
        native = took.pop("native")
        copy_rate = [2 * copied / t for t in took.pop("copy")]
        rates = [counted_bytes / t for t in native]
        benchmark.extra_info.update(
            device=device_name(device),
            distpro=distpro.__version__,
            torch=torch.__version__,
            native=_native.build_info(),
            shapes=shapes,
            rounds=rounds,
            counted_bytes=counted_bytes,
            milliseconds={"native": spread(native, 1e3)} | {name: spread(t, 1e3) for name, t in took.items()},
            gigabytes_per_second=spread(rates, 1e-9),
            copy_gigabytes_per_second=spread(copy_rate, 1e-9),
            share_of_copy=spread([r / c for r, c in zip(rates, copy_rate, strict=True)]),
            times_faster_than={
                name: spread([t / n for t, n in zip(other, native, strict=True)]) for name, other in took.items()
            },
        )
        benchmark.pedantic(lambda: (contenders["native"](), finish(device)), rounds=rounds, warmup_rounds=1)
        print("", *(f"{k}: {v}" for k, v in benchmark.extra_info.items() if isinstance(v, dict) and k != "native"))

    return run


@pytest.fixture
def compare_steps(
    benchmark: Any, request: pytest.FixtureRequest, device: torch.device
) -> Callable[..., dict[str, dict[str, float]]]:
    """`compare_steps(steps, winner, clock, **facts)`: times whole training steps and writes `extra_info`.

    Returns `ratio[a][b]`, the median over rounds of a's time over b's within a round. `steps[winner]` is what
    pytest-benchmark reports. `clock`: for times on a CPU.
    """

    def run(
        steps: dict[str, Callable[[], Any]], winner: str, clock: Clock = time.perf_counter, **facts: Any
    ) -> dict[str, dict[str, float]]:
        rounds: int = request.config.getoption("--rounds")
        took = interleaved(steps, rounds, device, clock)
        ratio = {
            a: {b: round(statistics.median(x / y for x, y in zip(took[a], took[b], strict=True)), 4) for b in took}
            for a in took
        }
        benchmark.extra_info.update(
            device=device_name(device),
            distpro=distpro.__version__,
            torch=torch.__version__,
            rounds=rounds,
            milliseconds={name: spread(t, 1e3) for name, t in took.items()},
            **facts,
        )
        benchmark.pedantic(lambda: (steps[winner](), finish(device)), rounds=rounds, warmup_rounds=1)
        return ratio

    return run


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    clock: Clock = time.perf_counter,
    calls: int = 5,
) -> dict[str, list[float]]:
    """Seconds per call of each function in each round, after one warm-up call of each.

    On a GPU `calls` calls in a row are timed, as in training: the host runs ahead if it can. With `calls=1` (for an
    operator) only its kernels are timed: the GPU waits until the host has launched them.

    Each round has its own order: whichever function follows the copy finds cold caches. When that was always the same
    one, perturb of a small network was 0.90 times as fast as `torch._foreach`.
    """

    def seconds(function: Callable[[], Any]) -> float:
        finish(device)
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if calls == 1:
                torch.cuda._sleep(HEAD_START)
            begin.record()
            for _ in range(calls):
                function()
            end.record()
            finish(device)
            return begin.elapsed_time(end) / 1e3 / calls
        start = clock()
        function()
        return clock() - start

    for function in functions.values():
        function()
    took: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            took[name].append(seconds(functions[name]))
    return took


def spread(values: list[float], unit: float = 1.0) -> list[float]:
    """[lower quartile, median, upper quartile]"""
    return [round(unit * q, 4) for q in statistics.quantiles(values, n=4)]
