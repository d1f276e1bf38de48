"""The step that combines fine-tuned networks of one seed: a comparison row that costs several trainings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from timm_ext.data.dataset import CaseDataset
from timm_ext.documents import read_json, validated
from timm_ext.files import write_json
from timm_ext.merging import LogitEnsemble, uniform_soup
from timm_ext.networks.io import load_network
from timm_ext.study.arms import Combination, get_row
from timm_ext.study.outcomes import NETWORK, TIMES, Times, Training
from timm_ext.study.records import RECORD, read_record
from timm_ext.study.stages import (
    prepared_cases,
    save_result,
    segment_and_score,
    settled_task,
    train_settings,
)
from timm_ext.study.worker import Context
from timm_ext.training.device import launch
from timm_ext.training.objective import soft_dice_loss
from timm_ext.training.validation import validate

Settings = Mapping[str, Any]
Inputs = Mapping[str, Path]


def combine_and_test(settings: Settings, inputs: Inputs, context: Context) -> dict[str, Any]:
    """Combine fine-tuned networks, validate once, segment the test cases and score them.

    Its steps and its time of training are the sums of the members'.

    Settings: `task`, `method`, `prepare`, `train` (of the members). Inputs: `member-1` …, `val`, `test`.
    """
    task = settled_task(settings, inputs)
    members = [folder for role, folder in sorted(inputs.items()) if role.startswith("member-")]
    loaded = [load_network(member / NETWORK) for member in members]
    networks = [network for network, _ in loaded]
    parents = [str(checkpoint.sha256) for _, checkpoint in loaded]
    row = get_row(settings["method"])
    assert isinstance(row, Combination)
    combined: nn.Module
    if row.mean_of == "weights":
        combined = uniform_soup(networks)
        save_result(context.folder / NETWORK, combined, task, settings, parents)
    else:
        combined = LogitEnsemble(networks)
    schedule = train_settings(settings)
    fabric = launch(schedule)
    val_set = CaseDataset(prepared_cases(inputs["val"], task, settings), task, in_memory=True)
    regions = len(task.regions)
    validation = validate(fabric, combined.to(fabric.device), val_set, regions, soft_dice_loss(), schedule)
    context.report(0.3)
    scores = segment_and_score(combined, inputs["test"], task, settings, context.folder)
    steps = sum(_steps(member / RECORD) for member in members)
    seconds = sum(validated(Times, read_json(member / TIMES), member / TIMES).seconds for member in members)
    write_json(context.folder / TIMES, {"seconds": seconds, "validations": [[steps, seconds]]})
    return {"curve": [[steps, validation.mean_dice]], "steps": steps, "best_step": steps, **scores}


def _steps(path: Path) -> int:
    return validated(Training, read_record(path).result, path).steps or 0
