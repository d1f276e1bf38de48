import copy
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nnunet_folders import options_of as nnunet_options
from torch import nn

from timm_ext.errors import InputError
from timm_ext.networks.registry import build_network
from timm_ext.training.examples import Data
from timm_ext.training.trainer import Trainer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from examples_for_tests import SHAPE, Blobs, settings, small_network  # noqa: E402


class _Constant(nn.Module):
    """Logits that are one trainable number, whatever the image."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.other = nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        return self.value + 0 * self.other * images


def test_training_learns(tmp_path):
    history = Trainer(settings(steps=60), tmp_path).fit(
        small_network(dropout=0.0), Data(Blobs(4), Blobs(2, first=50))
    )
    dice = history.curve("val_dice")
    assert dice[-1][1] > 0.75 > dice[0][1]


def test_validations_are_timed_beside_the_log(tmp_path):
    first = Trainer(settings(steps=3), tmp_path).fit(small_network(), Data(Blobs(3), Blobs(1)))
    history = Trainer(settings(steps=6), tmp_path).fit(small_network(), Data(Blobs(3), Blobs(1)), resume=True)
    assert [step for step, _ in history.times] == [step for step, _ in history.curve("val_dice")]
    assert history.times[: len(first.times)] == first.times
    seconds = [value for _, value in history.times]
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] <= history.seconds
    assert "seconds" not in (tmp_path / "log.csv").read_text()


def test_rows_are_logged(tmp_path):
    history = Trainer(settings(steps=5), tmp_path).fit(
        small_network(out_channels=2), Data(Blobs(3, regions=2), Blobs(1, regions=2))
    )
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "step",
        "epoch",
        "loss",
        "lr",
        "val_loss",
        "val_dice",
        "val_dice_0",
        "val_dice_1",
    ]
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    # Three cases in batches of two: steps begin at positions 0, 2, 4, 6, 8 of the stream of epochs.
    assert [row["epoch"] for row in rows] == ["0", "0", "1", "2", "2"]
    assert [bool(row["val_dice"]) for row in rows] == [False, True, False, True, True]
    assert [step for step, _ in history.curve("loss")] == [1, 2, 3, 4, 5]
    last = history.rows[-1]
    assert float(rows[-1]["val_dice_1"]) == last["val_dice_1"]
    assert last["val_dice"] == pytest.approx((last["val_dice_0"] + last["val_dice_1"]) / 2)
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 5
    assert history.seconds > 0


def test_tensorboard_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = settings(steps=3, tensorboard=True)
    history = Trainer(chosen, tmp_path).fit(small_network(), Data(Blobs(2), Blobs(1)))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("loss")]
    assert values == [(step, pytest.approx(value)) for step, value in history.curve("loss")]
    assert {"lr", "val_loss", "val_dice"} <= set(events.Tags()["scalars"])


def test_best_or_last_weights_are_kept(tmp_path):
    """The region is empty in validation, so the lower the logit the better; training raises it."""

    class Full(Blobs):
        def sample(self, index, epoch):
            return super().sample(index, epoch) | {"target": torch.ones(1, *SHAPE)}

    class Empty(Blobs):
        def sample(self, index, epoch):
            return super().sample(index, epoch) | {"target": torch.zeros(1, *SHAPE)}

    def run(keep):
        model = _Constant()
        chosen = settings(steps=4, lr=0.1, keep=keep, validate_every=1, batch_size=1)
        history = Trainer(chosen, tmp_path / keep).fit(model, Data(Full(1), Empty(1)))
        return model.value.item(), history

    best, history = run("best")
    last, _ = run("last")
    assert history.best_step == 1
    assert 0 < best < last


def test_without_validation_the_last_weights_are_kept(tmp_path):
    history = Trainer(settings(steps=3), tmp_path).fit(small_network(), Data(Blobs(2)))
    assert history.best_step is None
    assert "val_loss" not in history.rows[0]


def test_plateau_halves_the_rate_and_stops(tmp_path):
    """No gradient reaches the logits, so that no validation after the first is a gain."""

    class Deaf(_Constant):
        def forward(self, images):
            return self.value.detach() + 0 * self.value * images

    chosen = settings(
        steps=100, lr=1.0, schedule="plateau", lr_patience=2, stop_patience=5, validate_every=1, batch_size=1
    )
    history = Trainer(chosen, tmp_path).fit(Deaf(), Data(Blobs(1, noise=0), Blobs(1)))
    assert history.stopped == "plateau"
    # The first validation is the best; the rate halves after the third and fifth, the sixth ends the run.
    assert [row["lr"] for row in history.rows] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_cosine_falls_to_zero(tmp_path):
    chosen = settings(steps=4, lr=1.0, schedule="cosine")
    history = Trainer(chosen, tmp_path).fit(_Constant(), Data(Blobs(1)))
    expected = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert [row["lr"] for row in history.rows] == pytest.approx(expected)
    assert history.stopped == "steps"


def test_groups_have_their_own_rates_and_the_rest_is_frozen(tmp_path):
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1), nn.Conv3d(2, 1, 1))
    before = [layer.weight.detach().clone() for layer in model]
    groups = [
        {"name": "first", "params": model[0].parameters(), "lr": 0.0},
        {"name": "last", "params": model[2].parameters()},
    ]
    history = Trainer(settings(steps=2, lr=0.1), tmp_path).fit(model, Data(Blobs(2)), parameter_groups=groups)
    assert [torch.equal(old, layer.weight) for old, layer in zip(before, model, strict=True)] == [
        True,
        True,
        False,
    ]
    assert history.rows[0]["lr_first"] == 0.0
    assert history.rows[0]["lr_last"] == 0.1
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batch_larger_than_the_set(tmp_path):
    cases = Blobs(2)
    history = Trainer(settings(steps=2, batch_size=5), tmp_path).fit(small_network(), Data(cases))
    assert len(history.rows) == 2
    epochs = sorted(key for key in cases.asked[1:])
    assert epochs == sorted((epoch, index) for epoch in range(5) for index in range(2))


def test_order_depends_on_the_seed(tmp_path):
    orders = {}
    for seed in (0, 1):
        cases = Blobs(6)
        Trainer(settings(steps=6, seed=seed), tmp_path / str(seed)).fit(_Constant(), Data(cases))
        orders[seed] = cases.asked[1:]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.slow
def test_loader_processes_change_nothing(tmp_path):
    logs = []
    for workers in (0, 2):
        Trainer(settings(steps=4, workers=workers), tmp_path / str(workers)).fit(
            small_network(), Data(Blobs(3))
        )
        logs.append((tmp_path / str(workers) / "log.csv").read_bytes())
    assert logs[0] == logs[1]


def test_patches_are_validated_by_sliding_window(tmp_path):
    class Large(Blobs):
        def sample(self, index, epoch):
            image = torch.randn(1, 12, 10, 20, generator=torch.Generator().manual_seed(index))
            return {"id": "large", "image": image, "target": (image > 0).float()}

    chosen = settings(steps=2, patch=SHAPE)
    history = Trainer(chosen, tmp_path).fit(small_network(), Data(Blobs(2), Large(1)))
    assert history.rows[-1]["val_dice"] is not None


def test_mixed_precision_runs(tmp_path):
    history = Trainer(settings(steps=2, precision="bf16-mixed"), tmp_path).fit(
        small_network(), Data(Blobs(2), Blobs(1))
    )
    assert math.isfinite(history.rows[-1]["loss"])


@pytest.mark.parametrize(
    ("precision", "fast", "advice"),
    [
        ("32-true", True, "check these"),
        ("bf16-mixed", True, "check these"),
        ("bf16-mixed", False, "use fast_layers=true or precision=32-true on a CPU"),
    ],
)
def test_nan_loss_names_step_and_cases(tmp_path, precision, fast, advice):
    class Poisoned(Blobs):
        def sample(self, index, epoch):
            sample = super().sample(index, epoch)
            return sample | {"image": sample["image"] * float("nan")} if epoch == 1 else sample

    with pytest.raises(InputError, match=rf"the loss is nan at step 3 \(cases case\d, case\d\); .*{advice}"):
        Trainer(settings(steps=9, precision=precision, fast_layers=fast), tmp_path).fit(
            small_network(), Data(Poisoned(4), Blobs(1))
        )


def test_nan_in_validation_names_the_case(tmp_path):
    class Poisoned(Blobs):
        def sample(self, index, epoch):
            return super().sample(index, epoch) | {"image": torch.full((1, *SHAPE), float("nan"))}

    with pytest.raises(InputError, match="validation: the loss of case case0 is nan"):
        Trainer(settings(steps=2), tmp_path).fit(small_network(), Data(Blobs(2), Poisoned(1)))


def test_empty_sets_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"training set: expected at least one case \(got none\)"):
        Trainer(settings(), tmp_path).fit(small_network(), Data(Blobs(0)))
    with pytest.raises(InputError, match=r"validation set: expected at least one case \(got none\)"):
        Trainer(settings(), tmp_path).fit(small_network(), Data(Blobs(1), Blobs(0)))


def test_wrong_number_of_regions_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"expected logits \[2, 2, 8, 8, 12\] from the network \(got \[2, 1, 8, 8, 12\]"
    ):
        Trainer(settings(), tmp_path).fit(small_network(), Data(Blobs(2, regions=2)))


def test_validation_set_of_another_task_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"validation set: expected the 1 outputs .*got 2"):
        Trainer(settings(), tmp_path).fit(small_network(), Data(Blobs(2), Blobs(2, regions=2)))


def test_target_on_another_grid_is_refused(tmp_path):
    class Skewed(Blobs):
        def sample(self, index, epoch):
            return super().sample(index, epoch) | {"target": torch.zeros(1, 8, 8, 8)}

    with pytest.raises(InputError, match=r"training set: expected image .* on one grid .* for case case0"):
        Trainer(settings(), tmp_path).fit(small_network(), Data(Skewed(2)))


def test_examples_of_different_shapes_are_refused(tmp_path):
    class Mixed(Blobs):
        def sample(self, index, epoch):
            shape = (1, 8, 8, 8 + 2 * index)
            return {"id": f"case{index}", "image": torch.zeros(shape), "target": torch.zeros(shape)}

    with pytest.raises(InputError, match="batch: expected samples of one shape"):
        Trainer(settings(), tmp_path).fit(small_network(), Data(Mixed(2)))


def test_overlapping_parameter_groups_are_refused(tmp_path):
    model = small_network()
    groups = [{"params": model.parameters()}, {"params": model.heads.parameters()}]
    with pytest.raises(InputError, match="parameter groups must be disjoint parts of the model"):
        Trainer(settings(), tmp_path).fit(model, Data(Blobs(1)), parameter_groups=groups)
    with pytest.raises(InputError, match="parameter groups must be disjoint parts of the model"):
        Trainer(settings(), tmp_path).fit(
            model, Data(Blobs(1)), parameter_groups=[{"params": _Constant().parameters()}]
        )
    with pytest.raises(InputError, match="at least one parameter in every parameter group"):
        Trainer(settings(), tmp_path).fit(model, Data(Blobs(1)), parameter_groups=[{"params": []}])


def test_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: cannot be written"):
        Trainer(settings(), tmp_path / "file" / "run").fit(small_network(), Data(Blobs(1)))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2_000, 20_000])
def test_full_disk_is_one_clear_error(tmp_path, limit):
    """A limit on the size of files stands in for a full disk: first for the log, then for the state."""
    program = (
        "import resource, sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from examples_for_tests import *\n"
        "from timm_ext.training.trainer import Trainer\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"chosen = settings(steps=500, save_every={1 if limit > 5000 else 1000}, tensorboard=True)\n"
        f"Trainer(chosen, {str(tmp_path / 'run')!r}).fit(small_network(), Data(Blobs(2)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    name = r"(log\.csv|tensorboard)" if limit < 5000 else r"state\.pt"
    assert re.fullmatch(
        rf"timm_ext\.errors\.InputError: .*/run/{name}: cannot be written \(File too large\)", last
    )
    assert not list((tmp_path / "run").glob(".partial-*"))


def test_unknown_accelerator_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot use accelerator 'abacus' with 1 devices"):
        Trainer(settings(accelerator="abacus"), tmp_path).fit(small_network(), Data(Blobs(1)))


@pytest.mark.parametrize("name", ["monai.DynUNet", "monai.SegResNetDS", "nnunet.PlainConvUNet"])
def test_deep_supervision_trains_every_head_and_validates_the_finest(tmp_path, name):
    pytest.importorskip("dynamic_network_architectures")
    options = {
        "monai.DynUNet": {
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [2, 4, 4],
            "deep_supervision": True,
        },
        "monai.SegResNetDS": {"init_filters": 8, "blocks_down": [1, 1, 1], "norm": "instance", "dsdepth": 2},
        "nnunet.PlainConvUNet": {
            **nnunet_options(stages=4),
            "strides": [1, 2, 2, 1],
            "deep_supervision": True,
        },
    }
    model = build_network(name, in_channels=1, out_channels=1, seed=0, **options[name])
    before = copy.deepcopy(model).state_dict()
    history = Trainer(settings(steps=2), tmp_path).fit(model, Data(Blobs(2), Blobs(1)))
    after = copy.deepcopy(model).state_dict()  # no map of a step is left in it
    heads = [key for key in after if "head" in key or "output_block" in key or "seg_layers" in key]
    idle = [
        key for key in heads if ".seg_layers.0." in key
    ]  # the coarsest of nnU-Net's, which counts nothing
    assert len(heads) - len(idle) >= 4
    assert all(torch.equal(before[key], after[key]) == (key in idle) for key in heads)
    assert history.curve("val_loss")
