"""Facts of the pages about trained networks, each made from its result."""

import math
import statistics
from typing import Any

from benchmarks.pages.tables import Facts, csv_table, read_csv, read_json, signed, table


def differences(folder: str) -> dict[str, float]:
    """Return each initialisation's lead over one from scratch."""
    ending = " − From scratch"
    return {
        row["Difference"].removesuffix(ending): float(row["Mean"])
        for row in read_csv(f"{folder}/comparisons.csv")
        if row["Difference"].endswith(ending)
    }


def demo() -> Facts:
    """Facts of the demo on phantoms, on another CPU, and on label maps."""
    runs = {}
    for name, folder in {"phantoms": "demo", "other": "demo/other-cpu", "maps": "demo-label-maps"}.items():
        compared = read_csv(f"{folder}/comparisons.csv")
        over = differences(folder)
        runs[name] = {
            "dice": csv_table(read_csv(f"{folder}/dice.csv")),
            "compared": csv_table([row for row in compared if row["Difference"].endswith(" − From scratch")]),
            "beyond": [row["Difference"] for row in compared if row["Beyond chance"] == "yes"],
            "over": over,
            "fixed": [lead for title, lead in over.items() if not title.startswith("T-IMM")],
            "mean": {row["Difference"]: float(row["Mean"]) for row in compared},
        }
    facts = {name: read_json(f"demo/{name}environment.json") for name in ("", "other-cpu/")}
    return {"runs": runs, "environment": facts[""], "other_environment": facts["other-cpu/"]}


def study() -> Facts:
    """Facts of the plan `small`."""
    comparisons = {
        (row["Difference"], row["Training cases"]): row for row in read_csv("study/small/comparisons.csv")
    }
    mean = {row["Initialisation"]: row for row in read_csv("study/small/dice.csv")}
    forgotten = {row.pop("Initialisation"): row for row in read_csv("study/small/forgetting.csv")}
    return {
        "dice": csv_table(list(mean.values())),
        "apart": lambda one, other, cases: signed(
            float(mean[one][f"N = {cases}"].split()[0]) - float(mean[other][f"N = {cases}"].split()[0])
        ),
        "p_of_runs": lambda one: comparisons[f"{one} − From scratch", "8"]["p (runs)"],
        "lead": lambda one, other="From scratch", cases=8: signed(
            float(comparisons[f"{one} − {other}", str(cases)]["Mean"])
        ),
        "forgetting": lambda title: " and ".join(
            value.partition(" ")[0] for value in forgotten[title].values()
        ),
        "compared": len(comparisons),
    }


def adaptation_search() -> Facts:
    """Facts of the search among ways to learn ratios."""
    rows = read_csv("study/adaptation_search.csv")
    scores: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        scores.setdefault(row["variant"], {})[row["seed"], row["draw"]] = float(row["validation_dice"])

    def compare(one: str, other: str) -> dict[str, Any]:
        """Return mean, standard error and number of positive differences over common pairs."""
        found = [scores[one][pair] - scores[other][pair] for pair in scores[one] if pair in scores[other]]
        return {
            "mean": statistics.mean(found),
            "error": statistics.stdev(found) / math.sqrt(len(found)),
            "pairs": len(found),
            "better": f"{sum(value > 0 for value in found)} of {len(found)}",
        }

    lines: list[list[object]] = []
    for name, found in scores.items():
        told: list[object] = [None] * 3
        if name != "t-imm":
            by = compare(name, "t-imm")
            told = [signed(by["mean"]), f"{by['error']:.3f}", by["better"]]
        lines.append([name, len(found), f"{statistics.mean(found.values()):.3f}", *told])
    lowest = min(float(row["validation_dice"]) for row in rows)
    header = ["variant", "runs", "Dice", "− T-IMM", "standard error", "better"]
    return {"table": table(header, lines), "compare": compare, "lowest": lowest}


def barrier() -> Facts:
    """Facts of networks from different initialisations."""
    result = read_json("barrier.json")
    rows = [
        [
            row["pair"] + 1,
            *(f"{row['plain']['losses'][end]:.2f}" for end in (0, -1)),
            *(
                f"{row[way][what]:.2f}"
                for what in ("equal weights", "barrier", "learned weights")
                for way in ("plain", "aligned")
            ),
        ]
        for row in result["rows"]
    ]
    header = ["pair", "first", "second", "mean", "aligned", "barrier", "aligned", "learned", "aligned"]
    losses = {
        (way, what): [row[way][what] for row in result["rows"]]
        for way in ("plain", "aligned")
        for what in ("equal weights", "learned weights")
    }
    ends = [row["plain"]["losses"][end] for row in result["rows"] for end in (0, -1)]
    return {"result": result, "table": table(header, rows), "losses": losses, "ends": ends}
