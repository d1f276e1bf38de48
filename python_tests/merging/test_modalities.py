from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from timm_ext.errors import InputError
from timm_ext.merging.modalities import (
    fit_to_target,
    match_input_channels,
    source_channels,
    unseen_modalities,
)

NAMES = ["T1", "T1c", "T2", "FLAIR"]


def weight(channels: int) -> Tensor:
    """[2, channels, 1, 1, 1] whose channel i holds i + 1 and -(i + 1)."""
    ramp = torch.arange(1.0, channels + 1)
    return torch.stack([ramp, -ramp])[:, :, None, None, None]


OWN = 10 * weight(4)


def channels(tensor: Tensor) -> list[float]:
    assert torch.equal(tensor[0], -tensor[1])
    return tensor[0].flatten().tolist()


def test_same_names_take_their_channel_in_the_targets_order() -> None:
    got = match_input_channels(weight(3), ["t1", "T2", "flair"], ["FLAIR", "t2", "T1"], weight(3))
    assert channels(got) == [3, 2, 1]


def test_unseen_modalities_keep_the_targets_own_channel() -> None:
    assert channels(match_input_channels(weight(2), ["T1", "T2"], NAMES, OWN)) == [1, 20, 2, 40]


def test_a_rule_of_the_caller_goes_first() -> None:
    got = match_input_channels(weight(2), ["T1", "T2"], NAMES, OWN, unseen={"flair": "t1", "PD": "nothing"})
    assert channels(got) == [1, 20, 2, 1]


def test_what_keeps_the_targets_own_channel_is_named() -> None:
    assert unseen_modalities(["T1", "T2"], NAMES) == ("T1c", "FLAIR")
    assert unseen_modalities(["T1", "T2"], NAMES, {"flair": "t2"}) == ("T1c",)
    assert unseen_modalities(["t1ce", "T1", "T2f", "t2w"], NAMES) == ()
    with pytest.raises(InputError, match="unseen: expected a modality of the source for FLAIR"):
        unseen_modalities(["T1", "T2"], NAMES, {"FLAIR": "PD"})


def test_spellings_of_brats_are_one_name() -> None:
    got = match_input_channels(
        weight(4), ["t1n", "T1Gd", "t2w", "t2f"], ["T1", "t1ce", "T2", "T2-FLAIR"], OWN
    )
    assert channels(got) == [1, 2, 3, 4]


@given(order=st.permutations(NAMES))
def test_there_and_back_is_the_identity(order: list[str]) -> None:
    there = match_input_channels(weight(4), NAMES, order, OWN)
    assert torch.equal(match_input_channels(there, order, NAMES, OWN), weight(4))


def test_the_result_is_a_copy() -> None:
    source, own = weight(1), weight(2)
    match_input_channels(source, ["T1"], ["T1", "T2"], own).zero_()
    assert channels(source) == [1]
    assert channels(own) == [1, 2]


@pytest.mark.parametrize("shape", [(2, 3, 1), (2,)])
def test_other_channel_count_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InputError, match=r"input layer: expected 2 input channels for T1, T2 \(got a weight of shape"
    ):
        match_input_channels(torch.zeros(shape), ["T1", "T2"], ["T1"], weight(1))


def test_an_own_weight_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected 2 input channels for T1, PD \(got a weight of shape"):
        match_input_channels(weight(1), ["T1"], ["T1", "PD"], weight(3))
    with pytest.raises(
        InputError, match=r"differ in input channels alone \(got \[2, 1, 1, 1, 1\] and \[3, 2"
    ):
        match_input_channels(weight(1), ["T1"], ["T1", "PD"], torch.zeros(3, 2, 1, 1, 1))


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"source modalities: expected each modality once \(got T1c and T1ce\)"
    ):
        match_input_channels(weight(2), ["T1c", "T1ce"], ["T1"], weight(1))
    with pytest.raises(InputError, match=r"target modalities: expected each modality once \(got T1 and t1\)"):
        match_input_channels(weight(2), ["T1", "T2"], ["T1", "t1"], weight(2))


def test_a_stand_in_the_source_has_not_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"unseen: expected a modality of the source for FLAIR \(got PD; it has t1, t2\)"
    ):
        match_input_channels(weight(2), ["T1", "T2"], NAMES, OWN, unseen={"FLAIR": "PD"})


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
        own={"in.weight": 10 * weight(3), "skip.weight": 10 * weight(3)},
        source_modalities=["T1", "T2"],
        target_modalities=["T2", "T1", "FLAIR"],
        input_layers=["in.weight", "skip.weight"],
    )
    assert list(tensors) == list(source)
    for name in ("in.weight", "skip.weight"):
        assert channels(tensors[name]) == [2, 1, 30]
        assert fitted.tensors[name][0].flatten().tolist() == [4, 1, 0]
    assert tensors["body.weight"] is source["body.weight"]
    assert fitted.count == 7
    assert fisher.tensors["in.weight"].shape[1] == 2


def test_without_a_fisher() -> None:
    names = {"source_modalities": ["T1"], "target_modalities": ["T1"], "input_layers": ["w"]}
    names["own"] = {"w": weight(1)}
    assert fit_to_target({"w": weight(1)}, None, **names)[1] is None


def test_missing_input_layer_is_refused() -> None:
    names = {"source_modalities": ["T1"], "target_modalities": ["T1"], "input_layers": ["w", "v"]}
    names["own"] = {"w": weight(1), "v": weight(1)}
    with pytest.raises(InputError, match=r"input layer: expected the network to have v \(got none\)"):
        fit_to_target({"w": weight(1)}, None, **names)
    with pytest.raises(InputError, match=r"expected the Fisher to have v \(got none\)"):
        fit_to_target({"w": weight(1), "v": weight(1)}, FisherStub({"w": weight(1)}), **names)


def test_two_rules_for_one_modality_are_refused() -> None:
    with pytest.raises(InputError, match=r"unseen: expected each modality once \(got FLAIR and t2f\)"):
        unseen_modalities(["T1", "T2"], NAMES, {"FLAIR": "T1", "t2f": "T2"})


def test_a_source_that_has_a_modality_needs_no_rule_for_it():
    assert source_channels(["MRI"], ["MRI"], {"MRI": "T1"}) == (0,)
    assert source_channels(["T1", "T2"], ["MRI"], {"MRI": "T1"}) == (0,)
