"""Compares ways to learn the mixing ratios, by validation Dice alone: a search, not a result.

    python -m benchmarks.adaptation_search benchmarks/adaptation_search.yaml RUNS TABLE.csv --label-maps DIR

The file names a plan of `timm-ext study`, variants as changes of its fields with one method each, and which
seeds and draws every variant is run on; those under `confirm` are then run on all of the plan's. A variant's
score is the validation Dice of the network that its run ends with. No test case is looked at: data and seeds
are to be others than those of reported studies. Started again with the same folder, it goes on where it was.
"""

import argparse
import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from timm_ext.config import load_settings
from timm_ext.documents import validated
from timm_ext.errors import InputError
from timm_ext.files import atomic_write
from timm_ext.study.outcomes import Training
from timm_ext.study.plan import StudyPlan
from timm_ext.study.records import Folder
from timm_ext.study.run import finish_steps
from timm_ext.study.step import Step
from timm_ext.study.study import make_study
from timm_ext.system.environment import environment


@dataclass(frozen=True)
class Search:
    """What is searched.

    Attributes:
        plan: of all runs; its seeds and draws are those of `confirm`.
        screen: `seeds` and `draws` of the first look at every variant.
        variants: by name, the fields of the plan that differ; `methods` is one.
        confirm: variants that are run on all seeds and draws.
        reference: the variant that the summary compares with.
    """

    plan: dict[str, Any]
    screen: dict[str, tuple[int, ...]]
    variants: dict[str, dict[str, Any]]
    confirm: tuple[str, ...] = ()
    reference: str = "t-imm"
    changes: dict[str, Any] = field(default_factory=dict)

    def plan_of(self, name: str, **changes: Any) -> StudyPlan:
        """Return the plan of one variant."""
        values = {**self.plan, **self.variants[name], **changes, **self.changes}
        plan = validated(StudyPlan, {"references": (), **values}, name)
        if len(plan.methods) != 1 or len(plan.train_cases) != 1:
            raise InputError(f"{name}: expected one method and one number of training cases")
        return plan


@dataclass(frozen=True)
class Score:
    """Validation Dice of one run."""

    variant: str
    seed: int
    draw: int
    dice: float


def runs_of(plan: StudyPlan) -> dict[tuple[int, int], Step]:
    """Return (seed, draw) → run of a study of one method."""
    return {(run.seed, run.draw): run.step for run in make_study(plan).runs}


def search(plan: Search, folder: Folder, workers: int, console: Console) -> list[Score]:
    """Run all variants on the screen's seeds and draws, then the confirmed ones on the plan's.

    With no worker nothing is run, and those runs are told that are finished.
    """
    facts = environment()
    scores: dict[tuple[str, int, int], Score] = {}
    looks = [(name, plan.screen) for name in plan.variants] + [(name, {}) for name in plan.confirm]
    with folder.lock() if workers else nullcontext():
        for name, changes in looks:
            runs = runs_of(plan.plan_of(name, **changes))
            if workers:
                finish_steps(list(runs.values()), folder, workers=workers, console=console, facts=facts)
            for (seed, draw), step in runs.items():
                if folder.record(step) is None:
                    continue
                result = folder.outcome(step, Training)
                dice = dict(result.curve)[result.best_step or 0]
                scores[name, seed, draw] = Score(name, seed, draw, dice)
    console.print(summary(list(scores.values()), plan.reference), highlight=False)
    return list(scores.values())


def summary(scores: Sequence[Score], reference: str) -> str:
    """Return a table: mean, difference to the reference over common pairs ± standard error, pairs better."""
    by_variant: dict[str, dict[tuple[int, int], float]] = {}
    for score in scores:
        by_variant.setdefault(score.variant, {})[score.seed, score.draw] = score.dice
    lines = ["| variant | runs | Dice | − reference | standard error | better |", "|---|---|---|---|---|---|"]
    for name, values in by_variant.items():
        common = values.keys() & by_variant.get(reference, {}).keys()
        differences = [values[pair] - by_variant[reference][pair] for pair in sorted(common)]
        compared = " | | "
        if name != reference and len(differences) > 1:
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            better = f"{sum(d > 0 for d in differences)} of {len(differences)}"
            compared = f"{statistics.mean(differences):+.3f} | {error:.3f} | {better}"
        lines.append(f"| {name} | {len(values)} | {statistics.mean(values.values()):.3f} | {compared} |")
    return "\n".join(lines)


def write_table(path: Path, scores: Sequence[Score], variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Write one line for each run."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", "settings", "seed", "draw", "validation_dice"])
        for score in scores:
            told = json.dumps(variants[score.variant])
            writer.writerow([score.variant, told, score.seed, score.draw, f"{score.dice:.4f}"])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("search", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--label-maps", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="0 only reads what is finished")
    options = parser.parse_args()
    plan = load_settings(Search, options.search)
    if options.label_maps is not None:
        plan = replace(plan, changes={"source": str(options.label_maps.resolve())})
    console = Console()
    scores = search(plan, Folder(options.runs), options.workers, console)
    write_table(options.table, scores, plan.variants)


if __name__ == "__main__":
    main()
