"""Settings, tasks, plans, lists and records: texts that people and programs write."""

import csv
import functools
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from fuzz import Outcome, kind, mutate

from timm_ext.config import RunSettings, load_settings, settings_to_dict, settings_to_yaml, write_settings
from timm_ext.data.formats.cases import read_cases
from timm_ext.data.tasks import TASKS, get_task, task_from_dict, task_to_dict
from timm_ext.documents import parse_json, parse_yaml, read_csv, read_json, read_text, validated
from timm_ext.interop.monai.preparation import settings_of
from timm_ext.study.outcomes import Scored, Times
from timm_ext.study.plan import StudyPlan, bundled_plans
from timm_ext.study.records import Folder
from timm_ext.study.step import Step
from timm_ext.study.study import make_study

ORGANS = {"name": "organs", "modalities": ["CT", "T1"], "regions": {"liver": [1, 2], "tumour": [2]}}
YAML_PIECES = [
    *(
        "&a ",
        "*a ",
        "<<: ",
        "!!int ",
        "!!float ",
        "!!bool ",
        "!!null ",
        "!!str ",
        "!!set ",
        "!!binary ",
        "!!seq ",
    ),
    *("!!timestamp ", "!!python/name:os.system ", "0b_", "0x", "0o9", "1:60:61", "2001-99-99", "2001-01-01 "),
    *(
        "- ",
        "? ",
        ": ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "|\n",
        ">\n",
        "'",
        '"',
        "#",
        "%YAML 1.1\n",
        "---\n",
        "...\n",
    ),
    *(
        "\n",
        "\t",
        "  ",
        ".inf",
        ".nan",
        "~",
        "yes",
        "-",
        "1e999",
        "9" * 5000,
        "[" * 2000,
        "- " * 2000,
        '"\\ud800"',
    ),
    *(
        "\\",
        "\x1b[31m",
        "\u2028",
        "\ufeff",
        "@",
        "`",
        "a: &b [*b]",
        "!<tag:yaml.org,2002:map> x",
        "!",
        "!!map ",
    ),
]
JSON_PIECES = [
    *(
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        '"',
        "\\",
        "\\u",
        '"\\ud800"',
        "NaN",
        "-Infinity",
        "1e999",
        "-",
        "01",
        ".",
    ),
    *(
        "9" * 5000,
        "[" * 5000,
        '{"a":' * 2000,
        "null",
        "true",
        '"a": 1, "a": 2',
        "\x00",
        "\ufeff",
        "\n",
        "/*x*/",
    ),
]
CSV_PIECES = [
    ",",
    ",,,,",
    '"',
    '""',
    "\n",
    "\r",
    "\r\n",
    "\x00",
    ";",
    "\ufeff",
    "id",
    "label",
    "x" * 140_000,
    " ",
    "'",
]


def spliced(rng: random.Random, text: str, pieces: list[str]) -> str:
    """Put pieces of a language into a text, or write one of nothing else."""
    if rng.random() < 0.3:
        return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 30)))
    for _ in range(rng.randint(1, 4)):
        place = rng.randint(0, len(text))
        text = text[:place] + rng.choice(pieces) + text[place + rng.choice([0, 0, 1, 5]) :]
    return text


def bomb(rng: random.Random) -> str:
    """Aliases of aliases, as items or as merges."""
    width, depth, merge = rng.randint(2, 12), rng.randint(1, 40), rng.random() < 0.5
    lines = ["a0: &a0 {k: [x, y]}"]
    for n in range(1, depth):
        inner = ", ".join([f"*a{n - 1}"] * width)
        lines.append(f"a{n}: &a{n} " + (f"{{<<: [{inner}]}}" if merge else f"[{inner}]"))
    return "\n".join(lines)


def written(rng: random.Random, path: Path, text: str) -> Path:
    """Write a text as a file, sometimes with damaged bytes or in another encoding."""
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        data = mutate.damaged(rng, data)
    elif rng.random() < 0.1:
        data = text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "cp037"]), "replace")
    path.write_bytes(data)
    return path


def dumped(rng: random.Random, tree: Any) -> str:
    """A tree as YAML or JSON; what neither can hold as the text of its repr."""
    try:
        if rng.random() < 0.5:
            return json.dumps(tree)
        return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    except (yaml.YAMLError, UnicodeError, ValueError):
        return repr(tree)


def as_it_was(read: Callable[[], Any], expected: Any) -> Outcome:
    """Read; the same value is `same`, another valid one `right`."""
    return Outcome.SAME if read() == expected else Outcome.RIGHT


@kind("yaml")
def yaml_text(rng: random.Random, folder: Path) -> Outcome:
    text = settings_to_yaml(RunSettings())
    text = bomb(rng) if rng.random() < 0.2 else spliced(rng, text, YAML_PIECES)
    value = parse_yaml(text, "text")
    json.dumps(value).encode()  # plain values, all of them
    return Outcome.RIGHT


@kind("json")
def json_text(rng: random.Random, folder: Path) -> Outcome:
    text = spliced(rng, json.dumps(settings_to_dict(RunSettings())), JSON_PIECES)
    value = parse_json(text, "text")
    assert parse_json(json.dumps(value, allow_nan=False), "text") == value
    json.dumps(value, ensure_ascii=False).encode()
    return Outcome.RIGHT


@kind("settings")
def settings_tree(rng: random.Random, folder: Path) -> Outcome:
    tree = mutate.damaged_tree(rng, settings_to_dict(RunSettings()))
    settings = load_settings(RunSettings, written(rng, folder / "settings.yaml", dumped(rng, tree)))
    write_settings(folder / "again.yaml", settings)
    assert load_settings(RunSettings, folder / "again.yaml") == settings
    return Outcome.SAME if settings == RunSettings() else Outcome.RIGHT


@kind("settings-text")
def settings_text(rng: random.Random, folder: Path) -> Outcome:
    text = spliced(rng, settings_to_yaml(RunSettings()), YAML_PIECES)
    path = written(rng, folder / "settings.yaml", text)
    return as_it_was(lambda: load_settings(RunSettings, path), RunSettings())


@kind("override")
def override(rng: random.Random, folder: Path) -> Outcome:
    sections = {name: list(values) for name, values in settings_to_dict(RunSettings()).items()}
    section = rng.choice([*sections, *mutate.ODD_NAMES])
    field = rng.choice([*sections.get(section, ["x"]), *mutate.ODD_NAMES, "a." * 500])
    value = rng.choice([*YAML_PIECES, *(repr(odd)[:6000] for odd in mutate.ODD_VALUES[:20])])
    text = rng.choice([f"{section}.{field}={value}", f"{section}={value}", f"{section}.{field}", value])
    return as_it_was(lambda: load_settings(RunSettings, None, [text]), RunSettings())


@kind("task")
def task_tree(rng: random.Random, folder: Path) -> Outcome:
    original = rng.choice([ORGANS, *map(task_to_dict, TASKS.values())])
    tree = mutate.damaged_tree(rng, original)
    path = written(rng, folder / rng.choice(["task.yaml", "task.json"]), dumped(rng, tree))
    task = get_task(path)
    assert task_from_dict(task_to_dict(task)) == task
    assert task.targets([0]).shape == (len(task.regions), 1)
    return Outcome.SAME if task == task_from_dict(original) else Outcome.RIGHT


@kind("task-text")
def task_text(rng: random.Random, folder: Path) -> Outcome:
    ending, pieces = rng.choice([("yaml", YAML_PIECES), ("json", JSON_PIECES)])
    path = written(rng, folder / f"task.{ending}", spliced(rng, json.dumps(ORGANS), pieces))
    return as_it_was(lambda: get_task(path), task_from_dict(ORGANS))


@kind("csv")
def csv_text(rng: random.Random, folder: Path) -> Outcome:
    text = "id,T1,T2,label\na,a1.nii,a2.nii,al.nii\nb,b1.nii,b2.nii,\n"
    path = written(rng, folder / "cases.csv", spliced(rng, text, CSV_PIECES))
    rows = read_csv(path)
    assert all(cell.strip() for row in rows for cell in row.cells.values())
    return Outcome.RIGHT


@kind("case-list")
def case_list(rng: random.Random, folder: Path) -> Outcome:
    rows = [{"id": name, "CT": f"{name}.nii", "T1": f"{name}.nii", "label": f"{name}.nii"} for name in "ab"]
    for name in "ab":
        (folder / f"{name}.nii").touch()
    tree = mutate.damaged_tree(rng, rows)
    if rng.random() < 0.5:
        path = written(rng, folder / "list.json", dumped(rng, tree))
    else:
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(["id", "CT", "T1", "label"])
        table.writerows(
            [str(v) for v in row.values()] if isinstance(row, dict) else [str(row)] for row in tree
        )
        path = written(rng, folder / "list.csv", text.getvalue())
    cases = read_cases(path, task_from_dict(ORGANS))
    assert all(image.is_file() for case in cases for image in case.images.values())
    return Outcome.RIGHT


@kind("bids")
def bids_tables(rng: random.Random, folder: Path) -> Outcome:
    for name in ("sub-1_CT", "sub-1_T1w", "sub-1_run-1_dseg", "sub-1_run-2_dseg")[: rng.randint(2, 4)]:
        if rng.random() < 0.2:
            name = mutate.damaged(rng, name.encode()).decode("latin-1").replace("/", "_").replace("\0", "_")
        (folder / "sub-1" / "anat").mkdir(parents=True, exist_ok=True)
        (folder / "sub-1" / "anat" / f"{name}.nii.gz").touch()
    for name, rows in (("dseg", ["index", 1, 2]), ("participants", ["participant_id", "sub-1", "sub-2"])):
        table = [[row, second] for row, second in zip(rows, ["name", "liver", "tumour"], strict=True)]
        tree = mutate.damaged_tree(rng, table)
        lines = ["\t".join(map(str, row)) if isinstance(row, list) else str(row) for row in tree]
        written(rng, folder / f"{name}.tsv", "\n".join(lines))
    cases = read_cases(folder, task_from_dict(ORGANS))
    assert all(image.is_file() for case in cases for image in case.images.values())
    return Outcome.RIGHT


@functools.cache
def smoke_plan() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(bundled_plans()["smoke"].read_text(encoding="utf-8"))
    return values


@kind("plan")
def plan_tree(rng: random.Random, folder: Path) -> Outcome:
    tree = mutate.damaged_tree(rng, smoke_plan())
    plan = load_settings(StudyPlan, written(rng, folder / "plan.yaml", dumped(rng, tree)))
    study = make_study(plan)
    assert len({step.digest for step in study.steps}) == len(study.steps)
    return Outcome.RIGHT


RUN = {
    "scores": {"case-1": {"WT": 0.5, "TC": None}, "case-2": {"WT": 1.0, "TC": 0.0}},
    "hd95": {"case-1": {"WT": 2.5, "TC": None}, "case-2": {"WT": 0.0, "TC": 1.0}},
    "curve": [[1, 0.5], [2, 0.25]],
    "steps": 2,
    "best_step": 1,
    "stopped": False,
}
STEP = Step(name="run-scratch-seed0", needs={"train": Step(name="cases")})


@kind("record")
def record(rng: random.Random, folder: Path) -> Outcome:
    """A record with its checksum: read as it was, or refused."""
    study = Folder(folder)
    study.write_record(STEP, RUN, seconds=1.5, environment={"torch": "2"})
    path = study.run_path(STEP) / "record.json"
    good = study.record(STEP), study.outcome(STEP, Scored)
    tree = json.loads(path.read_text())
    text = dumped(rng, mutate.damaged_tree(rng, tree)) if rng.random() < 0.5 else None
    written(rng, path, spliced(rng, json.dumps(tree), JSON_PIECES) if text is None else text)
    assert (study.record(STEP), study.outcome(STEP, Scored)) == good
    return Outcome.SAME


@kind("times")
def times(rng: random.Random, folder: Path) -> Outcome:
    study = Folder(folder)
    path = study.run_path(STEP) / "times.json"
    path.parent.mkdir(parents=True)
    tree = {"seconds": 2.5, "validations": [[1, 0.5], [2, 2.25]]}
    written(rng, path, dumped(rng, mutate.damaged_tree(rng, tree)))
    read = study.notes(STEP, "times.json", Times)
    assert read is not None
    assert all(
        isinstance(value, float) for value in (read.seconds, *(second for _, second in read.validations))
    )
    return Outcome.RIGHT


@kind("no-file")
def no_file(rng: random.Random, folder: Path) -> Outcome:
    os.mkfifo(folder / "pipe.json")
    name = rng.choice(
        [".", "pipe.json", "a\0b", "a\ud800", "x" * 300, "x/" * 3000, "absent.csv", "/dev/zero"]
    )
    path = folder / name if rng.random() < 0.5 or name.startswith("/") else Path(name)
    read = rng.choice([read_text, read_json, read_csv, lambda p: load_settings(RunSettings, p), get_task])
    read(path)
    raise AssertionError(f"{path} was read")


BUNDLE = {
    "image": "image",
    "size": [96, 96, 96],
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "@image"},
            {"_target_": "Orientationd", "keys": "@image", "axcodes": "RAS"},
            {
                "_target_": "Spacingd",
                "keys": ["@image", "label"],
                "pixdim": [1.5, 1.5, 2.0],
                "mode": ["bilinear"],
            },
            {
                "_target_": "ScaleIntensityRanged",
                "a_min": -57,
                "a_max": 164,
                "b_min": 0,
                "b_max": 1,
                "clip": True,
            },
            {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
            {"_target_": "CropForegroundd", "keys": "@image", "source_key": "@image", "margin": 0},
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": "@size", "overlap": 0.5},
}


@kind("bundle-preprocessing")
def bundle_tree(rng: random.Random, folder: Path) -> Outcome:
    config = mutate.damaged_tree(rng, BUNDLE)
    config = config if isinstance(config, dict) else {}
    parts = (config.get("preprocessing"), config.get("inferer"))
    values, notes = settings_of(config, parts, ["CT"], 1, "config")
    assert all(isinstance(note, str) for note in notes)
    validated(RunSettings, values, "config")
    return Outcome.RIGHT
