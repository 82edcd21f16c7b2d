"""Runs CMake to build the native layer (CMakeLists.txt); everything else is in pyproject.toml.

DISTPRO_CUDA=AUTO|ON|OFF   CUDA kernels: where an nvcc is found (default), always, never
DISTPRO_CUDA_ARCHS=...     their architectures in CMake's notation, e.g. "90-real"
DISTPRO_NATIVE=0           no native layer: the PyTorch references are used instead
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# 13.0, not the newest: its PTX runs on every driver of the 13 series. cccl: cuda_fp16.h includes it.
TOOLKIT = "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"


def find_nvcc() -> str | None:
    """The CUDA compiler: from environment variables, then PATH and the usual place, then the packages of TOOLKIT."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    names = [os.environ.get("CUDACXX"), *(f"{root}/bin/nvcc" for root in roots if root)]
    names += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    if (packages := importlib.util.find_spec("nvidia")) and packages.submodule_search_locations:
        names += [f"{folder}/cu13/bin/nvcc" for folder in packages.submodule_search_locations]
    return next((found for name in names if name and (found := shutil.which(name))), None)


class CMakeBuild(build_ext):
    def run(self) -> None:
        super().run()
        # Also copy it next to the sources: in the checkout `python -m distpro.train` imports the package from
        # the current folder, and must find the native layer there.
        if not self.inplace:
            self.copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        if CUDA == "ON" and not NVCC:
            sys.exit(f"distpro: DISTPRO_CUDA=ON, but no nvcc: set CUDA_HOME, or pip install '{TOOLKIT}'")
        source, build = str(Path(__file__).parent.resolve()), str(Path(self.build_temp).resolve())
        # The scripts folder: cmake and ninja are found even if the virtual environment is not activated.
        path = os.environ["PATH"] + os.pathsep + sysconfig.get_path("scripts")
        environment = {**os.environ, "PATH": path}
        if NVCC:
            # The packages of TOOLKIT have a lib folder, but their nvcc looks for lib64: help the linker.
            libraries = [os.environ.get("LIBRARY_PATH", ""), str(Path(NVCC).parents[1] / "lib")]
            environment |= {"CUDACXX": NVCC, "LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}
        options = {
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "DISTPRO_CUDA": CUDA,
            "DISTPRO_CUDA_ARCHS": os.environ.get("DISTPRO_CUDA_ARCHS", ""),
        }
        # --fresh: an earlier build's cache names tools of an isolated environment that no longer exists.
        configure = ["cmake", "--fresh", "-GNinja", "-S", source, "-B", build]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        try:
            subprocess.run(configure, env=environment, check=True)
            subprocess.run(["cmake", "--build", build], env=environment, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            tool = error.cmd[0] if isinstance(error, subprocess.CalledProcessError) else error
            sys.exit(
                f"distpro: the native layer was not built, for the reason above ({tool}). It needs a C++17 "
                "compiler; DISTPRO_CUDA=OFF leaves CUDA out, DISTPRO_NATIVE=0 installs without it."
            )


CUDA = os.environ.get("DISTPRO_CUDA", "AUTO").upper()
if CUDA not in ("AUTO", "ON", "OFF"):
    sys.exit(f"distpro: DISTPRO_CUDA is '{CUDA}', expected AUTO, ON or OFF")
NVCC = find_nvcc()
NATIVE = os.environ.get("DISTPRO_NATIVE") != "0"

setup(
    ext_modules=[Extension("distpro._C", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
    # The build front end installs these in addition to those of pyproject.toml.
    setup_requires=[TOOLKIT] if NATIVE and CUDA == "ON" and not NVCC else [],
)
