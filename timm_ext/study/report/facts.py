"""What a reader must know of a study to judge its numbers: how it was made, of which data."""

from collections.abc import Mapping

from timm_ext.data.tasks import get_task
from timm_ext.merging import unseen_modalities
from timm_ext.study.plan import StudyPlan
from timm_ext.study.schedule.runs import USUAL_TUNING
from timm_ext.study.study import Study
from timm_ext.synthesis.generate import PHANTOM
from timm_ext.training.settings import TrainSettings

Fact = tuple[str, str]

_KEPT = {
    "best": "weights of its lowest validation loss",
    "last": "weights of its last step",
    "ema": "moving average of its weights",
}


def study_facts(study: Study, environment: Mapping[str, str], seconds: float) -> tuple[Fact, ...]:
    """Say what was run, in pairs of (name, value).

    Args:
        study: its steps.
        environment: versions and machine.
        seconds: computing time of all steps.
    """
    s = study.plan
    e = environment
    return (
        ("Images", _images(s)),
        ("Source tasks", _sources(study)),
        (
            "Target task",
            f"{s.target_task}: {', '.join(map(str, study.train_cases))} training, {s.val_cases} validation, "
            f"{s.test_cases} test cases",
        ),
        *_channel_facts(s),
        ("Network", ", ".join([s.network, *(f"{name} {value}" for name, value in s.options.items())])),
        ("Training", _training(study)),
        *_option_facts(s),
        ("Seeds", ", ".join(map(str, s.seeds))),
        *([("Draws of the data", ", ".join(map(str, s.draws)))] if len(s.draws) > 1 else []),
        ("Computing time", f"{seconds:.0f} s, summed over the processes"),
        ("Made by", f"timm_ext {e['timm_ext']}, torch {e['torch']}, Python {e['python']}"),
        ("Machine", f"{e['machine']}, {e['instruction_set']} kernels"),
    )


def notes_of(study: Study) -> tuple[str, ...]:
    """Say what a reader must know of the data to judge the numbers."""
    s = study.plan
    if s.target_data or _sources_on_disk(s):
        leak = "Cases on disk are taken as they are: scans of one person in several parts would leak."
        return (leak, *study.notes)
    effects = (
        "Generated images show that the method runs and how large its effects are in this setting, not how "
        "it ranks on clinical data."
    )
    subjects = study.subjects
    if not subjects:
        return (effects, "All images are drawn from procedural phantoms; a different person in each case.")
    used = {part: len(names) for part, names in subjects.items()}
    total = len({name for names in subjects.values() for name in names})
    sources = " and ".join(str(used[f"source-{n}"]) for n in range(1, len(s.sources) + 1))
    return (
        effects,
        f"The anatomies come from {total} label maps: {sources} for the source tasks, {used['train']} for "
        f"training and validation of the target task, {used['test']} others for its test. Test cases that "
        "share an anatomy are not independent, so the p-values are too small.",
        "The held-out cases of the source tasks are new images of the anatomies they were trained on.",
    )


def _images(s: StudyPlan) -> str:
    on_disk = (["the target's"] if s.target_data else []) + (
        ["the source tasks'"] if _sources_on_disk(s) else []
    )
    anatomy = "procedural phantoms" if s.source == PHANTOM else f"label maps of {s.source}"
    origin = f"generated from {anatomy}"
    if on_disk:
        rest = "chosen" if len(on_disk) == 2 else f"the others {origin}"
        origin = f"{' and '.join(on_disk)} read from disk, {rest}"
    size = " × ".join(map(str, s.size))
    return f"{size} voxels of {s.spacing:g} mm, {origin} with data seed {s.data_seed}"


def _sources_on_disk(s: StudyPlan) -> bool:
    return any(s.data_of(number) for number in range(1, len(s.sources) + 1))


def _sources(study: Study) -> str:
    s, (steps, _, _) = study.plan, study.plan.budget(study.train_cases[0])
    told = []
    for number, (source, task) in enumerate(zip(s.sources, s.source_tasks, strict=True), 1):
        around = f", in crops around labels {', '.join(map(str, source.around))}"
        regions = f" ({', '.join(source.regions)}{around})" if source.regions else ""
        shuffled = ", labels in wrong places" * source.shuffled
        start = "" if source.after is None else f", starting from M{source.after}"
        told.append(f"M{number}: {task.name}{regions}{shuffled}{start}")
    more = f"; {s.source_sets} sets of them, of other cases, seeds and order" * (s.source_sets > 1)
    return f"{'; '.join(told)}; {s.source_cases} training cases each, {steps} steps{more}"


def _training(study: Study) -> str:
    s, (_, steps, adapting) = study.plan, study.plan.budget(study.train_cases[0])
    smallest = "" if s.epochs is None else f"; here for the smallest number of cases, of {s.epochs} epochs"
    train = {**USUAL_TUNING, **s.train}
    kept = _KEPT[train["keep"]]
    return (
        f"Adam, learning rate {s.lr:g} ({train['schedule']}), batch {s.batch_size}, {steps} steps in all; "
        f"adaptation takes {adapting} of them (logits' rate {s.logit_lr:g}); a run ends with the "
        f"{kept}; {_augmented(s)}{smallest}"
    )


def _augmented(settings: StudyPlan) -> str:
    """Say which trainings vary their images at random."""
    given = {
        "source networks": settings.source_train,
        "adaptations": settings.adapt_train,
        "fine-tuning": settings.train,
    }
    told = [name for name, values in given.items() if values.get("augment", TrainSettings.augment)]
    if len(told) == len(given):
        return "all trainings turn, scale, mirror and recolour the images at random"
    return f"images are augmented at random for {', '.join(told)} only" if told else "no augmentation"


def _option_facts(settings: StudyPlan) -> list[Fact]:
    """Say what adaptations, or single methods, do otherwise."""
    told = ["heads fitted to the training cases first"] if settings.head == "fitted" else []
    told += [f"{name} {value}" for name, value in settings.adapt.items()]
    told += [f"{method}: learning rate {lr:g}" for method, lr in settings.method_lr.items()]
    for given in (settings.method_train, settings.method_adapt, settings.method_merge):
        for method, values in given.items():
            told += [f"{method}: {name} {value}" for name, value in values.items()]
    return [("Options", "; ".join(told))] if told else []


def _channel_facts(settings: StudyPlan) -> list[Fact]:
    target = get_task(settings.target_task).modalities
    facts = []
    for number, task in enumerate(settings.source_tasks, 1):
        if own := unseen_modalities(task.modalities, target):
            facts.append(f"M{number} never saw {', '.join(own)}")
    end = ": there, transfers start with the first layer's weights of the network from scratch"
    return [("Input images", "; ".join(facts) + end)] if facts else []
