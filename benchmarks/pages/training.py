"""Facts of the pages about trained networks, each made from its result."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.pages.tables import Facts, read_csv, read_json, signed, span, table


def demo() -> Facts:
    """Facts of the demo on phantoms, on another CPU, and on label maps."""
    runs = {}
    for name, folder in {"phantoms": "demo", "other": "demo/other-cpu", "maps": "demo-label-maps"}.items():
        dice = read_csv(f"{folder}/dice.csv")
        compared = _compared(folder, dice)
        over = {row["first"]: float(row["mean"]) for row in compared if row["b"] == "scratch"}
        runs[name] = {
            "dice": _dice_table(dice),
            "compared": _comparison_table([row for row in compared if row["b"] == "scratch"]),
            "beyond": [
                row["pair"] for row in compared if "p_mixed" in row and row["beyond_chance"] == "true"
            ],
            "over": over,
            "fixed": [lead for title, lead in over.items() if not title.startswith("T-IMM")],
            "mean": {row["pair"]: float(row["mean"]) for row in compared},
        }
    names = {
        "environment": "demo",
        "other_environment": "demo/other-cpu",
        "maps_environment": "demo-label-maps",
    }
    return {"runs": runs, **{key: read_json(f"{name}/environment.json") for key, name in names.items()}}


def study() -> Facts:
    """Facts of the plan `small`."""
    dice = [row for row in read_csv("study/small/dice.csv") if row["region"] == "mean"]
    compared = {(row["pair"], row["train_cases"]): row for row in _compared("study/small", dice)}
    mean = {(row["title"], row["train_cases"]): row for row in dice}
    counts = list(dict.fromkeys(row["train_cases"] for row in dice))
    titles = list(dict.fromkeys(title for title, _ in mean))
    forgotten = read_csv("study/small/forgetting.csv")

    def interval(row: dict[str, str]) -> str:
        return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**_numbers(row, "mean", "low", "high"))

    return {
        "dice": table(
            ["Initialisation", *(f"N = {count}" for count in counts)],
            [[title, *(interval(mean[title, count]) for count in counts)] for title in titles],
        ),
        "apart": lambda one, other, cases: signed(
            float(mean[one, str(cases)]["mean"]) - float(mean[other, str(cases)]["mean"])
        ),
        "p_mixed": lambda one, cases=8: (
            f"{float(compared[f'{one} − From scratch', str(cases)]['p_mixed']):.2g}"
        ),
        "best": lambda cases: signed(
            max(
                float(row["mean"])
                for (_, count), row in compared.items()
                if count == str(cases) and row["b"] == "scratch"
            )
        ),
        "beyond": [
            f"“{pair}” with {count} cases ({signed(float(row['mean']))})"
            for (pair, count), row in compared.items()
            if row["beyond_chance"] == "true"
        ],
        "lead": lambda one, other="From scratch", cases=8: signed(
            float(compared[f"{one} − {other}", str(cases)]["mean"])
        ),
        "forgetting": lambda title: " and ".join(
            f"{float(row['mean']):.3f}" for row in forgotten if row["title"] == title
        ),
        "compared": len(compared),
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


def ratio_groups() -> Facts:
    """Facts of what the ratios of two published networks are grouped by."""
    result = read_json("ratio_groups.json")

    def of(order: str, fisher: bool, groups: str) -> list[float]:
        """Return the Dice of one way in each repeat."""
        ways = [way for row in result["rows"] for way in row["ways"]]
        return [way[groups] for way in ways if (way["order"], way["fisher"]) == (order, fisher)]

    columns = ("equal", "layer", "kernel")
    lines = []
    for order in ("plain", "aligned"):
        for fisher in (False, True):
            found = [of(order, fisher, column) for column in columns]
            told = [f"{statistics.mean(each):.2f} ({span(each, '.2f')})" for each in found]
            lines.append([order, "Fishers" if fisher else "none", *told])
    header = ["channels", "weights", "equal ratios", "per layer", "per kernel"]
    sources = list(zip(*(row["sources"] for row in result["rows"]), strict=True))
    return {"result": result, "of": of, "sources": sources, "table": table(header, lines)}


def fitted_heads() -> Facts:
    """Facts of fine-tuning from heads that were fitted first, and from heads at random."""
    result = read_json("fitted_heads.json")
    dice = {(row["cases"], row["head"], row["repeat"]): dict(row["dice"]) for row in result["rows"]}
    repeats = sorted({repeat for *_, repeat in dice})
    steps = list(next(iter(dice.values())))

    def of(cases: int, head: str, step: int) -> list[float]:
        """Return the Dice of one way after so many steps in each repeat."""
        return [dice[cases, head, repeat][step] for repeat in repeats]

    def lead(cases: int, step: int) -> list[float]:
        """Return what fitted heads lead by after so many steps in each repeat."""
        pairs = zip(of(cases, "fitted", step), of(cases, "given", step), strict=True)
        return [fitted - given for fitted, given in pairs]

    shown = [step for step in steps if step in (0, 10, 20, steps[-1])]
    lines = []
    for cases in result["settings"]["cases"]:
        for head, title in (("given", "random"), ("fitted", "fitted")):
            found = [of(cases, head, step) for step in shown]
            lines.append(
                [cases, title, *(f"{statistics.mean(each):.2f} ({span(each, '.2f')})" for each in found)]
            )
        leads = [lead(cases, step) for step in shown]
        lines.append([cases, "difference", *(signed(statistics.mean(each)) for each in leads)])
    header = ["training cases", "heads", *(f"{step} steps" for step in shown)]
    facts = {"of": of, "lead": lead, "last": steps[-1], "repeats": len(repeats)}
    return {"result": result, "table": table(header, lines), **facts}


def nnunet_hippocampus() -> Facts:
    """Facts of networks that went from nnU-Net through merges and back."""
    result = read_json("nnunet_hippocampus.json")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["network"], row["stage"]), []).append(row)
    regions = list(result["rows"][0]["regions"])
    lines = []
    for (network, stage), repeats in found.items():
        means = [statistics.mean(row["regions"][region] for row in repeats) for region in regions]
        dice = ", ".join(f"{row['dice']:.3f}" for row in repeats)
        lines.append([stage, network, dice, *(f"{mean:.3f}" for mean in means)])
    scores = [[row["dice"] for row in repeats] for repeats in found.values()]
    return {
        "result": result,
        "spread": max(max(each) - min(each) for each in scores),
        "dice": lambda network, stage: [row["dice"] for row in found[network, stage]],
        "table": table(["stage", "network", "Dice", *regions], lines),
    }


def _compared(folder: str, dice: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the comparisons of a folder with the titles of a, `first`, and of a − b, `pair`."""
    titles = {row["method"]: row["title"] for row in dice}
    rows = read_csv(f"{folder}/comparisons.csv")
    return [
        {**row, "first": titles[row["a"]], "pair": f"{titles[row['a']]} − {titles[row['b']]}"} for row in rows
    ]


def _dice_table(rows: Sequence[dict[str, str]]) -> str:
    """Return mean ± SD of each initialisation in each region, with steps and seconds."""
    regions = list(dict.fromkeys(row["region"] for row in rows))
    lines = []
    for title in dict.fromkeys(row["title"] for row in rows):
        mine = {row["region"]: row for row in rows if row["title"] == title}
        spreads = ["{mean:.3f} ± {sd:.3f}".format(**_numbers(mine[name], "mean", "sd")) for name in regions]
        lines.append([title, mine["mean"]["steps"], *spreads, f"{float(mine['mean']['seconds']):.0f}"])
    names = [name.capitalize() if name == "mean" else name for name in regions]
    return table(["Initialisation", "Steps", *names, "Seconds"], lines)


def _comparison_table(rows: Sequence[dict[str, str]]) -> str:
    """Return the comparisons; p-values of the mixed model, and what they decide, where there are some."""
    head = ["Difference", "Mean", "95 % interval", "SD over seeds"]
    names = {"p": "p", "p_holm": "p (Holm)", "p_mixed": "p (mixed)", "p_mixed_holm": "p (mixed, Holm)"}
    names = {name: title for name, title in names.items() if name in rows[0]}
    decided = "p_mixed" in names
    lines = []
    for row in rows:
        mean, low, high, sd, *p = _numbers(row, "mean", "low", "high", "sd", *names).values()
        told = [f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{sd:.3f}", *(f"{value:.3g}" for value in p)]
        lines.append([row["pair"], *told, *["yes" if row["beyond_chance"] == "true" else "no"] * decided])
    return table([*head, *names.values(), *["Beyond chance"] * decided], lines)


def _numbers(row: dict[str, str], *names: str) -> dict[str, float]:
    return {name: float(row[name]) for name in names}
