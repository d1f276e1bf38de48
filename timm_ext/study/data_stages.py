"""The steps that take cases from the user's own data sets: prepared once, shared by all comparisons."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm_ext.data.formats.cases import LIST_NAME, Case, read_cases, write_list
from timm_ext.data.prepare import PrepareSettings, label_numbers, prepare_case, resolve_task
from timm_ext.data.tasks import get_task
from timm_ext.documents import read_json
from timm_ext.errors import InputError, listed
from timm_ext.files import real_path, write_json
from timm_ext.study.outcomes import CACHE, CASES, LABELS
from timm_ext.study.worker import Context

Settings = Mapping[str, Any]
Inputs = Mapping[str, Path]


def prepare_pool(settings: Settings, inputs: Inputs, context: Context) -> dict[str, Any]:
    """Prepare all cases of a data set; settings: `data`, `task`, `prepare`, `files` (their sizes by case)."""
    task = get_task(settings["task"])
    prepare = PrepareSettings(**settings["prepare"])
    cases = read_cases(settings["data"], task, require_labels=True)
    if changed := sorted({case.id for case in cases} ^ settings["files"].keys()):
        raise InputError(f"{settings['data']}: expected the cases of the plan (changed: {listed(changed)})")
    prepared = []
    for number, case in enumerate(cases, 1):
        prepared.append(prepare_case(case, task, prepare, context.folder / CACHE))
        context.report(number / len(cases))
    resolve_task(task, prepared, settings["data"])
    write_json(context.folder / LABELS, label_numbers(prepared))
    return {"cases": len(cases)}


def take_cases(settings: Settings, inputs: Inputs, context: Context) -> dict[str, Any]:
    """List some cases of a prepared data set; settings: `data`, `task`, `cases`. Input: `pool`."""
    chosen = set(settings["cases"])
    cases = [case for case in read_cases(settings["data"], get_task(settings["task"])) if case.id in chosen]
    write_list(context.folder / CASES / LIST_NAME, [_absolute(case) for case in cases])
    if (noted := inputs["pool"] / LABELS).is_file():  # of all cases, whichever are taken
        write_json(context.folder / LABELS, read_json(noted))
    link = context.folder / CACHE
    with suppress(FileExistsError):
        link.symlink_to(os.path.relpath(inputs["pool"] / CACHE, context.folder))
    return {"cases": [case.id for case in cases]}


def _absolute(case: Case) -> Case:
    images = {modality: real_path(path) for modality, path in case.images.items()}
    return replace(case, images=images, label=None if case.label is None else real_path(case.label))
