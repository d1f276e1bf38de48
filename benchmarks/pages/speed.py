"""Facts of the pages about time and memory, each made from its result."""

from collections.abc import Iterable, Sequence

from benchmarks.pages.steps import on_other_cpus, ratios, timed, times_of, times_table
from benchmarks.pages.tables import Facts, Row, read_json, span, table

MERGE_RIVALS = {
    "eager": "per-layer eager, stacked",
    "modelwise": "per-layer eager, model by model",
    "compiled": "`torch.compile`",
    "foreach": "`torch._foreach`",
    "kernelwise": "`[T, G, 27]` eager",
    "flat": "flat eager",
}
FISHER_RIVALS = {"loop": "loop", "vmap": "`vmap(grad)`", "opacus": "Opacus", "backpack": "BackPACK"}
SEGMENTS = {"layers": "30 layers", "kernels": "27 elements each"}
PROGRAMS = {
    "timm_ext": "timm_ext",
    "mergekit": "mergekit",
    "copy": "copy",
    "copy_direct": "copy past the cache",
}


def merge_table(rows: Iterable[Row]) -> str:
    """Return times in milliseconds, rivals as multiples."""

    def multiples(row: Row, rival: str) -> str | None:
        found = [row.get(f"{rival}_{way}_over_fused") for way in ("forward", "forward_backward")]
        return None if None in found else " / ".join(f"{ratio:.1f} ×" for ratio in found)

    ordered = sorted(rows, key=lambda row: (row["segments"] != "layers", row["threads"], row["models"]))
    return table(
        ["segments", "T", "threads", "forward", "with backward", "of bandwidth", *MERGE_RIVALS.values()],
        [
            [
                SEGMENTS[row["segments"]],
                row["models"],
                row["threads"],
                f"{row['milliseconds']['fused_forward']:.1f} ms",
                f"{row['milliseconds']['fused_forward_backward']:.1f} ms",
                f"{row['forward_out_of_bandwidth']:.2f}",
                *(multiples(row, rival) for rival in MERGE_RIVALS),
            ]
            for row in ordered
        ],
    )


def memory_table(rows: Sequence[Row]) -> str:
    """Return peak memory beyond the inputs, in outputs, by problem and rival."""
    problems: dict[tuple[int, str], dict[str, float]] = {(row["models"], row["segments"]): {} for row in rows}
    for row in rows:
        problems[row["models"], row["segments"]][row["rival"]] = row["extra_of_output"]
    ordered = sorted(problems.items(), key=lambda item: (item[0][1] != "layers", item[0][0]))
    rivals = {"fused": "`fused_merge`", **MERGE_RIVALS}
    return table(
        ["segments", "T", *rivals.values()],
        [
            [
                SEGMENTS[segments],
                models,
                *(f"{found[name]:.1f}" if name in found else None for name in rivals),
            ]
            for (models, segments), found in ordered
        ],
    )


def isa_table(rows: Sequence[Row]) -> str:
    """Return the kernels' times by instruction set."""
    sets = list(rows[0]["forward_milliseconds"])
    return table(
        ["segments", "T", *(f"{way}, {name}" for way in ("forward", "backward") for name in sets)],
        [
            [
                SEGMENTS[row["segments"]],
                row["models"],
                *(
                    f"{row[f'{way}_milliseconds'][name]:.1f} ms"
                    for way in ("forward", "backward")
                    for name in sets
                ),
            ]
            for row in rows
        ],
    )


def merge() -> Facts:
    """Facts of the merge beside other ways to write it."""
    result = read_json("merge_cpu.json")
    sizes: dict[int, list[Row]] = {}
    for row in result["rows"]:
        sizes.setdefault(round(row["elements"], -4), []).append(row)
    layers = [row for row in next(iter(sizes.values())) if row["segments"] == "layers"]
    return {
        "result": result,
        "tables": {size: merge_table(rows) for size, rows in sizes.items()},
        "memory": memory_table(result["memory"]),
        "instruction_sets": isa_table(result["instruction_sets"]),
        "layers": layers,
        "over": {
            name: span(
                row[f"{name}_{way}_over_fused"] for row in layers for way in ("forward", "forward_backward")
            )
            for name in ("eager", "modelwise", "compiled", "foreach")
        },
    }


def fisher() -> Facts:
    """Facts of the Fisher beside other ways to it."""
    result = read_json("fisher_cpu.json")
    rows = [
        [
            row["network"],
            f"{row['edge']}³",
            row["batch"],
            f"{row['milliseconds']['plain']:.0f} ms",
            *ratios(row, ["ours", *FISHER_RIVALS]),
        ]
        for row in result["rows"]
    ]
    names = {"ours": "timm_ext", "ours one by one": "`micro_batch=1`", **FISHER_RIVALS}
    memory = [
        [
            row["network"],
            f"{row['edge']}³",
            row["batch"],
            f"{row['plain_bytes'] / 1e6:.0f} MB",
            *ratios(row, list(names)),
        ]
        for row in result["memory"]
    ]
    size = ["network", "image", "B", "plain step"]
    papers = [row for row in result["rows"] if row["network"].startswith("isensee2017")]
    twice = [row["over_ours"]["ours one by one"] for row in papers if row["edge"] > 48 or row["batch"] == 1]
    batches = [row["of_plain"] for row in result["rows"] if row["batch"] > 1]
    others = read_json("fisher_networks_cpu.json")
    ways = {"ours": "timm_ext", "loop": FISHER_RIVALS["loop"], "vmap": FISHER_RIVALS["vmap"]}
    return {
        "result": result,
        "others": others,
        "others_times": times_table(others["rows"], ways),
        "others_of_plain": times_of(others["rows"]),
        "others_elsewhere": on_other_cpus("fisher_networks_cpu", ways),
        "times": timed([*size, "timm_ext", *FISHER_RIVALS.values()], rows),
        "elsewhere": on_other_cpus("fisher_cpu", {"ours": "timm_ext", **FISHER_RIVALS}),
        "memory": table([*size, *names.values()], memory),
        "networks": ", ".join(dict.fromkeys(row["network"] for row in result["rows"])),
        "of_plain": {name: [row[name] for row in batches if name in row] for name in names},
        "singles": [row["of_plain"]["ours"] for row in result["rows"] if row["batch"] == 1],
        "largest_memory": [row["of_plain"] for row in result["memory"] if row["batch"] == 8],
        "one_by_one": [row["over_ours"]["ours one by one"] for row in papers if row["batch"] == 8],
        "noise": max(max(ratio, 1 / ratio) - 1 for ratio in twice),
    }


def convolution() -> Facts:
    """Facts of single convolutions."""
    result = read_json("convolution_cpu.json")
    rows = [
        [
            row["base"],
            f"{row['inputs']} → {row['outputs']}",
            f"{row['edge']}³",
            row["stride"],
            row["pass"],
            row["way"],
            f"{row['milliseconds']['timm_ext']:.2f} ms",
            *(f"{row['over_ours'][rival]:.1f} ×" for rival in ("PyTorch", "oneDNN")),
        ]
        for row in result["rows"]
    ]
    header = ["base filters", "channels", "image", "stride", "pass", "way", "timm_ext", "PyTorch", "oneDNN"]
    over = {rival: [row["over_ours"][rival] for row in result["rows"]] for rival in ("PyTorch", "oneDNN")}
    return {"result": result, "table": table(header, rows), "over": over}


def adaptation_step() -> Facts:
    """Facts of a training step through the merge."""
    result = read_json("adaptation_step.json")
    parts = list(result["rows"][0]["milliseconds"]["parts"])
    rows = [
        [
            row["models"],
            row["batch"],
            f"{row['plain_milliseconds']:.0f} ms",
            f"{row['merged_milliseconds']:.0f} ms",
            f"{row['ratio']:.3f} [{row['ratio_interval'][0]:.3f}, {row['ratio_interval'][1]:.3f}]",
            *(f"{row['milliseconds']['parts'][part]['host']:.2f} ms" for part in parts),
        ]
        for row in result["rows"]
    ]
    header = ["T", "batch", "plain step", "merged step", "ratio", *(part.replace("_", " ") for part in parts)]
    return {"result": result, "table": table(header, rows)}


def streamed_merge() -> Facts:
    """Facts of the merge of whole checkpoints."""
    result = read_json("streamed_merge.json")
    rows = [
        [
            dtype,
            title,
            f"{case['median'][program]['wall']:.1f} s",
            f"{case['median'][program]['durable']:.1f} s",
            f"{case['median'][program]['resident'] / 1e9:.2f} GB",
            f"{case['median'][program]['anonymous'] / 1e9:.2f} GB",
            f"{case['median'][program]['gigabytes_per_second']:.1f} GB/s",
        ]
        for dtype, case in result["cases"].items()
        for program, title in PROGRAMS.items()
    ]
    header = [
        "stored as",
        "program",
        "whole command",
        "until on disk",
        "resident",
        "of it anonymous",
        "speed",
    ]
    return {"result": result, "table": table(header, rows), "cases": result["cases"]}


def cuda_resources() -> Facts:
    """Facts of the compiled CUDA kernels."""
    result = read_json("cuda_resources.json")
    kernels: dict[tuple[str, str], list[Row]] = {}
    for row in result["kernels"]:
        kernels.setdefault((row["source"], row["architecture"]), []).append(row)

    def line(source: str, architecture: str, found: list[Row]) -> list[object]:
        flight = [row["bytes_in_flight_per_sm"] for row in found if "bytes_in_flight_per_sm" in row]
        least = f"{min(flight) / 1e3:.0f} kB" if flight else None
        registers, spills = (max(row[key] for row in found) for key in ("registers", "spill_bytes"))
        return [f"`{source}`", architecture, len(found), registers, spills, least]

    header = [
        "source",
        "architecture",
        "kernels",
        "registers, at most",
        "bytes spilled",
        "bytes in flight, at least",
    ]
    return {
        "result": result,
        "table": table(header, [line(*key, found) for key, found in sorted(kernels.items())]),
        "flight": [
            row["bytes_in_flight_per_sm"] for row in result["kernels"] if "bytes_in_flight_per_sm" in row
        ],
        "architectures": sorted({row["architecture"] for row in result["kernels"]}),
    }
