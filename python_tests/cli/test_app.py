import re
import resource
import subprocess
import sys

import pytest
from cli_cases import NETWORK, TRAIN, failure, fishers, sources

import timm_ext
from timm_ext.cli import run
from timm_ext.system.locks import folder_lock, output_lock


def test_help_of_every_command_has_an_example(capsys):
    for name in (
        "phantom",
        "check",
        "prepare",
        "train",
        "fisher",
        "merge",
        "adapt",
        "predict",
        "evaluate",
        "demo",
        "info",
    ):
        assert run([name, "--help"]) == 0
        assert "Example:" in capsys.readouterr().out


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"timm-ext {timm_ext.__version__}\n"


def test_wrong_usage_is_one_line(capsys):
    assert "No such command 'trian'" in failure(capsys, ["trian"], status=2)
    assert "CASES" in failure(capsys, ["train", "--out", "x"], status=2)


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert run(["info", str(tmp_path / "none.safetensors"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "{place}/tumours", "--set", "train.steps=x", "--out"],
        ["train", "{place}/none", "--out"],
        ["fisher", "{place}/M1.safetensors", "{place}/none", "--out"],
        ["merge", "{place}/M1.safetensors", "{place}/none", "--method", "mean-imm", "--out"],
        ["merge", "{place}/M1.safetensors", "{place}/F1.safetensors", "--ratios", "1,1", "--out"],
        ["adapt", "{place}/M1.safetensors", "--data", "{place}/none", "--out"],
        ["predict", "{place}/M1.safetensors", "{place}/none", "--out"],
        ["evaluate", "{place}/none", "{place}/none", "--out"],
        ["export", "{place}/none", "--out"],
        ["prepare", "{place}/none", "--cache"],
        ["study", "none", "--out"],
        ["phantom", "--task", "none"],
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[-2:-1]),
)
def test_a_failure_leaves_no_folder_behind(place, tmp_path, capsys, arguments):
    (tmp_path / "there").mkdir()
    for name in ("new/run", "there/run"):
        out = tmp_path / name / "x.safetensors"
        failure(capsys, [*(text.format(place=place) for text in arguments), out])
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("command", ["merge", "phantom", "demo", "train", "fisher"])
def test_output_that_cannot_be_written(place, tmp_path, capsys, command):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    arguments = {
        "merge": ["merge", *sources(place), "--method", "mean-imm", "--out", out],
        "phantom": ["phantom", out, "--count", "1", "--spacing", "8", "--size", "20", "24", "20"],
        "demo": ["demo", "--quick", "--out", out],
        "train": ["train", place / "tumours", "--out", out, *NETWORK, *TRAIN],
        "fisher": ["fisher", sources(place)[0], place / "brains", "--out", out],
    }
    assert "cannot be written" in failure(capsys, arguments[command])


@pytest.mark.parametrize(
    "command", ["train", "adapt", "predict", "evaluate", "prepare", "phantom", "demo", "study"]
)
def test_a_file_where_a_folder_is_meant(place, tmp_path, capsys, command):
    file = tmp_path / "h1.safetensors"
    file.write_bytes(b"kept")
    cases = place / "tumours"
    arguments = {
        "train": ["train", cases, "--out", file, *NETWORK, *TRAIN],
        "adapt": ["adapt", *sources(place), *fishers(place), "--data", cases, "--out", file, *TRAIN],
        "predict": ["predict", sources(place)[0], place / "brains", "--out", file],
        "evaluate": ["evaluate", cases, cases, "--out", file],
        "prepare": ["prepare", cases, "--cache", file],
        "phantom": ["phantom", file, "--count", "1"],
        "demo": ["demo", "--quick", "--out", file],
        "study": ["study", "small", "--out", file],
    }[command]
    option = {"prepare": "--cache", "phantom": "OUT"}.get(command, "--out")
    assert f"{option}: expected a folder (got the file {file})" in failure(capsys, arguments)
    assert file.read_bytes() == b"kept"


def limited(arguments, size):
    """Run a command in a process whose files cannot grow beyond `size` bytes, as on a full disk."""
    code = "import sys; from timm_ext.cli import run; sys.exit(run(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        check=False,
    )


@pytest.mark.parametrize("command", ["merge", "train"])
def test_full_disk(place, tmp_path, command):
    arguments = {
        "merge": ["merge", *sources(place), "--method", "mean-imm", "--out", tmp_path / "init.safetensors"],
        "train": [
            *("train", place / "tumours", "--cache", place / "cache", "--out", tmp_path / "run"),
            *(*NETWORK, *TRAIN, "--val-share", "0", "--set", "prepare.crop=false"),
        ],
    }[command]
    if command == "train":
        run(
            [
                "prepare",
                str(place / "tumours"),
                "--cache",
                str(place / "cache"),
                "--set",
                "prepare.crop=false",
            ]
        )
    done = limited(arguments, 8192)
    assert done.returncode == 1
    assert re.match(r"error: .*cannot be written", done.stderr.splitlines()[0])
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*.safetensors") if "prepared" not in path.parts]
    assert not list(tmp_path.rglob(".partial-*"))


@pytest.mark.parametrize("options", [["--help"], ["merge", "--help"], ["--version"]])
@pytest.mark.parametrize("way", ["script", "-m", "-mtimm_ext"])
def test_command_line_tells_about_itself_without_the_heavy_libraries(tmp_path, way, options):
    script = tmp_path / "timm-ext"
    script.write_text("from timm_ext.cli import main\nmain()\n")
    called = {"script": [script], "-m": ["-m", "timm_ext"], "-mtimm_ext": ["-mtimm_ext"]}[way]
    command = [sys.executable, "-X", "importtime", *called, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "timm_ext" in loaded
    assert "timm-ext" in done.stdout
    heavy = {"torch", "numpy", "monai", "nibabel", "SimpleITK", "scipy", "matplotlib"}
    assert heavy & loaded == set()
    assert "merge" in options or "pydantic" not in loaded  # by which typer reads the options of a command


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "timm_ext", "trian"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "No such command 'trian'" in done.stderr


@pytest.mark.parametrize("command", ["train", "adapt", "fisher", "merge", "merge-ratios", "phantom", "demo"])
def test_output_that_another_process_makes_is_refused_before_any_work(place, tmp_path, capsys, command):
    out = tmp_path / ("out" if command in ("train", "adapt", "phantom", "demo") else "out.safetensors")
    cases = place / "tumours"
    arguments = {
        "train": ["train", cases, "--out", out, *NETWORK, *TRAIN],
        "adapt": ["adapt", *sources(place), *fishers(place), "--data", cases, "--out", out, *TRAIN],
        "fisher": ["fisher", sources(place)[0], place / "brains", "--out", out],
        "merge": ["merge", *sources(place), "--method", "mean-imm", "--out", out],
        "merge-ratios": ["merge", *sources(place)[:1], *sources(place)[:1], "--ratios", "1,1", "--out", out],
        "phantom": ["phantom", out, "--count", "1", "--spacing", "8", "--size", "20", "24", "20"],
        "demo": ["demo", "--quick", "--out", out],
    }[command]
    with folder_lock(out) if out.suffix == "" else output_lock(out):
        assert re.search(r"out\S*: in use by another timm-ext process \(\d+\); ", failure(capsys, arguments))
    assert not [path for path in tmp_path.rglob("*") if path != out]
    if command == "merge":
        assert run(list(map(str, arguments))) == 0
        assert not list(tmp_path.glob(".*"))
