"""The steps that provide cases: generated ones, or shares of data sets on disk."""

import os
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

from timm_ext.data.formats.cases import LIST_NAME, Case, read_cases, write_list
from timm_ext.data.prepare import PrepareSettings, label_numbers, prepare_case, prepare_cases, resolve_task
from timm_ext.data.tasks import get_task
from timm_ext.documents import read_json
from timm_ext.errors import InputError, listed
from timm_ext.files import real_path, write_json
from timm_ext.study.outcomes import CACHE, CASES, LABELS
from timm_ext.study.step import Context, Inputs, Step
from timm_ext.synthesis.generate import GenerateSettings, generate_cases


class MakeCases(Step):
    """Generates cases as NIfTI files and prepares them.

    Attributes:
        generate: what they are.
        count: how many.
        prepare: how they are prepared.
        label_maps: name → SHA-256 of those that they are drawn from.
    """

    kind: ClassVar[str] = "generate cases"

    generate: GenerateSettings
    count: int
    prepare: PrepareSettings
    label_maps: dict[str, str]

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Return the ids of the cases."""
        cases = generate_cases(
            context.folder / CASES,
            self.generate,
            self.count,
            on_progress=lambda done, count: context.report(0.9 * done / count),
        )
        task, cache = get_task(self.generate.task), context.folder / CACHE
        prepared = prepare_cases(cases, task, self.prepare, cache, workers=0, progress=False)
        write_json(context.folder / LABELS, label_numbers(prepared))
        return {"cases": [case.id for case in cases]}


class PreparePool(Step):
    """Prepares all cases of a data set, once for all comparisons.

    Attributes:
        data: the data set.
        task: that its cases are for.
        prepare: how they are prepared.
        files: case → sizes of its files in bytes: other files are another question.
    """

    kind: ClassVar[str] = "prepare data sets"

    data: str
    task: str
    prepare: PrepareSettings
    files: dict[str, dict[str, int]]

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Return the number of cases."""
        task = get_task(self.task)
        cases = read_cases(self.data, task, require_labels=True)
        if changed := sorted({case.id for case in cases} ^ self.files.keys()):
            raise InputError(f"{self.data}: expected the cases of the plan (changed: {listed(changed)})")
        prepared = []
        for number, case in enumerate(cases, 1):
            prepared.append(prepare_case(case, task, self.prepare, context.folder / CACHE))
            context.report(number / len(cases))
        resolve_task(task, prepared, self.data)
        write_json(context.folder / LABELS, label_numbers(prepared))
        return {"cases": len(cases)}


class TakeCases(Step):
    """Lists some cases of a prepared data set; needs it as `pool`.

    Attributes:
        data: the data set.
        task: that its cases are for.
        cases: ids of those that are taken.
    """

    kind: ClassVar[str] = "choose cases"

    data: str
    task: str
    cases: tuple[str, ...]

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Return the ids of the cases."""
        pool = inputs["pool"]
        cases = [case for case in read_cases(self.data, get_task(self.task)) if case.id in self.cases]
        write_list(context.folder / CASES / LIST_NAME, [_absolute(case) for case in cases])
        if (noted := pool / LABELS).is_file():  # of all cases, whichever are taken
            write_json(context.folder / LABELS, read_json(noted))
        link = context.folder / CACHE
        with suppress(FileExistsError):
            link.symlink_to(os.path.relpath(pool / CACHE, context.folder))
        return {"cases": [case.id for case in cases]}


def _absolute(case: Case) -> Case:
    images = {modality: real_path(path) for modality, path in case.images.items()}
    return replace(case, images=images, label=None if case.label is None else real_path(case.label))
