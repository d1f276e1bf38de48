"""setuptools' build backend, which builds beside the torch the user already has.

In build isolation torch cannot be imported, and asking for it would download it a second time. The compiled
library uses PyTorch's stable ABI, so headers of any torch >= 2.10 will do: those of the environment that is
installed into, when there are such, and else those of a torch that is fetched for the build.
"""

import importlib.util
import itertools
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

FETCHED_TORCH = "torch==2.13.0"
OLDEST_TORCH = (2, 10)


def find_torch() -> tuple[Path, str] | None:
    """Return folder and version of a torch >= 2.10, in the environment around the build or fetched for it."""
    return _first_usable(itertools.chain(_environment_folders(), _importable_folders()))


def torch_requirement() -> str:
    """Return what the package requires at run time.

    Where the environment has no torch, the requirement is the one that was fetched for the build: an open one
    would download another version of several gigabytes.
    """
    return (
        "torch>=" + ".".join(map(str, OLDEST_TORCH))
        if _first_usable(_environment_folders())
        else FETCHED_TORCH
    )


def _first_usable(folders: Iterable[Path]) -> tuple[Path, str] | None:
    for folder in folders:
        version = _version(folder)
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers >= OLDEST_TORCH and (folder / "include/torch/csrc/stable/library.h").exists():
            return folder, version
    return None


def _environment_folders() -> Iterator[Path]:
    scheme_paths = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    configuration = Path(sys.prefix, "pyvenv.cfg")
    isolated = (
        configuration.exists() and "include-system-site-packages = true" not in configuration.read_text()
    )
    if not isolated:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        scheme_paths += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
        scheme_paths.append(site.getusersitepackages())
        scheme_paths += site.getsitepackages([sys.base_prefix])
    for path in scheme_paths:
        yield Path(path, "torch")


def _importable_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent


def _version(folder: Path) -> str:
    file = folder / "version.py"
    text = file.read_text() if file.exists() else ""
    found = re.search(r"""^__version__ = ['"]([^'"]+)['"]""", text, re.MULTILINE)
    return found.group(1) if found else "0.0"


def _extra_requirements() -> list[str]:
    return [] if find_torch() else [FETCHED_TORCH]


def get_requires_for_build_wheel(config_settings=None):
    """Add torch where the environment has none to build against."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _extra_requirements()


def get_requires_for_build_editable(config_settings=None):
    """Add torch where the environment has none to build against."""
    return build_meta.get_requires_for_build_editable(config_settings) + _extra_requirements()
