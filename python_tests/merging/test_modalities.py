from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from timm_ext.errors import InputError
from timm_ext.merging.modalities import fit_to_target, match_input_channels

NAMES = ["T1", "T1c", "T2", "FLAIR"]


def weight(channels: int) -> Tensor:
    """[2, channels, 1, 1, 1] whose channel i holds i + 1 and -(i + 1)."""
    ramp = torch.arange(1.0, channels + 1)
    return torch.stack([ramp, -ramp])[:, :, None, None, None]


def channels(tensor: Tensor) -> list[float]:
    assert torch.equal(tensor[0], -tensor[1])
    return tensor[0].flatten().tolist()


def test_same_names_take_their_channel_in_the_targets_order() -> None:
    assert channels(match_input_channels(weight(3), ["t1", "T2", "flair"], ["FLAIR", "t2", "T1"])) == [
        3,
        2,
        1,
    ]


def test_unseen_modalities_take_their_stand_in() -> None:
    assert channels(match_input_channels(weight(2), ["T1", "T2"], NAMES)) == [1, 1, 2, 2]


def test_without_the_stand_in_the_mean_is_taken() -> None:
    assert channels(match_input_channels(weight(2), ["T2", "PD"], ["T1c", "FLAIR", "DWI"])) == [1.5, 1, 1.5]


def test_a_rule_of_the_caller_goes_first() -> None:
    got = match_input_channels(weight(2), ["T1", "T2"], NAMES, unseen={"flair": "t1", "PD": "nothing"})
    assert channels(got) == [1, 1, 2, 1]


def test_spellings_of_brats_are_one_name() -> None:
    got = match_input_channels(weight(4), ["t1n", "T1Gd", "t2w", "t2f"], ["T1", "t1ce", "T2", "T2-FLAIR"])
    assert channels(got) == [1, 2, 3, 4]


@given(order=st.permutations(NAMES))
def test_there_and_back_is_the_identity(order: list[str]) -> None:
    there = match_input_channels(weight(4), NAMES, order)
    assert torch.equal(match_input_channels(there, order, NAMES), weight(4))


def test_the_result_is_a_copy() -> None:
    source = weight(1)
    match_input_channels(source, ["T1"], ["T1"]).zero_()
    assert channels(source) == [1]


@pytest.mark.parametrize("shape", [(2, 3, 1), (2,)])
def test_other_channel_count_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InputError, match=r"input layer: expected 2 input channels for T1, T2 \(got a weight of shape"
    ):
        match_input_channels(torch.zeros(shape), ["T1", "T2"], ["T1"])


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(InputError, match=r"source modalities: expected each once \(got T1c, T1ce\)"):
        match_input_channels(weight(2), ["T1c", "T1ce"], ["T1"])
    with pytest.raises(InputError, match=r"target modalities: expected each once \(got T1, t1\)"):
        match_input_channels(weight(2), ["T1", "T2"], ["T1", "t1"])


def test_a_stand_in_the_source_has_not_is_refused() -> None:
    with pytest.raises(InputError, match=r"unseen: expected a modality of the source for FLAIR \(got PD\)"):
        match_input_channels(weight(2), ["T1", "T2"], NAMES, unseen={"FLAIR": "PD"})


@dataclass
class FisherStub:
    tensors: dict[str, Tensor]
    count: int = 7


def test_network_and_fisher_are_fitted_alike() -> None:
    source = {"in.weight": weight(2), "skip.weight": weight(2), "body.weight": weight(2)}
    fisher = FisherStub({name: tensor**2 for name, tensor in source.items()})
    tensors, fitted = fit_to_target(
        source,
        fisher,
        source_modalities=["T1", "T2"],
        target_modalities=["T2", "T1", "FLAIR"],
        input_layers=["in.weight", "skip.weight"],
    )
    assert list(tensors) == list(source)
    for name in ("in.weight", "skip.weight"):
        assert channels(tensors[name]) == [2, 1, 2]
        assert fitted.tensors[name][0].flatten().tolist() == [4, 1, 4]
    assert tensors["body.weight"] is source["body.weight"]
    assert fitted.count == 7
    assert fisher.tensors["in.weight"].shape[1] == 2


def test_without_a_fisher() -> None:
    names = {"source_modalities": ["T1"], "target_modalities": ["T1"], "input_layers": ["w"]}
    assert fit_to_target({"w": weight(1)}, None, **names)[1] is None


def test_missing_input_layer_is_refused() -> None:
    names = {"source_modalities": ["T1"], "target_modalities": ["T1"], "input_layers": ["w", "v"]}
    with pytest.raises(InputError, match=r"input layer: expected the network to have v \(got none\)"):
        fit_to_target({"w": weight(1)}, None, **names)
    with pytest.raises(InputError, match=r"expected the Fisher to have v \(got none\)"):
        fit_to_target({"w": weight(1), "v": weight(1)}, FisherStub({"w": weight(1)}), **names)
