"""The gate on the compiled kernels: no spilled register, no array in local memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks/ptxas_report.py"
LOG = """
ptxas info    : Compiling entry function '_ZN7distpro4cuda14forward_kernelI13__nv_bfloat16Lb1EEEvNS0_7MapCallE' for 'sm_90'
ptxas info    : Function properties for _ZN7distpro4cuda14forward_kernelI13__nv_bfloat16Lb1EEEvNS0_7MapCallE
    48 bytes stack frame, 44 bytes spill stores, 72 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 48 bytes cumulative stack size, 36864 bytes smem
ptxas info    : Compiling entry function '_ZN7distpro4cuda48_GLOBAL__N__0adee596_15_vectors_cuda_cu_1f10129611dots_kernelIfEEvNS1_9ArrayCallE' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 46 registers, used 1 barriers
"""  # noqa: E501


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("ptxas_report", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ptxas_report"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ptxas_report"]


def test_reads_what_ptxas_prints(report):
    bad, good = report.from_log(LOG, "90")
    assert bad == report.Usage("forward_kernel<bfloat16, pooled>", "90", 128, 36864, 48, 116)
    assert good == report.Usage("dots_kernel<float32>", "90", 46, 0, 0, 0)
    assert [line.split()[-5:] for line in report.table([bad, good]).splitlines()[1:]] == [
        ["sm_90", "46", "0", "0", "0"],
        ["sm_90", "128", "36864", "48", "116"],
    ]


@pytest.mark.slow
def test_no_kernel_uses_local_memory(report, capsys):
    if not (report.tool("nvcc") or (report.built_module() and report.tool("cuobjdump"))):
        pytest.skip("neither nvcc nor cuobjdump")
    usages = report.collect(architectures=["90"])  # of a built module: all that are in it
    with capsys.disabled():
        print(f"\n{report.table(usages)}")
    kernels = {u.kernel for u in usages}
    for kind in ("float32", "bfloat16", "float16"):
        for kernel in ("forward_kernel", "backward_kernel"):
            assert {f"{kernel}<{kind}, pooled>", f"{kernel}<{kind}, flat>"} <= kernels
        assert f"dots_kernel<{kind}>" in kernels
    assert "perturb_kernel<float32>" in kernels
    assert [u for u in usages if u.local or u.spills] == []
