"""Commands with what cannot be what they want: paths of every odd kind, and numbers beyond all bounds."""

import contextlib
import functools
import io
import os
import random
from pathlib import Path

from fuzz import Outcome, kind, scratch

from timm_ext.cli import run
from timm_ext.errors import InputError
from timm_ext.networks import build_network, save_network

NUMBERS = [
    "-1",
    "0",
    "1e9",
    "1000000000",
    "9" * 30,
    "-" + "9" * 30,
    "nan",
    "inf",
    "x",
    "",
    "1e400",
    "0x10",
    "[1]",
]
COMMANDS = [
    ["info", "PATH"],
    ["train", "PATH", "--out", "OUT"],
    ["train", "CASES", "--task", "PATH", "--out", "OUT"],
    ["train", "CASES", "--init", "PATH", "--out", "OUT"],
    ["train", "CASES", "--config", "PATH", "--out", "OUT"],
    ["train", "CASES", "--out", "PATH"],
    ["fisher", "PATH", "CASES", "--out", "OUT"],
    ["fisher", "NETWORK", "PATH", "--out", "OUT"],
    ["merge", "PATH", "NETWORK", "--task", "brats", "--out", "OUT"],
    ["merge", "PATH", "NETWORK", "--ratios", "0.5,0.5", "--out", "OUT"],
    [
        "merge",
        "NETWORK",
        "NETWORK",
        "--method",
        "mode-imm",
        "--fisher",
        "PATH",
        "--fisher",
        "PATH",
        "--out",
        "OUT",
    ],
    [
        "adapt",
        "NETWORK",
        "NETWORK",
        "--fisher",
        "PATH",
        "--fisher",
        "PATH",
        "--data",
        "CASES",
        "--out",
        "OUT",
    ],
    ["adapt", "NETWORK", "PATH", "--data", "CASES", "--task", "brats", "--out", "OUT"],
    ["predict", "NETWORK", "PATH", "--out", "OUT"],
    ["predict", "PATH", "CASES", "--out", "OUT"],
    ["predict", "NETWORK", "--image", "T1=PATH", "--image", "T2=PATH", "--out", "OUT"],
    ["evaluate", "PATH", "PATH"],
    ["evaluate", "PATH", "CASES"],
    ["phantom", "OUT", "--label-maps", "PATH"],
    ["phantom", "PATH", "--count", "1"],
    ["phantom", "OUT", "--task", "PATH"],
    ["prepare", "PATH", "--cache", "OUT"],
    ["study", "PATH", "--out", "OUT"],
    ["study", "smoke", "--out", "OUT", "--label-maps", "PATH"],
]
COUNTED = [
    ["phantom", "OUT", "--count", "NUMBER", "--seed", "NUMBER"],
    ["phantom", "OUT", "--spacing", "NUMBER"],
    ["phantom", "OUT", "--size", "NUMBER", "NUMBER", "NUMBER"],
    ["phantom", "OUT", "--workers", "NUMBER", "--spacing", "100"],
    ["train", "CASES", "--out", "OUT", "--val-share", "NUMBER"],
    ["train", "CASES", "--out", "OUT", "--workers", "NUMBER"],
    ["fisher", "NETWORK", "CASES", "--out", "OUT", "--limit", "NUMBER"],
    ["merge", "NETWORK", "NETWORK", "--ratios", "NUMBER,NUMBER", "--out", "OUT", "--shard-size", "NUMBER"],
    ["demo", "--out", "OUT/x", "--seeds", "NUMBER", "--workers", "NUMBER", "--label-maps", "CASES"],
    [
        "study",
        "smoke",
        "--out",
        "OUT",
        "--workers",
        "NUMBER",
        "--set",
        "size=[NUMBER,8,8]",
        "--set",
        "steps=NUMBER",
    ],
    *(
        ["train", "CASES", "--out", "OUT", "--set", f"{name}=NUMBER"]
        for name in (
            "train.batch_size",
            "train.steps",
            "train.seed",
            "train.lr",
            "train.workers",
            "train.devices",
        )
    ),
    *(
        ["prepare", "CASES", "--cache", "OUT", "--set", f"prepare.{name}=NUMBER"]
        for name in ("spacing", "size", "margin", "multiple")
    ),
]


@functools.cache
def network() -> Path:
    """A network of two inputs and seven outputs, which names no task."""
    path = scratch() / "network.safetensors"
    save_network(path, build_network("isensee2017", in_channels=2, out_channels=7, base_filters=2, levels=2))
    return path


def odd_path(rng: random.Random, folder: Path) -> str:
    """A path that holds nothing that a command could want."""
    (folder / "empty.json").touch()
    (folder / "empty.nii.gz").touch()
    (folder / "empty.safetensors").touch()
    (folder / "folder.yaml").mkdir()
    (folder / "text.csv").write_text("nothing, of, use\n1,2,3\n")
    (folder / "loop.pt").symlink_to(folder / "loop.pt")
    for ending in ("json", "nii", "safetensors", "yaml"):
        os.mkfifo(folder / f"pipe.{ending}")
    names = [entry.name for entry in os.scandir(folder) if entry.name not in ("cases", "out")]
    names += [
        "absent",
        "absent.pt",
        "x" * 300,
        "x" * 300 + ".json",
        "y/" * 3000 + "a.yaml",
        "a\0b",
        "a\0.json",
    ]
    names += [
        "a\ud800",
        "/dev/zero",
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "[/bold].nii.gz",
        "\x1b[31m.json",
        "",
    ]
    name = rng.choice(sorted(names))
    return name if not name or name.startswith("/") else str(folder / name)


def told(arguments: list[str]) -> str:
    """Run a command and return its error line; nothing if it worked."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = run(arguments)
    text = errors.getvalue().removesuffix("\n")
    if status == 0:
        return ""
    assert status in (1, 2), f"status {status}: {text[-500:]!r} of {arguments!r}"
    assert "run again with --debug" not in text, text[-500:]
    return text.removeprefix("error: ")


def filled(rng: random.Random, folder: Path, command: list[str], odd: dict[str, str]) -> list[str]:
    cases = folder / "cases"
    cases.mkdir()
    places = {"CASES": str(cases), "NETWORK": str(network()), "OUT": str(folder / "out"), **odd}
    arguments = []
    for argument in command:
        for name, value in places.items():
            argument = argument.replace(name, value)
        arguments.append(argument)
    return arguments


@kind("command-paths", seconds=20)
def command_paths(rng: random.Random, folder: Path) -> Outcome:
    path = odd_path(rng, folder)
    arguments = filled(rng, folder, rng.choice(COMMANDS), {"PATH": path})
    if error := told(arguments):
        raise InputError(error)
    assert arguments[0] == "phantom", f"it worked: {arguments!r}"  # into a new folder of an odd name
    return Outcome.RIGHT


@kind("command-numbers", seconds=20)
def command_numbers(rng: random.Random, folder: Path) -> Outcome:
    if error := told(filled(rng, folder, rng.choice(COUNTED), {"NUMBER": rng.choice(NUMBERS)})):
        raise InputError(error)
    return Outcome.RIGHT
