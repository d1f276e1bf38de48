"""Thin driver: hands the build to CMake, which alone knows the sources."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OPERATORS = "timm_ext.libtimm_ext"
LIBRARY = "timm_ext/libtimm_ext.torch.so"  # as CMake and timm_ext/ops/_library.py name it: no Python module
sys.path.insert(0, str(ROOT / "tools"))

from build_backend import find_torch, torch_requirement  # noqa: E402

REQUIREMENTS = [
    torch_requirement(),
    "numpy>=1.26",
    "nibabel>=5.2",
    "SimpleITK>=2.3",
    "monai>=1.4",
    "einops>=0.7",  # some of MONAI's networks want it
    "lightning-fabric>=2.4",
    "safetensors>=0.5",
    "pydantic>=2.7",
    "PyYAML>=6",
    "typer>=0.12",
    "rich>=13",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    "scipy>=1.12",
    "pandas>=2.2",
    "jinja2>=3.1",
]


class CMakeBuild(build_ext):
    """Builds and installs the two libraries of the package with CMake and Ninja."""

    def get_ext_filename(self, fullname: str) -> str:
        """Give the library of operators its own name, without the tag of a Python version."""
        return LIBRARY if fullname == OPERATORS else super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        """Configure, build and install into the folder of the package."""
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                "timm_ext: expected torch >= 2.10 to build against (got none; install torch, or leave out "
                "--no-build-isolation)"
            )
        package_dir = Path(self.get_ext_fullpath(OPERATORS)).parent.resolve()
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": package_dir,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TIMM_EXT_VERSION": self.distribution.get_version(),
            "TIMM_EXT_TORCH_DIR": torch[0],
            "TIMM_EXT_TORCH_VERSION": torch[1],
            "TIMM_EXT_CUDA": os.environ.get("TIMM_EXT_CUDA", "auto"),
            "TIMM_EXT_WERROR": os.environ.get("TIMM_EXT_WERROR", "1"),
        }
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        # --fresh: a cache of an earlier isolated build names tools that are gone.
        configure = ["cmake", "--fresh", "-S", ROOT, "-B", build_dir, "-G", "Ninja", *definitions]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build_dir], check=True)
        subprocess.run(["cmake", "--install", build_dir], check=True)


setup(
    install_requires=REQUIREMENTS,
    packages=find_packages(include=["timm_ext", "timm_ext.*"]),
    package_data={"": ["py.typed", "*.json", "*.yaml", "*.j2"]},
    ext_modules=[Extension("timm_ext._host", sources=[]), Extension(OPERATORS, sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
