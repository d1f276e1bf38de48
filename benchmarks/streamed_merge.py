"""Times `timm-ext merge --ratios` against mergekit's linear merge on multi-gigabyte checkpoints on the CPU.

    python -m benchmarks.streamed_merge FOLDER --mergekit VENV/bin/mergekit-yaml [--rounds 3] [--keep]

Two synthetic checkpoints of a Llama layout (`--gigabytes` each, shards of 1 GB, a function of a seed) are
made in FOLDER for each of `--dtypes`, and deleted at the end. mergekit is installed in an environment of its
own by `pip install mergekit`. Each program merges them with weights 0.7 and 0.3 in a fresh process, and both
results are first held against float64 arithmetic. Then the rivals take turns. Before each run the last output
is deleted, the disk synchronised, the inputs are read into the page cache, and free memory is touched: a
virtual machine may get it from its host at the first touch only, which would slow whoever comes first.

Wall time is that of the whole command, start of Python included; "durable" adds a `sync` after it (timm-ext
returns when the result is on disk, mergekit before). Peak memory is the resident set, and the anonymous part
of it, sampled every 10 ms. Yardsticks: read one model and copy the other, by `cat` and `cp`, and by `cat` and
`dd` past the page cache.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_ext.documents import read_json
from timm_ext.files import write_json

RESULT = Path(__file__).parent / "results" / "streamed_merge.json"
RATIOS = (0.7, 0.3)
MODELS = ("a", "b")
SHARD = 10**9  # bytes
MERGEKIT = (
    "--lazy-unpickle",
    "--no-copy-tokenizer",
    "--no-write-model-card",
    "--out-shard-size",
    "1B",
    "--async-write",
    "--write-threads",
    "2",
)
BITS = {torch.bfloat16: 8, torch.float32: 24}
PROGRAMS = ("timm_ext", "mergekit")
LARGEST_ERROR = 8  # in units of rounding of the stored type
POLL = 0.01  # seconds between two samples of the memory
TOUCH = """
import mmap, sys
size = int(sys.argv[1])
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for place in range(0, size, 1 << 21):
    memory[place] = 1
"""
Checkpoint = dict[str, tuple[int, ...]]


def llama_shapes(layers: int, *, hidden: int, wide: int, vocabulary: int) -> Checkpoint:
    """Shapes of a Llama-like model with grouped attention (8 query heads for each key)."""
    shapes: Checkpoint = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qo"}
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (hidden // 8, hidden) for p in "kv"}
        shapes |= {f"{name}.mlp.{p}_proj.weight": (wide, hidden) for p in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (hidden, wide)}
        shapes |= {f"{name}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def shapes_for(nbytes: float, dtype: torch.dtype) -> tuple[Checkpoint, dict[str, Any]]:
    """Shapes of a model of at least some bytes, and its configuration; a tiny one for 0 bytes."""
    size = (
        {"hidden": 2048, "wide": 5632, "vocabulary": 32000}
        if nbytes
        else dict.fromkeys(("hidden", "wide", "vocabulary"), 64)
    )
    layers = 1
    while (
        sum(map(torch.Size.numel, map(torch.Size, llama_shapes(layers, **size).values()))) * dtype.itemsize
        < nbytes
    ):
        layers += 1
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size["hidden"],
        "intermediate_size": size["wide"],
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": size["vocabulary"],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return llama_shapes(layers, **size), config


def make_checkpoint(
    folder: Path, shapes: Checkpoint, config: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    """Write normal weights of deviation 0.02 as shards with an index."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if filled + nbytes > SHARD:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += nbytes
    files = {}
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: (torch.randn(shapes[name], generator=generator) * 0.02).to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    write_json(folder / "config.json", config)


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def commands(folder: Path, out: Path, mergekit: Path, dtype: str) -> dict[str, list[str]]:
    """The rivals' command lines for the checkpoints in a folder; each writes to `out`."""
    a, b = (folder / model for model in MODELS)
    config = folder / "mergekit.yaml"
    models = [
        {"model": str(folder / m), "parameters": {"weight": r}} for m, r in zip(MODELS, RATIOS, strict=True)
    ]
    config.write_text(
        json.dumps({"merge_method": "linear", "models": models, "dtype": dtype})
    )  # JSON is YAML
    ratios = ",".join(map(str, RATIOS))
    ours = Path(sys.executable).with_name("timm-ext")
    read = f"mkdir {out}; cat {b}/*.safetensors > /dev/null"
    direct = f"for f in {a}/*.safetensors; do dd if=$f of={out}/$(basename $f) bs=4M oflag=direct; done"
    return {
        "timm_ext": [str(ours), "merge", str(a), str(b), "--ratios", ratios, "--out", str(out)],
        "mergekit": [
            str(mergekit),
            str(config),
            str(out),
            *MERGEKIT,
            "--num-threads",
            str(os.cpu_count()),
        ],
        "copy": ["sh", "-ec", f"{read}; cp {a}/*.safetensors {out}"],
        "copy_direct": ["sh", "-ec", f"{read}; {direct}"],
    }


@dataclass(frozen=True)
class Measured:
    """One command: seconds until it returned and until its result was on disk, peak memory in bytes."""

    wall: float
    durable: float
    resident: int
    anonymous: int


def run(command: list[str]) -> Measured:
    """Run a command in a fresh process."""
    with tempfile.TemporaryFile("w+") as log:
        begin = time.perf_counter()
        pid = subprocess.Popen(command, stdout=log, stderr=log).pid
        peak, done = {"VmHWM": 0, "RssAnon": 0}, 0
        while not done:
            peak = {key: max(value, memory_of(pid, key)) for key, value in peak.items()}
            time.sleep(POLL)
            done, status = os.waitpid(pid, os.WNOHANG)
        wall = time.perf_counter() - begin
        os.sync()
        durable = time.perf_counter() - begin
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read()}")
    return Measured(wall, durable, peak["VmHWM"], peak["RssAnon"])


def memory_of(pid: int, key: str) -> int:
    """Bytes under a key of /proc/PID/status; 0 once the process has ended."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) << 10 if found else 0


def prepare(folder: Path, out: Path, touched: int) -> None:
    """Bring the machine into the same state before each run."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    subprocess.run([sys.executable, "-c", TOUCH, str(touched)], check=True)
    subprocess.run(["sh", "-c", f"cat {folder}/[ab]/*.safetensors > /dev/null"], check=True)


def largest_error(folder: Path, out: Path, dtype: torch.dtype) -> float:
    """Largest error against float64 in units of rounding of Σ w|θ|, of a million elements of each tensor."""
    worst = 0.0
    readers = [Reader(folder / model) for model in MODELS]
    merged = Reader(out)
    assert merged.files.keys() == readers[0].files.keys()
    for name in merged.files:
        theta = torch.stack([reader.start(name) for reader in readers])
        got = merged.start(name)
        assert got.dtype == dtype, name
        share = torch.tensor(RATIOS, dtype=torch.float64) / sum(RATIOS)
        error = (got.double() - share @ theta.double()).abs() / (share @ theta.double().abs())
        worst = max(worst, float(error.max()) * 2.0 ** BITS[dtype])
    return worst


class Reader:
    """The first elements of tensors in a folder of shards."""

    def __init__(self, folder: Path) -> None:
        opened = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self.files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def start(self, name: str) -> Tensor:
        tensor: Tensor = self.files[name].get_tensor(name)
        return tensor.flatten()[: 1 << 20]


def start_up(folder: Path, mergekit: Path, dtype: str) -> dict[str, float]:
    """Seconds that each program takes for a merge of next to nothing."""
    shapes, config = shapes_for(0, getattr(torch, dtype))
    for seed, model in enumerate(MODELS):
        make_checkpoint(folder / model, shapes, config, getattr(torch, dtype), seed)
    seconds: dict[str, list[float]] = {}
    for _ in range(3):
        rivals = commands(folder, folder / "out", mergekit, dtype)
        for name in PROGRAMS:
            shutil.rmtree(folder / "out", ignore_errors=True)
            seconds.setdefault(name, []).append(run(rivals[name]).wall)
    shutil.rmtree(folder)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(folder: Path, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Check both results, then let the rivals take turns."""
    out = folder / "out"
    rivals = commands(folder, out, options.mergekit, dtype)
    errors = {}
    for name in PROGRAMS:
        prepare(folder, out, options.touch)
        run(rivals[name])
        errors[name] = largest_error(folder, out, getattr(torch, dtype))
        if errors[name] > LARGEST_ERROR:
            sys.exit(
                f"{name}: expected an error up to {LARGEST_ERROR} units of rounding (got {errors[name]})"
            )
    runs: dict[str, list[Measured]] = {name: [] for name in rivals}
    for turn in range(options.rounds):
        for name in [*rivals][:: -1 if turn % 2 else 1]:
            prepare(folder, out, options.touch)
            runs[name].append(run(rivals[name]))
            print(dtype, turn, name, runs[name][-1], flush=True)
    shutil.rmtree(out)
    return summarise(folder, rivals, runs, errors, options.touch)


def summarise(
    folder: Path,
    rivals: dict[str, list[str]],
    runs: dict[str, list[Measured]],
    errors: dict[str, float],
    touched: int,
) -> dict[str, Any]:
    sizes = [bytes_in(folder / model) for model in MODELS]
    moved = sum(sizes) + sizes[0]
    reader = Reader(folder / MODELS[0])
    shapes = [file.get_slice(name).get_shape() for name, file in reader.files.items()]
    median = {
        name: {key: statistics.median(asdict(r)[key] for r in rs) for key in asdict(rs[0])}
        for name, rs in runs.items()
    }

    def faster(key: str) -> dict[str, float]:
        pairs = zip(runs["mergekit"], runs["timm_ext"], strict=True)
        ratios = [asdict(theirs)[key] / asdict(ours)[key] for theirs, ours in pairs]
        return {"median": statistics.median(ratios), "smallest": min(ratios)}

    return {
        "tensors": len(shapes),
        "touched_bytes": touched,
        "largest_tensor_elements": max(map(torch.Size.numel, map(torch.Size, shapes))),
        "bytes_of_each_model": sizes,
        "commands": {name: shown(rivals[name], folder) for name in PROGRAMS},
        "error_in_units_of_rounding": errors,
        "median": {
            name: values | {"gigabytes_per_second": moved / values["wall"] / 1e9}
            for name, values in median.items()
        },
        "times_faster_than_mergekit": {"wall": faster("wall"), "durable": faster("durable")},
        "runs": {name: [asdict(r) for r in rs] for name, rs in runs.items()},
    }


def shown(command: list[str], folder: Path) -> str:
    """A command without the paths of this machine."""
    return " ".join([Path(command[0]).name, *command[1:]]).replace(str(folder), "FOLDER")


def environment(mergekit: Path) -> dict[str, Any]:
    python = mergekit.with_name("python")
    ask = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'), v('safetensors'))"
    theirs = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "timm_ext": {name: metadata.version(name) for name in ("timm-ext", "torch", "safetensors")},
        "mergekit": dict(zip(("mergekit", "torch", "safetensors"), theirs, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="where the checkpoints are made; on the disk to be measured"
    )
    parser.add_argument("--mergekit", type=Path, required=True, help="mergekit-yaml in its own environment")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of each model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--touch", type=int, default=8 << 30, help="bytes of memory touched before each run")
    parser.add_argument("--make", action="store_true", help="only make the checkpoints")
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoints")
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON; other dtypes in it are kept")
    options = parser.parse_args()
    options.mergekit = options.mergekit.absolute()
    cases = read_json(options.result)["cases"] if options.result.exists() else {}
    for dtype in options.dtypes:
        folder = options.folder.absolute() / dtype
        shapes, config = shapes_for(options.gigabytes * 1e9, getattr(torch, dtype))
        for seed, model in enumerate(MODELS):
            if not (folder / model).exists():
                make_checkpoint(folder / model, shapes, config, getattr(torch, dtype), seed)
        if options.make:
            continue
        small = start_up(options.folder.absolute() / "small", options.mergekit, dtype)
        cases[dtype] = measure(folder, dtype, options) | {"start_up_seconds": small}
        write_json(options.result, {"environment": environment(options.mergekit), "cases": cases})
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
