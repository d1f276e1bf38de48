"""Records registers, spills and shared memory of every CUDA kernel as ptxas reports them. Needs no GPU.

    python benchmarks/cuda_resources.py benchmarks/results/cuda_resources.json [--architectures 80 90]

For the kernels that hold all models in registers it also works out how many warps fit on a multiprocessor and
how many bytes they have on their way from memory when each has issued the loads of one row. By Little's law
an H200 needs 4.8 TB/s · 0.7 µs / 132 = 25 kB per multiprocessor. Shared memory is what a kernel takes by
itself; `conv_square_kernel` asks for up to 48 KiB more at its launch.

Exits 1, after the file is written, when a kernel spills registers or has fewer bytes than that on their way.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from timm_ext.files import write_json

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
ELEMENTS = ("float32", "bfloat16", "float16", "float64")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\d+)'"
    r".*?(?P<stack>\d+) bytes stack frame"
    r", (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


THREADS = 128  # per block: kThreads of csrc/merge/cuda/tile.h
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10}  # of a multiprocessor; a block takes 1 KiB more
LEAST_IN_FLIGHT = 25_500  # see above


def kernel_name(mangled: str) -> str:
    """Readable name: the kernel, its element type, its number of models (or window), if it has a Fisher."""
    kernel = re.search(r"\d([a-z][a-z_]*_kernel)(?:I(.*)|E)", mangled)
    if kernel is None:
        return mangled
    if kernel.group(2) is None:
        return kernel.group(1)
    parameters = kernel.group(2)
    element = re.search(r"7ElementE(\d)E", parameters)
    models = re.search(r"Li(\d+)E", parameters)
    fisher = re.search(r"Lb([01])E", parameters)
    parts = [
        ELEMENTS[int(element.group(1))]
        if element
        else {"f": "float32", "d": "float64"}.get(parameters[0], ""),
        f"{'window' if kernel.group(1).startswith('conv') else 'T'}={models.group(1)}" if models else "",
        {"0": "no Fisher", "1": ""}[fisher.group(1)] if fisher else "",
    ]
    return f"{kernel.group(1)}: {', '.join(part for part in parts if part)}"


def occupancy(kernel: str, architecture: str, registers: int, shared: int) -> dict[str, int]:
    """Warps on a multiprocessor and bytes of their loads of one row; empty for other kernels."""
    packed = re.match(r"(forward|backward|matrices)_kernel: (\w+), T=(\d+)(, no Fisher)?", kernel)
    if packed is None or architecture not in SHARED_MEMORY:
        return {}
    name, element, models = packed[1], packed[2], int(packed[3])
    warps = THREADS // 32
    registers_of_block = -(-registers // 8) * 8 * THREADS
    blocks = min(65536 // registers_of_block, SHARED_MEMORY[architecture] // (shared + 1024), 64 // warps)
    narrow = models > 8 or (models > 5 and element != "float32")  # as vector_bytes of merge/cuda/packs.h
    bytes_of_thread = (models * (1 if packed[4] else 2) + (name != "forward")) * (8 if narrow else 16)
    return {"warps_per_sm": blocks * warps, "bytes_in_flight_per_sm": blocks * THREADS * bytes_of_thread}


def compile_source(nvcc: str, source: Path, architectures: list[str], target: Path) -> str:
    """Return what ptxas says about the kernels of one file."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    flags = ["-std=c++17", "-O3", "-I", str(SOURCES), "-Xptxas=-v", "--Werror=all-warnings"]
    command = [nvcc, *flags, *codes, "-c", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{source.name}: nvcc failed\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def rows_of(report: str, source: str) -> list[dict[str, Any]]:
    rows = []
    for entry in ENTRY.finditer(report):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        row: dict[str, Any] = {
            "source": source,
            "kernel": kernel_name(entry["name"]),
            "architecture": entry["architecture"],
            "registers": int(entry["registers"]),
            "stack_bytes": int(entry["stack"]),
            "spill_bytes": int(entry["stores"]) + int(entry["loads"]),
            "shared_bytes": int(shared.group(1)) if shared else 0,
        }
        row |= occupancy(row["kernel"], row["architecture"], row["registers"], row["shared_bytes"])
        rows.append(row)
    return rows


def faults(kernels: list[dict[str, Any]]) -> list[str]:
    """What is wrong with these kernels, one line each."""
    found = []
    for row in kernels:
        name = f"{row['kernel']} ({row['architecture']})"
        if row["spill_bytes"] or row["stack_bytes"]:
            found.append(f"{name}: {row['spill_bytes']} bytes spilled, {row['stack_bytes']} bytes of stack")
        if row.get("bytes_in_flight_per_sm", LEAST_IN_FLIGHT) < LEAST_IN_FLIGHT:
            found.append(f"{name}: only {row['bytes_in_flight_per_sm']} bytes on their way")
    return found


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
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*/cuda/*.cu")):
            report = compile_source(nvcc, source, options.architectures, Path(folder, "kernel.o"))
            kernels += rows_of(report, source.relative_to(SOURCES).as_posix())
    kernels.sort(key=lambda row: (row["architecture"], row["source"], row["kernel"]))
    release = re.search(r"release [\d.]+, V([\d.]+)", version)
    facts = {"nvcc": release.group(1) if release else version, "kernels": kernels}
    write_json(options.output, facts)
    print(f"{len(kernels)} kernels, at most {max(row['registers'] for row in kernels)} registers")
    if found := faults(kernels):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main(sys.argv[1:])
