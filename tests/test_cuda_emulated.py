"""The CUDA kernels without a GPU: compiled for the host (emulation/) and compared there with the CPU kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMULATION = Path(__file__).parent / "emulation"
# DISTPRO_SANITIZE=thread shows races for shared memory, in minutes; address,undefined what its name says.
FLAGS = ["-O1", "-g", "-w", "-std=c++17", "-DDISTPRO_THREADS=64", f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"]
if os.environ.get("DISTPRO_SANITIZE"):
    FLAGS += [f"-fsanitize={os.environ['DISTPRO_SANITIZE']}", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++")
    text = (ROOT / "CMakeLists.txt").read_text()
    names = re.findall(r"csrc/\w+\.\w+", " ".join(re.findall(r"^set\((?:CUDA_)?SOURCES (.*)\)", text, re.M)))
    sources = [ROOT / name for name in names if not name.endswith(("module.cpp", "cuda_info.cu"))]
    folder = tmp_path_factory.mktemp("emulation")

    def build(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        subprocess.run([compiler, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, [*sources, EMULATION / "main.cpp"]))
    subprocess.run([compiler, *FLAGS, *map(str, objects), "-pthread", "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["float32", "bfloat16", "many", "vectors"])  # float16 and float64: by hand, for time
def test_emulated_kernels(program, what):
    result = subprocess.run([program, what], capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
