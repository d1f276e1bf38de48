"""The steps of a study: each a function of settings and of the folders of the steps it needs.

They call what a user's own script would call; `timm_ext.study.worker` runs them.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from timm_ext.data.dataset import CaseDataset
from timm_ext.data.formats.cases import read_cases
from timm_ext.data.prepare import Prepared, PrepareSettings, label_numbers, prepare_case, prepare_cases
from timm_ext.data.tasks import Task, get_task, task_from_dict, task_to_dict
from timm_ext.documents import read_json, validated
from timm_ext.files import write_json
from timm_ext.fisher import estimate_fisher, remove_partial
from timm_ext.inference import labels_from_probabilities, predict_case, predict_probabilities
from timm_ext.merging import MergedModel, fit_to_target
from timm_ext.metrics import Scores, dice_by_region, evaluate_pairs
from timm_ext.networks.io import load_network, save_network
from timm_ext.networks.registry import input_layers_of
from timm_ext.parameters import named_parameters
from timm_ext.study.arms import Combination, JointTransfer, get_row
from timm_ext.study.outcomes import (
    CACHE,
    CASES,
    FISHER,
    INITIAL,
    LABELS,
    NETWORK,
    PREDICTIONS,
    TIMES,
    TRAINING,
)
from timm_ext.study.worker import Context
from timm_ext.synthesis.generate import GenerateSettings, generate_cases
from timm_ext.synthesis.render import SynthesisSettings
from timm_ext.synthesis.tumour import TumourSettings
from timm_ext.training.callbacks import Report
from timm_ext.training.examples import Data
from timm_ext.training.history import History
from timm_ext.training.settings import TrainSettings
from timm_ext.training.state import STATE_NAME
from timm_ext.transfer.adapt import AdaptSettings
from timm_ext.transfer.arms import Arm
from timm_ext.transfer.sources import Sources, load_sources
from timm_ext.transfer.stages import adapt, fine_tune, make_sets, train, tune_merged, warm_up
from timm_ext.transfer.start import Recipe, in_order, network_of, new_network, split_by, start_from

Settings = Mapping[str, Any]
Inputs = Mapping[str, Path]


def make_cases(settings: Settings, inputs: Inputs, context: Context) -> dict[str, Any]:
    """Generate cases as NIfTI files and prepare them; settings: `generate`, `count`, `prepare`."""
    given = settings["generate"]
    generate = GenerateSettings(
        **{
            **_tuples(given),
            "synthesis": SynthesisSettings(**_tuples(given["synthesis"])),
            "tumour": TumourSettings(**_tuples(given["tumour"])),
        }
    )
    cases = generate_cases(
        context.folder / CASES,
        generate,
        settings["count"],
        progress=lambda done, count: context.report(0.9 * done / count),
    )
    task = get_task(generate.task)
    prepared = prepare_cases(
        cases, task, _prepare_settings(settings), context.folder / CACHE, workers=0, progress=False
    )
    write_json(context.folder / LABELS, label_numbers(prepared))
    return {"cases": [case.id for case in cases]}


def train_source(settings: Settings, inputs: Inputs, context: Context) -> dict[str, Any]:
    """Train a source network, from scratch or starting from an earlier one.

    Settings: `task` (its name or all of it), `network`, `prepare`, `train`, `recipe`. Inputs: `train` and
    `test`, or `train-1` …, `test-1` … for the cases of several tasks, and `parent` for a start by transfer.
    """
    task = settled_task(settings, inputs)
    recipe = Recipe(**settings["recipe"])
    network = settings["network"]
    model = new_network(network["name"], network["options"], task, recipe.seed)
    parents: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    if "parent" in inputs:
        sources = load_sources([inputs["parent"] / NETWORK], names=["parent"])
        start = start_from("transfer-1", model, task, sources, recipe)
        model, parents, shared = start.model, sources.hashes, start.split.shared
    train_cases, test_cases = (
        [case for role in roles for case in prepared_cases(inputs[role], task, settings)]
        for roles in ([role for role in inputs if role.startswith(part)] for part in ("train", "test"))
    )
    schedule = train_settings(settings)
    history = train(
        channels_last(model),
        make_sets(train_cases, test_cases, task, schedule),
        schedule,
        context.folder / TRAINING,
        tied=shared,
        callbacks=[Report(context.report)],
        resume=True,
    )
    save_result(context.folder / NETWORK, model, task, settings, parents)
    return _told(history, context)


def source_fisher(settings: Settings, inputs: Inputs, context: Context) -> dict[str, Any]:
    """Estimate a source network's Fisher on its training cases; settings: `task`, `prepare`, `fisher`."""
    task = settled_task(settings, inputs)
    model, checkpoint = load_network(inputs["model"] / NETWORK)
    cases = prepared_cases(inputs["train"], task, settings)
    data = CaseDataset(cases, task, in_memory=True)
    begun = context.folder / "partial"
    fisher = estimate_fisher(_placed(model, settings), data, **settings["fisher"], partial=begun)
    fisher.save(
        context.folder / FISHER,
        network_sha256=checkpoint.sha256,
        task=task_to_dict(task),
        settings=dict(settings["fisher"]),
    )
    remove_partial(begun)
    return {"examples": fisher.count, "kind": fisher.kind.value}


def adapt_start(settings: Settings, inputs: Inputs, context: Context) -> dict[str, Any]:
    """Train what a method trains before fine-tuning, and save the plain network that results.

    Settings: `task`, `method`, `prepare`, `recipe`, `train`, `logit_lr`, `adapt`. Inputs: `model-1` …,
    `fisher-1` …, `train`, `val`.
    """
    task = settled_task(settings, inputs)
    sources = _sources(inputs)
    recipe = Recipe(**settings["recipe"])
    start = start_from(settings["method"], network_of(sources, task, recipe.seed), task, sources, recipe)
    schedule = train_settings(settings)
    data, folder = _target_data(inputs, task, settings, schedule), context.folder / TRAINING
    watch = [Report(context.report)]
    options = _adapt_settings(settings)
    facts: dict[str, Any] = {}
    if isinstance(start.model, MergedModel):
        adaptation = adapt(start.model, data, schedule, folder, options=options, callbacks=watch, resume=True)
        history, network = adaptation.history, start.model.fold()
        facts = adaptation.outcome()
        save_result(
            context.folder / INITIAL, network, task, settings, sources.hashes, start.model.provenance()
        )
    else:
        network, schedule = start.model, replace(schedule, lr=options.specific_lr or schedule.lr)
        history = warm_up(network, start.split.specific, data, schedule, folder, callbacks=watch, resume=True)
        save_result(
            context.folder / INITIAL, network, task, settings, sources.hashes, {"method": settings["method"]}
        )
    return {**_told(history, context), **facts}


def tune_and_test(settings: Settings, inputs: Inputs, context: Context) -> dict[str, Any]:
    """Fine-tune an initialisation, segment the test cases and score them.

    Settings: `task`, `method`, `network`, `prepare`, `recipe`, `train`, and where ratios are learned on the
    way `logit_lr`, `adapt`. Inputs: `start` (an adaptation) or, without one, `model-1` …, `fisher-1` …; and
    `train`, `val`, `test`.
    """
    task = settled_task(settings, inputs)
    network, parents = _initial_network(settings, inputs, context, task)
    arm = _arm(settings["method"])
    schedule = train_settings(settings)
    data, folder = _target_data(inputs, task, settings, schedule), context.folder / TRAINING
    watch = [Report(context.report)]
    facts: dict[str, Any] = {}
    if isinstance(network, MergedModel):
        options = _adapt_settings(settings)
        network, done = tune_merged(
            network, data, schedule, folder, options=options, callbacks=watch, resume=True
        )
        history, facts = done.history, done.outcome()
    else:
        shared = split_by(network, arm.merge, Recipe(**settings["recipe"])).shared if arm.merge.models else ()
        network, history = fine_tune(
            channels_last(network), data, schedule, folder, tied=shared, callbacks=watch, resume=True
        )
    save_result(context.folder / NETWORK, network, task, settings, parents)
    scores = segment_and_score(network, inputs["test"], task, settings, context.folder)
    return {**_told(history, context), **facts, **scores}


def forgetting(settings: Settings, inputs: Inputs, context: Context) -> dict[str, Any]:
    """Score initialisations on the source tasks.

    The merged weights are put into each source network (aligned, if the method aligns), which keeps its own
    heads and norms; input channels are matched by modality.

    Settings: `methods`, `tasks`, `prepare`, `recipe`, `adapted` (title of an input → method). Inputs:
    `model-1` …, `fisher-1` …, `test-1` …, and the adaptations.
    """
    sources = _sources(inputs)
    recipe = Recipe(**settings["recipe"])
    wanted: list[tuple[str, str, Path | None]] = [(name, name, None) for name in settings["methods"]]
    for role, method in settings["adapted"].items():
        wanted.append((role, method, inputs[role]))
    table: dict[str, dict[str, float]] = {}
    for number, (role, method, adapted) in enumerate(wanted):
        table[role] = {
            task.name: _mean_dice(
                _placed(_in_source(_arm(method), sources, index, recipe, adapted), settings),
                prepared_cases(inputs[f"test-{index + 1}"], task, settings),
                task,
            )
            for index, task in enumerate(sources.tasks)
        }
        context.report((number + 1) / len(wanted))
    return {"dice": table}


def _tuples(values: Settings) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _prepare_settings(settings: Settings) -> PrepareSettings:
    return PrepareSettings(**_tuples(settings["prepare"]))


def train_settings(settings: Settings) -> TrainSettings:
    """Return the settings of a training from those of its step."""
    return TrainSettings(**_tuples(settings["train"]))


def settled_task(settings: Settings, inputs: Inputs) -> Task:
    """Return a step's task, `settings["task"]`, with the label numbers of the data sets its cases are from.

    Raises:
        InputError: the data sets number a region in two ways.
    """
    told = settings["task"]
    task = get_task(told) if isinstance(told, str) else task_from_dict(told)
    noted = [folder / LABELS for folder in inputs.values() if (folder / LABELS).is_file()]
    numbers = {number for path in noted for number in validated(list[int], read_json(path), path)}
    return task.resolve(numbers, "the cases of the study")


def prepared_cases(folder: Path, task: Task, settings: Settings) -> list[Prepared]:
    """Return the prepared cases of the step with this folder."""
    cases = read_cases(folder / CASES, task, require_labels=True)
    return [prepare_case(case, task, _prepare_settings(settings), folder / CACHE) for case in cases]


def _adapt_settings(settings: Settings) -> AdaptSettings:
    return AdaptSettings(logit_lr=settings["logit_lr"], **settings.get("adapt", {}))


def _target_data(inputs: Inputs, task: Task, settings: Settings, schedule: TrainSettings) -> Data:
    train_cases, val_cases = (prepared_cases(inputs[part], task, settings) for part in ("train", "val"))
    return make_sets(train_cases, val_cases, task, schedule)


def _sources(inputs: Inputs) -> Sources:
    count = sum(role.startswith("model-") for role in inputs)
    models = [inputs[f"model-{number}"] / NETWORK for number in range(1, count + 1)]
    fishers = [inputs[role] / FISHER for n in range(1, count + 1) if (role := f"fisher-{n}") in inputs]
    return load_sources(models, fishers, names=[f"M{number}" for number in range(1, count + 1)])


def _initial_network(
    settings: Settings, inputs: Inputs, context: Context, task: Task
) -> tuple[nn.Module, Sequence[str]]:
    """Return the network that fine-tuning starts from, and the hashes of its parents."""
    if "start" in inputs:
        network, checkpoint = load_network(inputs["start"] / INITIAL)
        return network, [str(checkpoint.sha256)]
    recipe = Recipe(**settings["recipe"])
    target = new_network(settings["network"]["name"], settings["network"]["options"], task, recipe.seed)
    arm = _arm(settings["method"])
    if not arm.merge.models:
        return target, []
    sources = _sources(inputs)
    network = start_from(arm, target, task, sources, recipe).model
    facts = {"method": settings["method"]}
    plain = network.fold() if isinstance(network, MergedModel) else network
    save_result(context.folder / INITIAL, plain, task, settings, sources.hashes, facts)
    return network, sources.hashes


def _arm(name: str) -> Arm:
    row = get_row(name)
    assert not isinstance(row, Combination)
    return row.arm if isinstance(row, JointTransfer) else row


def channels_last(network: nn.Module) -> nn.Module:
    """Store weights with the channels last, as the convolutions of a CPU take them."""
    last: torch.memory_format = torch.channels_last_3d
    return network.to(memory_format=last)  # type: ignore[call-overload, no-any-return]


def save_result(
    path: Path,
    network: nn.Module,
    task: Task,
    settings: Settings,
    parents: Sequence[str],
    merge: Mapping[str, Any] | None = None,
) -> None:
    """Write a network with its task, parents and settings, and where it was merged, how."""
    kind = "network" if merge is None else "merged"
    facts = {} if merge is None else {"merge": dict(merge)}
    save_network(
        path, network, task=task_to_dict(task), parents=parents, settings=dict(settings), kind=kind, **facts
    )


def segment_and_score(
    network: nn.Module, cases: Path, task: Task, settings: Settings, folder: Path
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Write a label map for every test case and return its Dice (`scores`) and HD95 by case and region."""
    pairs = {}
    for case in read_cases(cases / CASES, task, require_labels=True):
        path = folder / PREDICTIONS / f"{case.id}.nii.gz"
        predict_case(network, replace(case, label=None), task, _prepare_settings(settings), path)
        pairs[case.id] = (path, cast(Path, case.label))
    evaluation = evaluate_pairs(pairs, task, folder)
    return {
        key: {case: _one(scores, metric) for case, scores in evaluation.cases.items()}
        for key, metric in (("scores", "dice"), ("hd95", "hd95"))
    }


def _one(scores: Scores, metric: str) -> dict[str, float | None]:
    return {region: score[metric] for region, score in scores.items()}


def _in_source(arm: Arm, sources: Sources, index: int, recipe: Recipe, adapted: Path | None) -> nn.Module:
    """Return source network `index` with its shared weights replaced by the merge.

    Args:
        arm: of the merge.
        sources: the source networks.
        index: of the one.
        recipe: of the merge.
        adapted: folder of the adaptation; None for arms without one.
    """
    sources = in_order(sources, arm.merge, recipe)
    network, task = sources.networks[index], sources.tasks[index]
    if adapted is None:
        return start_from(arm, network, task, sources, recipe).model
    merged, checkpoint = load_network(adapted / INITIAL)
    tensors, _ = fit_to_target(
        named_parameters(merged),
        None,
        own=named_parameters(network),
        source_modalities=task_from_dict(checkpoint.metadata["task"], where=adapted).modalities,
        target_modalities=task.modalities,
        input_layers=input_layers_of(network),
    )
    result = copy.deepcopy(network)
    parameters = named_parameters(result)
    with torch.no_grad():
        for name in split_by(network, arm.merge, recipe).shared:
            parameters[name].copy_(tensors[name])
    return result


def _mean_dice(network: nn.Module, cases: Sequence[Prepared], task: Task) -> float:
    """Return the mean Dice over cases and regions on the prepared grid."""
    values: list[float] = []
    for case in cases:
        probabilities = predict_probabilities(network, torch.from_numpy(case.image.copy()))
        assert case.label is not None
        labels = labels_from_probabilities(probabilities, task)
        values += dice_by_region(labels, case.label, task).values()
    return sum(values) / len(values)


def _placed(network: nn.Module, settings: Settings) -> nn.Module:
    """Move a network to where the plan computes."""
    wanted = settings.get("accelerator", "cpu")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted in ("auto", "gpu") else wanted
    return network.to(device)


def _told(history: History, context: Context) -> dict[str, Any]:
    """Return what a training was, put the times beside it, and remove its state.

    Times are no result: they go to a file of their own. The state is as large as three networks.
    """
    write_json(
        context.folder / TIMES, {"seconds": round(history.seconds, 3), "validations": list(history.times)}
    )
    (context.folder / TRAINING / STATE_NAME).unlink(missing_ok=True)
    return {
        "curve": history.curve("val_dice"),
        "steps": len(history.rows),
        "best_step": history.best_step,
        "stopped": history.stopped,
    }
