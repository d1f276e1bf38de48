"""Records registers, spills and shared memory of every CUDA kernel as ptxas reports them. Needs no GPU.

    python benchmarks/cuda_resources.py benchmarks/results/cuda_resources.json [--architectures 80 90]

Exits 1, after the file is written, when a kernel spills registers.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from timm_ext.files import write_json

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ELEMENTS = ("float32", "bfloat16", "float16", "float64")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\d+)'"
    r".*?(?P<stack>\d+) bytes stack frame"
    r", (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def kernel_name(mangled: str) -> str:
    """Readable name: the kernel, its element type, its number of models, whether it has a Fisher."""
    kernel = re.search(r"\d([a-z][a-z_]*_kernel)I(.*)", mangled)
    if kernel is None:
        return mangled
    parameters = kernel.group(2)
    element = re.search(r"7ElementE(\d)E", parameters)
    models = re.search(r"Li(\d+)E", parameters)
    fisher = re.search(r"Lb([01])E", parameters)
    parts = [
        ELEMENTS[int(element.group(1))]
        if element
        else {"f": "float32", "d": "float64"}.get(parameters[0], ""),
        f"T={models.group(1)}" if models else "",
        {"0": "no Fisher", "1": ""}[fisher.group(1)] if fisher else "",
    ]
    return f"{kernel.group(1)}: {', '.join(part for part in parts if part)}"


def compile_source(nvcc: str, source: Path, architectures: list[str], target: Path) -> str:
    """Return what ptxas says about the kernels of one file."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    flags = ["-std=c++17", "-O3", "-Xptxas=-v", "--Werror=all-warnings"]
    command = [nvcc, *flags, *codes, "-c", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{source.name}: nvcc failed\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def rows_of(report: str, source: str) -> list[dict[str, Any]]:
    rows = []
    for entry in ENTRY.finditer(report):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        rows.append(
            {
                "source": source,
                "kernel": kernel_name(entry["name"]),
                "architecture": entry["architecture"],
                "registers": int(entry["registers"]),
                "stack_bytes": int(entry["stack"]),
                "spill_bytes": int(entry["stores"]) + int(entry["loads"]),
                "shared_bytes": int(shared.group(1)) if shared else 0,
            }
        )
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--architectures", nargs="+", default=["80", "90"])
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("cuda_resources: nvcc is needed (none on PATH)")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    kernels: list[dict[str, Any]] = []
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            begin = os.times()
            report = compile_source(nvcc, source, options.architectures, Path(folder, "kernel.o"))
            end = os.times()
            used = end.children_user + end.children_system - begin.children_user - begin.children_system
            seconds[source.name] = round(used, 1)
            kernels += rows_of(report, source.name)
    kernels.sort(key=lambda row: (row["architecture"], row["source"], row["kernel"]))
    spilling = [f"{row['kernel']} ({row['architecture']})" for row in kernels if row["spill_bytes"]]
    release = re.search(r"release [\d.]+, V([\d.]+)", version)
    facts = {
        "nvcc": release.group(1) if release else version,
        "compile_cpu_seconds": seconds,
        "kernels": kernels,
    }
    write_json(options.output, facts)
    print(f"{len(kernels)} kernels, at most {max(row['registers'] for row in kernels)} registers")
    if spilling:
        raise SystemExit("spilling: " + ", ".join(spilling))


if __name__ == "__main__":
    main(sys.argv[1:])
