"""Prints the README's table of the merge benchmark from its result.

python -m benchmarks.merge_table benchmarks/results/merge_cpu.json
"""

import json
import sys
from pathlib import Path
from typing import Any

RIVALS = {
    "eager": "per-layer eager, stacked",
    "modelwise": "per-layer eager, model by model",
    "compiled": "`torch.compile`",
    "foreach": "`torch._foreach`",
    "kernelwise": "`[T, G, 27]` eager",
    "flat": "flat eager",
}


def table(result: dict[str, Any], elements: int) -> str:
    """Return the rows of one number of elements as Markdown; times in milliseconds, rivals as multiples."""
    header = ["segments", "T", "threads", "forward", "with backward", "of bandwidth", *RIVALS.values()]
    lines = [_line(header), _line(["---"] * len(header))]
    rows = [row for row in result["rows"] if abs(row["elements"] - elements) < 27]
    for row in sorted(rows, key=lambda row: (row["segments"] != "layers", row["threads"], row["models"])):
        times = row["milliseconds"]
        lines.append(
            _line(
                [
                    "30 layers" if row["segments"] == "layers" else "27 elements each",
                    str(row["models"]),
                    str(row["threads"]),
                    f"{times['fused_forward']:.1f} ms",
                    f"{times['fused_forward_backward']:.1f} ms",
                    f"{row['forward_out_of_bandwidth']:.2f}",
                    *(_multiples(row, name) for name in RIVALS),
                ]
            )
        )
    return "\n".join(lines)


def _multiples(row: dict[str, Any], rival: str) -> str:
    forward = row.get(f"{rival}_forward_over_fused")
    both = row.get(f"{rival}_forward_backward_over_fused")
    return "" if forward is None else f"{forward:.1f} × / {both:.1f} ×"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(path: Path) -> None:
    """Print the table of the first number of elements in a result."""
    result = json.loads(path.read_text())
    print(table(result, result["rows"][0]["elements"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
