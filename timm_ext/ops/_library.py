"""Finds and loads the compiled library, and says what to do when that fails."""

import importlib
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

LIBRARY = "libtimm_ext.torch.so"  # a name with a dot is no Python module to those who list modules
OLDEST_TORCH = (2, 10)


def load_library(package_path: list[str], version: str) -> None:
    """Load the operators into PyTorch.

    With a plain install, Python started in the source folder imports the source's package, which has no
    compiled library; the installed one is then used, if it is of the same version.

    Args:
        package_path: `timm_ext.__path__`; the folder that holds the library is added where it is another.
        version: version of the Python files.

    Raises:
        ImportError: the library is not there or cannot be loaded, with the likely causes and the remedy.
    """
    tried = [Path(folder) for folder in package_path] + list(_other_package_folders(package_path))
    folder = next((folder for folder in tried if (folder / LIBRARY).exists()), None)
    if folder is None:
        raise ImportError(_explain([f"no {LIBRARY} in {folder}" for folder in tried]))
    if str(folder) not in package_path:
        package_path.append(str(folder))
    try:
        built = importlib.import_module("timm_ext._host").build_info()["version"]
    except (ImportError, RuntimeError) as error:
        raise ImportError(_explain([f"{folder}: {error}"])) from error
    if built != version:
        facts = [
            f"the Python files in {package_path[0]} are version {version}, {folder / LIBRARY} is {built}"
        ]
        raise ImportError(_explain(facts))
    try:
        torch.ops.load_library(str(folder / LIBRARY))
    except OSError as error:
        raise ImportError(_explain([f"{folder / LIBRARY}: {error}"])) from error


def _other_package_folders(package_path: list[str]) -> Iterator[Path]:
    """Yield the folders named timm_ext on the module search path that are not the package itself."""
    own = {Path(folder).resolve() for folder in package_path}
    for entry in sys.path:
        folder = Path(entry or ".", "timm_ext").resolve()
        if folder not in own and folder.is_dir():
            own.add(folder)
            yield folder


def _explain(facts: list[str]) -> str:
    python = f"Python {platform.python_version()} on {platform.machine()}"
    oldest = ".".join(map(str, OLDEST_TORCH))
    source = Path(__file__).resolve().parents[2]
    target = str(source) if (source / "CMakeLists.txt").exists() else "PATH-TO-THE-SOURCE-OF-timm_ext"
    return "\n".join(
        [
            "timm_ext: the compiled library could not be loaded.",
            *(f"  {fact}" for fact in facts),
            "Likely causes:",
            f"  1. The package was not installed for this interpreter ({sys.executable}).",
            f"  2. It was built for another Python or another kind of CPU than this one ({python}).",
            f"  3. This torch ({torch.__version__}) is older than {oldest} or a build of another kind.",
            "  4. The source was updated after the install.",
            f"To mend it: {sys.executable} -m pip install --force-reinstall --no-deps {target}",
        ]
    )


def build_info() -> dict[str, Any]:
    """Say what the library was built from and what it runs on.

    Returns:
        `version`; `torch_built` and `torch_running`; `compiler`; `cuda_built`, `cuda_version` and
        `cuda_architectures` of the kernels inside; `isa_built` and `isa_chosen`, the CPU instruction sets;
        `gpu`, the name of the GPU in use or why there is none; `library`, its file.
    """
    host = importlib.import_module("timm_ext._host")
    info: dict[str, Any] = host.build_info()
    info["cuda_architectures"] = info["cuda_architectures"].split()
    info["torch_running"] = torch.__version__
    info["library"] = str(Path(str(host.__file__)).with_name(LIBRARY))
    info["gpu"] = _gpu(info)
    return info


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for huge pages under a new CPU tensor; only a hint, its values stay."""
    importlib.import_module("timm_ext._host").prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)


def _gpu(info: dict[str, Any]) -> str:
    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return "none: torch finds no GPU or no driver"
    if not info["cuda_built"]:
        return "none used: timm_ext was built without nvcc; put it on PATH and install again"
    name: str = torch.cuda.get_device_name()
    return name
