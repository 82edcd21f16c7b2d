"""`python -m distpro.env`: the hardware and software as distpro sees them, for a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from distpro import _native
from distpro.errors import UserError, run_command

PACKAGES = ("torchvision", "timm", "numpy")
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "asimd", "sve", *BFLOAT16_FLAGS)

Facts = dict[str, Any]


def version(package: str) -> str | None:
    """Return the installed version without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def lines_of(path: str) -> list[str]:
    """Return the lines of a file in Linux's /proc; none elsewhere."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def commit() -> str | None:
    """Return the commit of the running sources, with a + if they were modified; None outside a repository."""
    source = Path(__file__).parent.parent
    if not (source / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "distpro", "csrc")
        return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def software() -> Facts:
    import torch

    facts: Facts = {"distpro": version("distpro") or "not installed", "from": str(Path(__file__).parent)}
    facts |= {"python": platform.python_version(), "system": platform.platform()}
    facts |= {"torch": torch.__version__, "torch's CUDA": torch.version.cuda}
    facts |= {package: version(package) for package in PACKAGES}
    facts["DALI"] = version("nvidia-dali-cuda130") or version("nvidia-dali-cuda120")
    return facts


def cpu() -> Facts:
    import torch

    fields = [line.partition(":") for line in lines_of("/proc/cpuinfo")]
    info = {key.strip().lower(): value.strip() for key, _, value in reversed(fields)}  # the first core's
    flags = set((info.get("flags") or info.get("features") or "").split())
    # The OpenMP runtimes in this process: each has its own thread pool.
    mapped = "\n".join(lines_of("/proc/self/maps"))
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": [flag for flag in CPU_FLAGS if flag in flags],
        "OpenMP": sorted(set(re.findall(r"/\S*/lib[gi]?omp\S*", mapped))),
    }


def emulates_bfloat16(device: Any) -> bool:
    """Return whether a `torch.device` is a CPU known to lack instructions for bfloat16."""
    instructions = cpu()["instructions"] if device.type == "cpu" else []
    return bool(instructions) and not set(instructions) & set(BFLOAT16_FLAGS)


def cuda() -> Facts:
    import torch

    if not torch.cuda.is_available():
        return {"devices": "none usable by torch"}
    facts: Facts = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        facts[f"device {index}"] = f"{device.name}, sm_{device.major}{device.minor}, {memory}"
    return facts


def device_name(device: Any) -> str:
    """Return the model of a `torch.device`, and on a CPU the number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = cpu()
    return f"{facts['model']}, {facts['threads']} CPU thread{'s' * (facts['threads'] > 1)}"


def find_device(name: str) -> Any:
    """Return the `torch.device` of a name ("auto": a GPU if there is one); raise a `UserError` if it is unusable."""
    import torch

    from distpro import parallel

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = parallel.local_device(torch.device(name))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used, expected cpu, cuda or cuda:N: {reason}") from error
    return device


def native() -> Facts:
    """Return how the native layer was built, or why it is not loaded, and whether its kernels fit each GPU."""
    import torch

    try:
        reason = _native.why_not()
    except UserError as error:
        reason = str(error)
    module = None if reason else _native.native()
    if module is None:
        return {"loaded": f"no: {reason}"}
    facts: Facts = {"loaded": "yes", "file": module.__file__, "threads": module.threads()}
    facts |= module.build_info()
    if facts["cuda"] is None:
        return facts
    facts |= {f"CUDA {key}": value for key, value in module.cuda_info().items()}
    for index in range(torch.cuda.device_count()):
        try:
            facts[f"kernels on device {index}"] = f"sm_{module.kernel_arch(index)}"
        except RuntimeError as error:
            facts[f"kernels on device {index}"] = f"none: {error}"
    return facts


def variables() -> Facts:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("DISTPRO_")}


def collect() -> dict[str, Facts]:
    """Return all sections; the native layer is loaded first, so that the CPU's OpenMP line includes it."""
    loaded = native()
    return {"software": software(), "cpu": cpu(), "cuda": cuda(), "native": loaded, "variables": variables()}


def table(sections: dict[str, Facts]) -> str:
    def text(value: Any) -> str:
        value = ", ".join(map(str, value)) if isinstance(value, list) else value
        return "-" if value in (None, "") else str(value)

    width = 2 + max(len(name) for facts in sections.values() for name in facts)
    lines: list[str] = []
    for title, facts in sections.items():
        lines += [title, *(f"  {name:<{width}}{text(value)}" for name, value in facts.items())]
        if not facts:
            lines.append("  none set")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distpro.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    sections = collect()
    print(json.dumps(sections, indent=2) if arguments.json else table(sections))


if __name__ == "__main__":
    run_command(main)
