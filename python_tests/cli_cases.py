"""Small networks and cases for the tests of the commands."""

from timm_ext.cli import run
from timm_ext.data.tasks import get_task, task_to_dict
from timm_ext.networks.io import save_network
from timm_ext.networks.registry import build_network

SMALL = {"base_filters": 2, "levels": 3}
TRAIN = ["--set", "train.tensorboard=false", "--set", "train.steps=2", "--set", "train.accelerator=cpu"]
NETWORK = ["--set", "network.options={base_filters: 2, levels: 3}"]


def save_source(path, task, *, seed, options=SMALL):
    described = get_task(task)
    model = build_network(
        "isensee2017",
        in_channels=len(described.modalities),
        out_channels=len(described.regions),
        seed=seed,
        **options,
    )
    save_network(path, model, task=task_to_dict(described))
    return path


def sources(place):
    return [str(place / "M1.safetensors"), str(place / "M2.safetensors")]


def fishers(place):
    return ["--fisher", str(place / "F1.safetensors"), "--fisher", str(place / "F2.safetensors")]


def failure(capsys, arguments, *, status=1):
    """Run a command that must fail and return its message."""
    capsys.readouterr()
    assert run(list(map(str, arguments))) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def copy_case(place, target, *, task="tumours"):
    """Copy one case into a BraTS-like folder of its own."""
    folder = target / "cases" / "one"
    folder.mkdir(parents=True)
    for modality, suffix in (
        ("T1", "t1"),
        ("T1c", "t1ce"),
        ("T2", "t2"),
        ("FLAIR", "flair"),
        ("label", "seg"),
    ):
        source = place / task / "case-000" / f"case-000_{modality}.nii.gz"
        (folder / f"one_{suffix}.nii.gz").write_bytes(source.read_bytes())
    return folder
