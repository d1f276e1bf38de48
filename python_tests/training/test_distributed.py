import sys
from pathlib import Path

import pytest
import torch

from timm_ext.errors import InputError
from timm_ext.training.examples import Data
from timm_ext.training.trainer import Trainer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from examples_for_tests import Blobs, run_in_two_processes, settings, small_network  # noqa: E402

PROGRAM = """
import sys
sys.path.insert(0, {here!r})
import torch
from examples_for_tests import Blobs, settings, small_network
from timm_ext.training.examples import Data
from timm_ext.training.trainer import Trainer

model = small_network(dropout=0.0)
history = Trainer(settings(steps={steps}, batch_size=4), {run!r}).fit(
    model, Data(Blobs(5), Blobs(3, first=50)), resume=True
)
if torch.distributed.get_rank() == 0:
    torch.save(model.state_dict(), {out!r})
"""


def _torchrun(tmp_path, steps):
    program = tmp_path / "program.py"
    program.write_text(
        PROGRAM.format(here=str(HERE), steps=steps, run=str(tmp_path / "two"), out=str(tmp_path / "two.pt"))
    )
    run_in_two_processes(program)
    return torch.load(tmp_path / "two.pt", weights_only=True)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Each takes half of every batch; the means over processes are those over the batch, up to rounding."""
    model = small_network(dropout=0.0)
    history = Trainer(settings(steps=6, batch_size=4), tmp_path / "one").fit(
        model, Data(Blobs(5), Blobs(3, first=50))
    )
    _torchrun(tmp_path, steps=4)
    weights = _torchrun(tmp_path, steps=6)  # resumes in both processes
    # Adam divides by the root of squared gradients, so that the rounding of a gradient near 0 is enlarged.
    for name, value in model.state_dict().items():
        if not name.endswith("conv.bias"):  # in front of a norm: the gradient is nothing but rounding
            assert torch.allclose(value, weights[name], atol=2e-3), name
    rows = [line.split(",") for line in (tmp_path / "two/log.csv").read_text().splitlines()]
    assert [row[0] for row in rows[1:]] == ["1", "2", "3", "4", "5", "6"]
    for row, expected in zip(rows[1:], history.rows, strict=True):
        found = dict(zip(rows[0], row, strict=True))
        assert float(found["loss"]) == pytest.approx(expected["loss"], abs=2e-4)
        if expected["val_dice"] is not None:
            assert float(found["val_loss"]) == pytest.approx(expected["val_loss"], abs=1e-3)


def test_batch_that_cannot_be_dealt_out_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"batch_size must be a multiple of the 2 processes \(got 3\)"):
        Trainer(settings(batch_size=3, devices=2), tmp_path).fit(small_network(), Data(Blobs(2)))
