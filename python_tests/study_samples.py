"""Results of a made-up study, as its report takes them."""

from dataclasses import replace

import numpy as np
import pandas as pd

from timm_ext.study.report.results import RUN, Example, Results

CASES = tuple(f"case-{number:02d}" for number in range(12))
REGIONS = ("WT", "TC", "ET")
METHODS = {"scratch": 0.0, "imm-warmup": 0.0, "t-imm": 0.1}
"""Method → its lead in Dice over scratch."""


def study_results(
    counts=(4, 8), draws=(0, 1), seeds=(0, 1, 2), leads=METHODS, noise=0.004, *, sets=(0,), **changes
):
    """All that a report can show, with equal noise in every case."""
    runs = [(m, n, k, d, s) for n in counts for m in leads for k in sets for d in draws for s in seeds]
    image = np.random.default_rng(3).uniform(size=(40, 48))
    labels = np.zeros((40, 48), dtype=np.uint8)
    labels[10:20, 10:20] = 2
    curves = [
        [*run, step, step / 10, 0.1 + step / 200 + run[4] / 50] for run in runs for step in (10, 20, 30)
    ]
    ratios = [
        [*run, layer, source, 0.5]
        for run in runs
        if run[0] == "t-imm"
        for layer in ("conv1", "conv2")
        for source in ("M1", "M2")
    ]
    learned = [
        [*run, task, dice + run[4] / 10]
        for run in runs
        if run[0] == "t-imm"
        for task, dice in (("task 1", 0.3), ("task 2", 0.2))
    ]
    fixed = [["imm-warmup", None, 0, None, None, task, 0.25] for task in ("task 1", "task 2")]
    stages = [["M1: task 1", None, 200, 25.0, 0.6, 30.2], ["Fine-tuning", counts[0], 20, 5.0, 0.5, 3.0]]
    results = Results(
        title="Study <of> initialisations & friends",
        facts=(("Seeds", "0, 1, 2"),),
        notes=("A <note>.",),
        methods={method: method.upper() for method in leads},
        longer=(),
        references=("scratch", "imm-warmup"),
        cases=_cases(runs, leads, noise),
        diagonals=pd.Series(np.arange(len(CASES)) + 100.0, index=CASES),
        runs=frame([[*run, 30, 3.0] for run in runs], [*RUN, "steps", "seconds"]),
        curves=frame(curves, [*RUN, "step", "seconds", "val_dice"]),
        ratios=frame(ratios, [*RUN, "layer", "source", "ratio"]),
        forgetting=frame([*fixed, *learned], [*RUN, "task", "dice"]),
        trainings=frame(stages, ["stage", "train_cases", "steps", "epochs", "val_dice", "seconds"]),
        labels={1: "core", 2: "oedema"},
        examples=(Example("case-00", "FLAIR", image, labels, {"T-IMM": labels}, {"T-IMM": 0.7}),),
    )
    return replace(results, **changes)


def drawn(generator, sds, design, mean=0.0):
    """Differences of two methods with such standard deviations, in the order of `Components`."""
    sets, draws, seeds, cases = design
    shapes = [
        (sets, 1, 1, 1),
        (1, draws, 1, 1),
        (sets, draws, seeds, 1),
        (1, 1, 1, cases),
        (1, draws, 1, cases),
        design,
    ]
    return mean + sum(generator.normal(0, sd, shape) for sd, shape in zip(sds, shapes, strict=True))


def frame(rows, columns):
    """A frame as the reader makes it: whole numbers that may be absent."""
    whole = {name: "Int64" for name in ("train_cases", "source_set", "draw", "seed") if name in columns}
    return pd.DataFrame(rows, columns=columns).astype(whole)


def _cases(runs, leads, noise):
    generator = np.random.default_rng(1)
    base = np.random.default_rng(0).uniform(0.3, 0.6, size=len(CASES))
    rows = []
    for run in runs:
        for case, dice in zip(CASES, base, strict=True):
            for region in REGIONS:
                value = dice + leads[run[0]] + generator.normal(0, noise)
                rows.append([*run, case, region, value, 10 * value])
    return pd.DataFrame(rows, columns=[*RUN, "case", "region", "dice", "hd95_mm"])
