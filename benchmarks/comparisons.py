"""Makes the comparisons of recorded studies again, from the recorded scores of their cases.

    python -m benchmarks.comparisons

Every folder of benchmarks/results that holds `cases.csv` gets its `comparisons.csv` and, where it has them,
its `region-comparisons.csv`, as the report of a study makes them.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.pages.tables import RESULTS
from timm_ext.documents import read_yaml, validated
from timm_ext.study.plan import StudyPlan, bundled_plans
from timm_ext.study.report.results import METRICS, RUN, Results
from timm_ext.study.report.tables import comparison_table, write_tables

PLANS = {"study/small": "small", "demo": "demo", "demo-label-maps": "demo"}
"""Folders, and the plans that name their references and the size of their scans."""


def recorded(folder: Path, plan: StudyPlan) -> Results:
    """Return the results of a study as far as its recorded scores tell them."""
    cases = pd.read_csv(folder / "cases.csv")
    cases = cases.assign(**{name: 0 for name in RUN if name not in cases})
    # A generated scan has the plan's size.
    diagonal = float(np.linalg.norm(plan.size)) * plan.spacing
    names = cases["method"].unique().tolist()
    nothing = pd.DataFrame()
    return Results(
        title=plan.title,
        facts=(),
        notes=(),
        methods={name: name for name in names},
        longer=(),
        references=plan.references,
        cases=cases,
        diagonals=pd.Series(diagonal, index=cases["case"].unique()),
        runs=nothing,
        curves=nothing,
        ratios=nothing,
        forgetting=nothing,
        trainings=nothing,
    )


def comparisons(name: str) -> dict[str, pd.DataFrame]:
    """Return the tables of comparisons of a folder by the names of their files."""
    folder, path = RESULTS / name, bundled_plans()[PLANS[name]]
    results = recorded(folder, validated(StudyPlan, read_yaml(path)[0], path))
    wanted = {
        "comparisons": [("dice", None)],
        "region-comparisons": [(metric, region) for metric in METRICS for region in results.regions],
    }
    there = {table: rows for table, rows in wanted.items() if (folder / f"{table}.csv").is_file()}
    return {table: comparison_table(results, rows) for table, rows in there.items()}


if __name__ == "__main__":
    for name in PLANS:
        write_tables(comparisons(name), RESULTS / name)
