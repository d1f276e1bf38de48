"""Plans for the tests of studies, and what their steps are given and leave behind."""

import json
from pathlib import Path
from typing import Any

from timm_ext.documents import validated
from timm_ext.study.plan import StudyPlan
from timm_ext.study.schedule.runs import Run
from timm_ext.study.step import Context
from timm_ext.study.study import Study, make_study


def plan_of(**changes: Any) -> StudyPlan:
    """Return the default plan at four training cases, with changes; messages begin with `plan`."""
    values = {"train_cases": () if "fractions" in changes else (4,), **changes}
    if "methods" in changes:
        values.setdefault("references", changes["methods"][:1])
    return validated(StudyPlan, values, "plan")


def study_of(**changes: Any) -> Study:
    """Return the steps of such a plan."""
    return make_study(plan_of(**changes))


def run_of(study: Study, arm: str, seed: int | None = None) -> Run:
    """Return the first run of an arm, or that of a seed."""
    return next(run for run in study.runs if run.arm == arm and seed in (None, run.seed))


def context(folder: Path) -> Context:
    """Return what a step gets that writes into a folder and tells nobody how far it is."""
    folder.mkdir(parents=True, exist_ok=True)
    return Context(folder, lambda fraction: None)


def finished(out: Path) -> list[Path]:
    """Return the records of a study's finished steps."""
    return list(out.glob("runs/*/record.json"))


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Return every record without what depends on the clock."""
    records = {path.parent.name: json.loads(path.read_text()) for path in finished(out)}
    return {name: {**record, "seconds": None, "checksum": None} for name, record in records.items()}
