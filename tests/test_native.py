"""The native layer: what it says of itself, its planning arithmetic, the switch, and `python -m distpro.env`."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import distpro
from distpro import _native
from distpro.errors import UserError

PACKAGE = Path(distpro.__file__).parent
CSRC = Path(__file__).parents[1] / "csrc"


@pytest.fixture
def C() -> ModuleType:
    module = _native.native()  # DISTPRO_NATIVE=1 makes a missing one an error
    if module is None:
        pytest.skip(f"no native layer: {_native.why_not()}")
    return module


def python(*arguments: str, native: str | None = None) -> subprocess.CompletedProcess[str]:
    """Another Python with this very package and DISTPRO_NATIVE set to `native`."""
    env = {name: value for name, value in os.environ.items() if name != "DISTPRO_NATIVE"}
    env |= {"PYTHONPATH": str(PACKAGE.parent)} | ({} if native is None else {"DISTPRO_NATIVE": native})
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)


# -- what the module is ------------------------------------------------------------------------------------------


def test_build_info_says_how_it_was_built(C):
    info = C.build_info()
    assert set(info) == {
        *("version", "compiler", "flags", "build_type", "openmp"),
        *("cuda", "cuda_archs", "cuda_why_not"),
    }
    assert re.fullmatch(r"\d+\.\d+.*", info["version"])
    assert "-O3" in info["flags"]
    assert "fast-math" not in info["flags"]
    assert (info["cuda"] is None) == (info["cuda_archs"] is None) == (info["cuda_why_not"] is not None)
    assert _native.build_info() == info


def test_cuda_runtime_answers_without_a_gpu(C):
    if C.build_info()["cuda"] is None:
        pytest.skip("built without CUDA")
    info = C.cuda_info()
    major, minor = C.build_info()["cuda"].split(".")[:2]
    assert info["runtime"] == int(major) * 1000 + int(minor) * 10
    assert (info["devices"] > 0) == (info["status"] == "no error")
    if info["devices"] == 0:
        with pytest.raises(RuntimeError):
            C.kernel_arch(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_fit_this_gpu(C):
    if C.build_info()["cuda"] is None:
        pytest.skip("built without CUDA")
    major, minor = torch.cuda.get_device_capability(0)
    assert C.kernel_arch(0) <= 10 * major + minor
    assert C.cuda_info()["driver"] >= C.cuda_info()["runtime"] // 1000 * 1000


def test_shares_the_threads_of_torch(C):
    if C.build_info()["openmp"] is None:
        pytest.skip("built without OpenMP")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert C.threads() == threads
    finally:
        torch.set_num_threads(before)


def test_no_torch_at_build_time(C):
    """No torch header in csrc, no torch library in the module: one build serves every torch."""
    if CSRC.is_dir():
        sources = [path for path in CSRC.rglob("*") if path.is_file()]
        assert sources
        include = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)\b')
        assert [path.name for path in sources if include.search(path.read_text())] == []
    binary = Path(C.__file__).read_bytes()
    # Names of needed libraries and of imported symbols stand in the file as they are.
    for name in (b"libtorch", b"libc10", b"libcudart.so", b"_ZN2at", b"_ZN3c10"):
        assert name not in binary


# -- planning arithmetic, against formulas written independently ---------------------------------------------------


@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 7, 8, 14, 56, 2**40])
def test_hcl_levels(C, height):
    used = [0] + [level for level in (4, 2, 1) if level < height]
    raw = [0.5**i for i in range(len(used))]
    levels, weights = zip(*C.hcl_levels(height), strict=True)
    assert list(levels) == used
    assert weights == pytest.approx([w / sum(raw) for w in raw], rel=1e-15)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 14, 17, 56])
@pytest.mark.parametrize("level", [1, 2, 4, 7])
def test_pool_bins_are_those_of_torch(C, size, level):
    bins = C.pool_bins(size, level)
    assert bins == [(i * size // level, math.ceil((i + 1) * size / level)) for i in range(level)]
    row = torch.arange(size, dtype=torch.float64)
    pooled = torch.nn.functional.adaptive_avg_pool1d(row[None], level)[0]
    assert torch.equal(torch.stack([row[a:b].mean() for a, b in bins]), pooled)


def test_pool_bins_beyond_32_and_near_64_bits(C):
    for size in (2**31 + 1, 2**62 + 3, 2**63 - 1):
        assert C.pool_bins(size, 7) == [(i * size // 7, -(-(i + 1) * size // 7)) for i in range(7)]


def expected_plan(shapes, teacher_of, tile_elements):
    plan = []
    for teacher in dict.fromkeys(teacher_of):
        group = [p for p, t in enumerate(teacher_of) if t == teacher]
        n, c, h, w = shapes[group[0]]
        step = max(1, min(n * c, tile_elements // (h * w)))
        step = step // 8 * 8 or step
        for first in range(0, n * c, step):
            plan += [(p, first, min(step, n * c - first)) for p in group]
    return plan


def test_tile_plan_random(C):
    rng = random.Random(0)
    for _ in range(200):
        maps = [
            (rng.randint(1, 5), rng.randint(1, 40), rng.randint(1, 15), rng.randint(1, 15))
            for _ in range(rng.randint(1, 4))
        ]
        teacher_of = [rng.randrange(len(maps)) for _ in range(rng.randint(0, 9))]
        shapes = [maps[t] for t in teacher_of]
        tile_elements = rng.choice([1, 7, 100, 4096, 10**9])
        plan = C.tile_plan(shapes, teacher_of, tile_elements)
        assert plan == expected_plan(shapes, teacher_of, tile_elements)
        # The contract itself: every plane once, in order; a range of a teacher map is met by all its pathways.
        for p, (n, c, h, w) in enumerate(shapes):
            tiles = [(first, planes) for q, first, planes in plan if q == p]
            covered = [plane for first, planes in tiles for plane in range(first, first + planes)]
            assert covered == list(range(n * c))
            assert all(planes == 1 or planes * h * w <= tile_elements for _, planes in tiles)
        met = [(teacher_of[p], first) for p, first, _ in plan]
        runs = [key for i, key in enumerate(met) if i == 0 or met[i - 1] != key]
        assert len(runs) == len(set(met))


def test_tile_plan_edges(C):
    assert C.tile_plan([], [], 1) == []
    assert C.tile_plan([torch.Size([2, 3, 7, 7])], [-5], 10**18) == [(0, 0, 6)]
    # More planes than 32 bits count, in tiles that are larger still.
    n, c = 2**20, 2**14
    plan = C.tile_plan([(n, c, 8, 8)] * 2, [0, 0], 2**38)
    assert plan == [(p, i * 2**32, 2**32) for i in range(4) for p in (0, 1)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda C: C.hcl_levels(0), "height is 0"),
        (lambda C: C.pool_bins(0, 1), "size is 0"),
        (lambda C: C.pool_bins(8, 0), "level is 0"),
        (lambda C: C.tile_plan([(1, 1, 1, 1)], [], 8), "1 shapes, but 0 teacher maps"),
        (lambda C: C.tile_plan([(1, 1, 1, 1)], [0], 0), "tile_elements is 0"),
        (lambda C: C.tile_plan([(1, -2, 1, 1)], [0], 8), r"pathway 0 has shape \[1, -2, 1, 1\]"),
        (lambda C: C.tile_plan([(2**31, 2**31, 2, 1)], [0], 8), "64 bits"),
        (lambda C: C.tile_plan([(2**31, 8, 1, 1)], [0], 1), "raise tile_elements"),
        (lambda C: C.tile_plan([(1, 1, 4, 4), (1, 1, 4, 5)], [3, 3], 8), "share teacher map 3"),
    ],
)
def test_bad_input_gets_a_sentence(C, call, said):
    with pytest.raises(ValueError, match=said):
        call(C)


# -- the switch --------------------------------------------------------------------------------------------------

SHOW = "import distpro._native as n; print(n.native() is not None, n.native() is not None, n.why_not())"
# A module that is None cannot be imported: this stands for a package without its compiled part.
HIDE = "import sys; sys.modules['distpro._C'] = None; "


def test_switch_0_never_loads(C):
    done = python("-c", SHOW, native="0")
    assert (done.stdout, done.stderr) == ("False False DISTPRO_NATIVE=0\n", "")


def test_switch_1_loads(C):
    assert python("-c", SHOW, native="1").stdout == "True True None\n"


def test_kernels_that_do_not_run_on_a_gpu_leave_it_to_the_references(C, monkeypatch):
    class Built:
        def build_info(self):
            return {"cuda_why_not": None}

        def kernel_arch(self, index):
            if index == 1:
                raise RuntimeError("no kernel image is available")

    _native._cuda_why_not.cache_clear()
    monkeypatch.setattr(_native, "_load", lambda: (Built(), None))
    monkeypatch.setenv("DISTPRO_NATIVE", "")
    assert _native.has_kernels("cuda", 0)
    with pytest.warns(RuntimeWarning, match="do not run on device 1: no kernel image"):
        assert not _native.has_kernels("cuda", 1)
    monkeypatch.setenv("DISTPRO_NATIVE", "1")
    with pytest.raises(UserError, match="do not run on device 1"):
        _native.has_kernels("cuda", 1)
    _native._cuda_why_not.cache_clear()


def test_unset_without_the_module_warns_once():
    done = python("-c", HIDE + SHOW)
    assert done.stdout == "False False distpro._C is not built for this Python\n"
    assert done.stderr.count("RuntimeWarning: the native layer is not in use") == 1
    assert "pip install ." in done.stderr


def test_switch_1_without_the_module_is_an_error_with_the_remedy():
    done = python("-c", HIDE + "from distpro import errors, _native; errors.run_command(_native.native)", native="1")
    assert done.returncode == 2
    assert done.stderr.startswith("distpro: error: the native layer is not in use: distpro._C is not built")
    assert "pip install ." in done.stderr


def test_another_value_is_an_error():
    done = python("-c", "from distpro import errors, _native; errors.run_command(_native.native)", native="yes")
    assert done.returncode == 2
    assert done.stderr == (
        "distpro: error: DISTPRO_NATIVE is 'yes', expected 0 (never), 1 (always) or unset (where it is built)\n"
    )


def test_import_alone_decides_nothing():
    assert python("-c", HIDE + "import distpro, distpro._native", native="nonsense").returncode == 0


# -- python -m distpro.env ---------------------------------------------------------------------------------------


def test_env_prints_a_table(C):
    done = python("-m", "distpro.env", native="1")
    assert done.returncode == 0, done.stderr
    for title in ("software", "cpu", "cuda", "native", "variables"):
        assert f"\n{title}\n" in "\n" + done.stdout
    assert re.search(r"^  loaded +yes$", done.stdout, re.MULTILINE)
    assert re.search(r"^  DISTPRO_NATIVE +1$", done.stdout, re.MULTILINE)


def test_env_json_and_a_bad_switch_does_not_stop_it():
    done = python("-m", "distpro.env", "--json", native="maybe")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["software"]["torch"] == torch.__version__
    assert facts["native"]["loaded"].startswith("no: DISTPRO_NATIVE is 'maybe'")
    assert facts["cpu"]["cores"] == os.cpu_count()
