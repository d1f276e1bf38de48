"""Prints the README's table of the Fisher benchmark from its result.

python -m benchmarks.fisher_table benchmarks/results/fisher_cpu.json
"""

import json
import sys
from pathlib import Path
from typing import Any

RIVALS = {"loop": "loop", "vmap": "`vmap(grad)`", "opacus": "Opacus", "backpack": "BackPACK"}


def table(result: dict[str, Any]) -> str:
    """Return the rows as Markdown: times as multiples of the plain step."""
    header = ["base filters", "image", "B", "plain step", "timm_ext", *RIVALS.values()]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in result["rows"]:
        times = row["of_plain"]
        lines.append(
            _line(
                [
                    str(row["base"]),
                    f"{row['edge']}³",
                    str(row["batch"]),
                    f"{row['milliseconds']['plain']:.0f} ms",
                    f"{times['ours']:.2f}",
                    *(f"{times[name]:.2f}" if name in times else "" for name in RIVALS),
                ]
            )
        )
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
