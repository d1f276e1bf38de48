"""Images of which a norm would see a single value per channel are refused before the first step."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.layout import Layout
from timm_ext.merging import Bank, MergedModel
from timm_ext.networks import build_network, heads_of
from timm_ext.parameters import split_parameters
from timm_ext.training.examples import Data
from timm_ext.training.norms import check_norms, refuse_single_values
from timm_ext.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from examples_for_tests import Blobs, settings


def unet(norm: object, seed: int = 0) -> nn.Module:
    options = {"channels": [4, 8, 16], "strides": [2, 2], "num_res_units": 1, "norm": norm}
    return build_network("monai.UNet", in_channels=1, out_channels=1, seed=seed, **options)


def said_by(call: Callable[[], object]) -> str:
    """The message with which a call fails, empty if it does not."""
    try:
        with torch.no_grad():
            call()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("norm", ["BATCH", "INSTANCE", ("GROUP", {"num_groups": 1}), None])
@pytest.mark.parametrize("shape", [(1, 1, 4, 4, 4), (2, 1, 4, 4, 4), (1, 1, 4, 4, 8), (1, 1, 8, 8, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_what_pytorch_would_refuse(norm: object, shape: tuple[int, ...], training: bool) -> None:
    model = unet(norm).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    ours = said_by(lambda: refuse_single_values(model, [(2, 1, 16, 16, 16), shape]))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    theirs = said_by(lambda: model(torch.zeros(shape)))
    assert bool(ours) == bool(theirs)
    if ours:
        assert "Expected more than 1" in theirs
        assert f"from images {list(shape)}" in ours
        assert "norm model.1.submodule.0.conv.unit0.adn.N: expected more than one value" in ours


def test_a_merged_model() -> None:
    target, sources = unet("BATCH"), [unet("BATCH", seed) for seed in (1, 2)]
    split = split_parameters(target, heads=heads_of(target))
    layout = Layout.from_model(target, split.shared)
    bank = Bank.build({str(n): model.state_dict() for n, model in enumerate(sources)}, None, layout)
    merged = MergedModel(target, bank).train()
    refuse_single_values(merged, [(2, 1, 4, 4, 4)])
    with pytest.raises(InputError, match=r"norm network\.model\.1\.submodule\.0"):
        refuse_single_values(merged, [(1, 1, 4, 4, 4)])


def test_a_network_that_needs_values() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm3d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) if float(x.sum()) > 0 else x

    network = Looking()
    refuse_single_values(network, [(1, 1, 4, 4, 4)])
    assert network.training
    assert not network.norm.running_mean.any()


class Sized(Blobs):
    """Cases of several sizes, the last of which is the smallest."""

    def __init__(self, shapes: list[tuple[int, int, int]]) -> None:
        super().__init__(len(shapes))
        self.shapes = shapes

    @property
    def image_shapes(self) -> list[tuple[int, ...]]:
        return [(1, *shape) for shape in self.shapes]

    def sample(self, index: int, epoch: int) -> dict[str, object]:
        image = torch.randn(1, *self.shapes[index])
        return {"id": f"case{index}", "image": image, "target": (image > 0).float()}


def test_training_is_refused_before_it_begins(tmp_path) -> None:
    model, cases = unet("BATCH").eval(), Sized([(8, 8, 8)] * 3 + [(4, 4, 4)])
    trainer = Trainer(settings(batch_size=1, steps=4), tmp_path / "run")
    with pytest.raises(InputError, match=r"got \[1, 8, 1, 1, 1\] from images \[1, 1, 4, 4, 4\].*batch_size"):
        trainer.fit(model, Data(cases))
    assert not (tmp_path / "run" / "state.pt").exists()
    assert not model.training
    Trainer(settings(batch_size=1, steps=2), tmp_path / "other").fit(model, Data(Sized([(8, 8, 8)] * 2)))


def test_validation_is_refused_before_training(tmp_path) -> None:
    trainer = Trainer(settings(batch_size=1, steps=2), tmp_path)
    model = unet("INSTANCE")
    del model.size_divisor  # its validation volumes are not padded
    with pytest.raises(InputError, match=r"from images \[1, 1, 4, 4, 4\]"):
        trainer.fit(model, Data(Sized([(8, 8, 8)]), Sized([(8, 8, 8), (4, 4, 4)])))


def test_each_process_has_its_share_of_a_batch() -> None:
    shapes, batch = [(1, 4, 4, 4)], settings(batch_size=2)
    with pytest.raises(InputError, match=r"from images \[1, 1, 4, 4, 4\]"):
        check_norms(unet("BATCH"), shapes, [], batch, processes=2)
    check_norms(unet("BATCH"), shapes, [], batch, processes=1)
