"""Registers, shared memory and local memory of every CUDA kernel, for each architecture, as ptxas assigned them.

    python benchmarks/ptxas_report.py             of the module as it is built; reads it with cuobjdump
    python benchmarks/ptxas_report.py --compile   of the sources, compiled anew with nvcc: a minute, and spills apart

Exits with 1 if a kernel uses local memory: spilled registers and arrays indexed at run time live there, far from
where a kernel that waits for memory can afford them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "100")
TYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Usage:
    kernel: str
    architecture: str
    registers: int
    shared: int  # bytes
    local: int  # bytes per thread: the stack frame and other local memory
    spills: int | None  # bytes stored and loaded; None from cuobjdump, which does not separate them from `local`


def readable(mangled: str) -> str:
    """`forward_kernel<float32, pooled>` for its mangled name."""
    found = re.search(rf"\d([a-z_]+_kernel)(?:I({'|'.join(TYPES)})(?:Lb([01])E)?E)?", mangled)
    if not found:
        return mangled
    name, kind, pooled = found.groups()
    arguments = [TYPES[kind]] if kind else []
    arguments += ["pooled" if pooled == "1" else "flat"] if pooled else []
    return f"{name}<{', '.join(arguments)}>" if arguments else name


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: from PATH, the toolkit's folder, or a Python package that brings it."""
    folders = [f"{os.environ['CUDA_HOME']}/bin"] if os.environ.get("CUDA_HOME") else []
    folders.append("/usr/local/cuda/bin")
    for package, below in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = importlib.util.find_spec(package)
        folders += [f"{folder}/{below}" for folder in (spec and spec.submodule_search_locations) or ()]
    return next((found for at in (None, *folders) if (found := shutil.which(name, path=at))), None)


def built_module() -> Path | None:
    """`_C` beside the sources, or where distpro is installed; found without importing anything."""
    folders = [ROOT / "distpro", *(Path(entry) / "distpro" for entry in sys.path)]
    names = [f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((path for folder in folders for name in names if (path := folder / name).exists()), None)


def from_module(module: Path, cuobjdump: str) -> list[Usage]:
    """The usage of every kernel in the module; none if it was built without CUDA, which cuobjdump calls an error."""
    command = [cuobjdump, "-res-usage", str(module)]
    text = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    usages, architecture = [], ""
    pattern = re.compile(
        r"arch = sm_(?P<arch>\w+)|Function (?P<name>\w+):\s+"
        r"REG:(?P<reg>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
    )
    for found in pattern.finditer(text):
        if found["arch"]:
            architecture = found["arch"]
        else:
            local = int(found["stack"]) + int(found["local"])
            name = readable(found["name"])
            usages.append(Usage(name, architecture, int(found["reg"]), int(found["shared"]), local, None))
    return usages


def compiled(source: Path, architecture: str, nvcc: str) -> list[Usage]:
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", f"-arch=sm_{architecture}", "-Xptxas=-v"]
        command += ["-c", str(source), "-o", f"{folder}/object.o"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"ptxas_report: {' '.join(command)}\n{result.stderr}")
    return from_log(result.stderr, architecture)


def from_log(log: str, architecture: str) -> list[Usage]:
    """The usage of every kernel in the output of `ptxas -v`."""
    usages = []
    for part in log.split("Compiling entry function '")[1:]:
        numbers = {
            key: int(found[1]) if (found := re.search(rf"(\d+) {text}", part)) else 0
            for key, text in {
                "frame": "bytes stack frame",
                "stores": "bytes spill stores",
                "loads": "bytes spill loads",
                "registers": "registers",
                "shared": "bytes smem",
                "local": "bytes lmem",
            }.items()
        }
        local, spills = numbers["frame"] + numbers["local"], numbers["stores"] + numbers["loads"]
        name = readable(part.split("'", 1)[0])
        usages.append(Usage(name, architecture, numbers["registers"], numbers["shared"], local, spills))
    return usages


def table(usages: Iterable[Usage]) -> str:
    rows = [("kernel", "arch", "registers", "shared", "local", "spills")]
    for u in sorted(usages, key=lambda u: (u.kernel, int(re.sub(r"\D", "", u.architecture)))):
        spills = "-" if u.spills is None else str(u.spills)
        rows.append((u.kernel, f"sm_{u.architecture}", str(u.registers), str(u.shared), str(u.local), spills))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:{width}}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in rows)


def collect(compile_anew: bool = False, architectures: Sequence[str] = ARCHITECTURES) -> list[Usage]:
    module, cuobjdump, nvcc = built_module(), tool("cuobjdump"), tool("nvcc")
    if not compile_anew and module and cuobjdump and (usages := from_module(module, cuobjdump)):
        return usages
    if not nvcc:
        sys.exit("ptxas_report: needs a module built with CUDA and cuobjdump, or nvcc to compile the kernels")
    sources = sorted(ROOT.glob("csrc/*_cuda.cu"))
    jobs = [(source, architecture, nvcc) for source in sources for architecture in architectures]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [usage for part in pool.map(lambda job: compiled(*job), jobs) for usage in part]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile the sources, whatever is built")
    parser.add_argument("--archs", nargs="+", default=list(ARCHITECTURES), help="of --compile; default: %(default)s")
    options = parser.parse_args(arguments)
    usages = collect(options.compile, options.archs)
    print(table(usages))
    bad = [u for u in usages if u.local or u.spills]
    for u in bad:
        print(f"{u.kernel} for sm_{u.architecture} uses {u.local} bytes of local memory a thread", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
