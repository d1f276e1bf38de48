"""Builds the CPU operators under ASan and UBSan in a folder of any name; runs their tests and odd input.

    python tools/sanitize_cpu.py FOLDER [--only-build]

Needs cmake, ninja, pybind11, torch, g++ with its sanitizers, and what the tests need. One instruction set is
built (AVX2 on x86); leaks are not looked for, since Python has some of its own.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    "ranges",
    "small_conv",
    "winograd",
    "strided",
    "upsampled_conv3d",
    "operators",
    "square",
    "conv_square",
    "weight_gradient",
    "norm",
    "trilinear",
    "sample",
]
LEFT_OUT = "not opcheck and not compile and not huge and not uniform"
FUZZ_SECONDS = "30"


def main() -> None:
    """Build and run; the first failure ends it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only-build", action="store_true")
    given = parser.parse_args()
    folder = given.folder.resolve()
    build(folder)
    if not given.only_build:
        run(folder)


def build(folder: Path) -> None:
    """Put the package with sanitized libraries into `folder`."""
    import pybind11

    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    version = next(
        line.split('"')[1]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if "version = " in line
    )
    package = folder / "package" / "timm_ext"
    shutil.copytree(ROOT / "timm_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    settings = {
        "CMAKE_INSTALL_PREFIX": package,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "TIMM_EXT_VERSION": version,
        "TIMM_EXT_TORCH_DIR": Path(torch.origin).parent,
        "TIMM_EXT_CUDA": "0",
        "TIMM_EXT_SANITIZE_CPU": "ON",
    }
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    build_folder = folder / "build"
    subprocess.run(["cmake", "-S", ROOT, "-B", build_folder, "-G", "Ninja", *definitions], check=True)
    subprocess.run(["cmake", "--build", build_folder], check=True)
    subprocess.run(["cmake", "--install", build_folder], check=True)


def run(folder: Path) -> None:
    """Run the operators' tests and odd input on the sanitized libraries."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libstdc++")
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "package"),
        "PYTHONSAFEPATH": "1",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=16",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    used = "import timm_ext; print(timm_ext.build_info()['library'])"
    library = subprocess.check_output(
        [sys.executable, "-c", used], text=True, env=environment, cwd=folder
    ).strip()
    if not library.startswith(str(folder)):
        raise SystemExit(f"sanitize_cpu: expected the library in {folder} (got {library})")
    files = [str(ROOT / "python_tests" / "ops" / f"test_{name}.py") for name in TESTS]
    pytest = [
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
    ]
    options = ["-m", "not slow", "-k", LEFT_OUT]
    subprocess.run([sys.executable, "-m", *pytest, *options, *files], check=True, env=environment, cwd=folder)
    fuzz = ["fuzz", "--only", "operators-*", "--seconds", FUZZ_SECONDS]
    paths = os.pathsep.join([str(ROOT / "python_tests"), environment["PYTHONPATH"]])
    subprocess.run(
        [sys.executable, "-m", *fuzz], check=True, env={**environment, "PYTHONPATH": paths}, cwd=folder
    )


if __name__ == "__main__":
    main()
