"""Facts of the pages about whole networks, trained and applied on a CPU, each made from its result."""

from collections.abc import Callable, Sequence

from benchmarks.pages.tables import RESULTS, Facts, Row, read_json, table

DOUBT, MARK = 1.1, "†"
DOUBTFUL = (
    f"A {MARK} marks multiples whose median over the rounds and quotient of median times differ by more than "
    f"{100 * (DOUBT - 1):.0f} %: the rounds were unlike, and the row is to be measured again."
)

WAYS = {
    "channels_last": "`channels_last_3d`",
    "compile": "`torch.compile`",
    "ours": "timm_ext",
    "bfloat16": "bfloat16 autocast",
    "ours bfloat16": "timm_ext, bfloat16",
}
PROGRAMS = {
    "channels_last": WAYS["channels_last"],
    "compile": WAYS["compile"],
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "ours": "timm_ext",
    "bfloat16": WAYS["bfloat16"],
    "openvino bfloat16": "OpenVINO, bfloat16",
    "ours bfloat16": WAYS["ours bfloat16"],
}
TRAINERS = {
    "bfloat16": "bare loop, bfloat16",
    "ours without fast layers": "timm_ext, `fast_layers=false`",
    "monai": "MONAI `SupervisedTrainer`",
    "nnunet": "nnU-Net `train_step`",
    "ours": "timm_ext",
    "ours bfloat16": "timm_ext, `bf16-mixed`",
}


def size(row: Row) -> list[object]:
    """The cells that name a row's problem."""
    return [row["network"], f"{row['edge']}³", row["batch"], *([row["threads"]] if "threads" in row else [])]


def ratios(row: Row, names: Sequence[str]) -> list[object]:
    """Multiples of the plain way, marked where they are in doubt; empty where a program was not installed."""
    return [
        f"{row['of_plain'][name]:.2f}{MARK if in_doubt(row, name) else ''}"
        if name in row["of_plain"]
        else None
        for name in names
    ]


def in_doubt(row: Row, name: str) -> bool:
    """Tell whether the median of ratios is far from the ratio of medians."""
    times = row.get("milliseconds") or row.get("seconds")
    if times is None:  # of memory
        return False
    return not 1 / DOUBT < times[name] / times["plain"] / row["of_plain"][name] < DOUBT


def timed(header: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    """Return a table, and below it what its mark means if it has one."""
    told = table(header, cells)
    return f"{told}\n\n{DOUBTFUL}" if MARK in told else told


def times_table(rows: Sequence[Row], names: dict[str, str]) -> str:
    """Return milliseconds of the plain way, the others as multiples of it."""
    names = columns(rows, names)
    header = ["network", "image", "B", "threads", "PyTorch", *names.values()]
    cells = [
        [*size(row), f"{row['milliseconds']['plain']:.0f} ms", *ratios(row, list(names))] for row in rows
    ]
    return timed(header, cells)


def trainers_table(rows: Sequence[Row], names: dict[str, str]) -> str:
    """Return seconds of a step of the bare loop, trainers as multiples of it."""
    names = columns(rows, names)
    header = ["network", "patch", "B", "threads", "bare loop", *names.values()]
    cells = [[*size(row), f"{row['seconds']['plain']:.2f} s", *ratios(row, list(names))] for row in rows]
    return timed(header, cells)


def peaks_table(rows: Sequence[Row]) -> str:
    """Return peak memory of the plain way, the others as multiples of it."""
    ways = columns(rows, WAYS)
    cells = [[*size(row), f"{row['plain_bytes'] / 1e6:.0f} MB", *ratios(row, list(ways))] for row in rows]
    return table(["network", "image", "B", "PyTorch", *ways.values()], cells)


def columns(rows: Sequence[Row], names: dict[str, str]) -> dict[str, str]:
    """Return the ways that any row has."""
    return {name: title for name, title in names.items() if any(name in row["of_plain"] for row in rows)}


def networks_of(rows: Sequence[Row]) -> int:
    """Return how many networks the rows are of."""
    return len({row["network"] for row in rows})


def errors_of(rows: Sequence[Row]) -> Facts:
    """Return all errors of each way."""
    names = {name for row in rows for name in row["errors"]}
    return {name: [row["errors"][name] for row in rows if name in row["errors"]] for name in names}


def times_of(rows: Sequence[Row]) -> Facts:
    """Return all multiples of the plain way's time of each way."""
    names = {name for row in rows for name in row["of_plain"]}
    return {name: [row["of_plain"][name] for row in rows if name in row["of_plain"]] for name in names}


def on_other_cpus(
    name: str, names: dict[str, str], make: Callable[[Sequence[Row], dict[str, str]], str] = times_table
) -> list[Facts]:
    """Facts of the results that earlier versions left on other CPUs.

    Args:
        name: of the result's file, without suffix.
        names: titles of the ways.
        make: the table of the rows.
    """
    files = sorted((RESULTS / "other-cpu").glob(f"{name}-*.json"))
    results = [(path.name, read_json(f"other-cpu/{path.name}")) for path in files]
    return [{"file": file, "result": found, "times": make(found["rows"], names)} for file, found in results]


def train_step() -> Facts:
    """Facts of training steps beside other ways to run them, and of whole trainers."""
    result, trainers = read_json("train_step_cpu.json"), read_json("trainers_cpu.json")
    return {
        "result": result,
        "trainers_result": trainers,
        "networks": networks_of(result["rows"]),
        "times": times_table(result["rows"], WAYS),
        "memory": peaks_table(result["memory"]),
        "of_plain": times_of(result["rows"]),
        "peaks": times_of(result["memory"]),
        "errors": errors_of(result["rows"]),
        "others": on_other_cpus("train_step_cpu", WAYS),
        "trainers": trainers_table(trainers["rows"], TRAINERS),
        "trainers_others": on_other_cpus("trainers_cpu", TRAINERS, trainers_table),
        "of_loop": times_of(trainers["rows"]),
        "steps": min(row["steps"] for row in trainers["rows"]),
    }


def inference() -> Facts:
    """Facts of forward passes beside other programs."""
    result = read_json("inference_cpu.json")
    rows = result["rows"]
    return {
        "result": result,
        "networks": networks_of(rows),
        "times": times_table(rows, PROGRAMS),
        "memory": peaks_table(result["memory"]),
        "of_plain": times_of(rows),
        "errors": errors_of(rows),
        "others": on_other_cpus("inference_cpu", PROGRAMS),
        "of_openvino": [
            row["milliseconds"]["ours"] / row["milliseconds"]["openvino"]
            for row in rows
            if "openvino" in row["milliseconds"]
        ],
    }
