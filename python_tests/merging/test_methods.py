import pytest
import torch
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.merging.bank import Bank
from timm_ext.merging.initialise import assemble_bank, build_initialisation
from timm_ext.merging.merged_model import MergedModel
from timm_ext.merging.methods import METHODS, Method, get_method, mean_imm, method_names
from timm_ext.merging.mixing import logits_of
from timm_ext.parameters import Layout, split_parameters


class FisherStub:
    def __init__(self, *values: list[float]):
        self.tensors = {f"body.{n}": torch.tensor(v) for n, v in zip(("weight", "bias"), values, strict=True)}
        self.zero, self.scaling = (), "sum"


def weights(*values: list[float]) -> dict[str, Tensor]:
    return {f"body.{n}": torch.tensor(v) for n, v in zip(("weight", "bias"), values, strict=True)}


def network() -> nn.Module:
    """One weight and one bias to share, whose values are 9, and a head."""
    net = nn.Sequential()
    net.add_module("body", nn.Linear(1, 1))
    net.add_module("head", nn.Linear(1, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(9)
    return net


def bank() -> Bank:
    """M1 = (2, 10), M2 = (6, 30) with Fishers (3, 1) and (1, 1): computed by hand below."""
    models = {"M1": weights([[2.0]], [10.0]), "M2": weights([[6.0]], [30.0])}
    fishers = [FisherStub([[3.0]], [1.0]), FisherStub([[1.0]], [1.0])]
    return Bank.build(models, fishers, Layout.from_tensors(models["M1"]))


def values(model: nn.Module) -> list[float]:
    return [p.item() for p in model.parameters()]


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("scratch", [9, 9]),
        ("transfer-1", [2, 10]),
        ("transfer-2", [6, 30]),
        ("mean-imm", [(2 + 6) / 2, (10 + 30) / 2]),
        ("mode-imm", [(3 * 2 + 1 * 6) / 4, (10 + 30) / 2]),
        ("imm-warmup", [3, 20]),
        ("mean-imm-probe", [4, 20]),
        ("transfer-2-probe", [6, 30]),
        ("transfer-2-l2", [6, 30]),
        ("transfer-1-drop", [2, 10]),
    ],
)
def test_values_by_hand(name: str, shared: list[float]) -> None:
    net = network()
    made = build_initialisation(name, net, bank())
    assert values(made) == [*shared, 9, 9]
    assert values(net) == [9, 9, 9, 9]
    assert all(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("name", ["t-imm", "t-imm-extra"])
def test_t_imm_by_hand(name: str) -> None:
    made = build_initialisation(name, network(), bank(), initial_logits=logits_of(torch.tensor([0.25, 0.75])))
    assert isinstance(made, MergedModel)
    # weight: (1/4·3·2 + 3/4·1·6) / (3/4 + 3/4) = 4; bias: 1/4·10 + 3/4·30 = 25
    assert values(made.fold()) == pytest.approx([4, 25, 9, 9])


def test_an_annealed_merge_has_an_offset() -> None:
    made = build_initialisation("t-imm-annealed", network(), bank())
    assert isinstance(made, MergedModel)
    assert made.offset is not None
    assert values(made.fold()) == [3, 20, 9, 9]
    with torch.no_grad():
        made.offset.copy_(torch.tensor([1.0, -2.0]))
    assert values(made.fold()) == [4, 18, 9, 9]
    assert build_initialisation("t-imm", network(), bank()).offset is None


def test_transferred_norms_are_groups_of_their_own() -> None:
    """Weight and bias of a norm share a row of logits, which is not that of the convolution before it."""
    target = Segmenter(1, 1)
    sources = {f"M{n}": Segmenter(1, 1).state_dict() for n in (1, 2)}
    split = split_parameters(target, heads=["head."], transfer_norms=True)
    made = Bank.build(sources, None, Layout.from_model(target, split.shared))
    merged = MergedModel(target, made)
    assert tuple(merged.group_names) == ("enter", "norm")
    with torch.no_grad():
        merged.logits.copy_(torch.tensor([[0.0, 0.0], [9.0, -99.0]]))
    folded = merged.fold()
    assert torch.equal(folded.norm.weight, sources["M1"]["norm.weight"])
    assert not torch.equal(folded.enter.weight, sources["M1"]["enter.weight"])


def test_t_imm_starts_as_mode_imm() -> None:
    made = build_initialisation("t-imm", network(), bank())
    assert isinstance(made, MergedModel)
    assert values(made.fold()) == values(build_initialisation("mode-imm", network(), bank()))


def test_shared_of_a_learned_method_is_where_it_starts() -> None:
    for method in METHODS:
        if method.adapt == "logits":
            assert method.shared(bank()).tolist() == ([3, 20] if method.needs_fisher else [4, 20])
            made = build_initialisation(method, network(), bank())
            assert isinstance(made, MergedModel)
            assert made.merge().tolist() == method.shared(bank()).tolist()


def test_a_new_learned_method_is_one_line() -> None:
    kernels = Method("kernels", "Kernel-wise", "a paper", mean_imm, adapt="logits", granularity="kernel")
    made = build_initialisation(kernels, network(), bank())
    assert isinstance(made, MergedModel)
    assert made.granularity == "kernel"
    assert values(made.fold()) == [4, 20, 9, 9]


def test_names_for_two_models() -> None:
    assert method_names(2) == (
        *(
            "scratch",
            "transfer-1",
            "transfer-2",
            "transfer-1-probe",
            "transfer-2-probe",
            "transfer-1-l2",
            "transfer-2-l2",
            "transfer-1-drop",
            "transfer-2-drop",
            "transfer-1-all",
            "transfer-2-all",
            "mean-imm",
            "mode-imm",
            "mode-imm-normalized",
            "mean-imm-probe",
            "imm-warmup",
            "t-imm",
            "t-imm-extra",
            "t-imm-norms",
            "t-imm-filter",
            "t-imm-kernel",
            "t-imm-normalized",
            "t-imm-annealed",
            "medmerge",
            "mean-aligned",
            "mode-imm-aligned",
            "medmerge-aligned",
            "soup",
            "ensemble",
            "transfer-joint",
        ),
    )
    assert all(get_method(name).name == name for name in method_names(4))


def test_every_method_says_what_it_is() -> None:
    for name in method_names(2):
        method = get_method(name)
        assert method.title
        assert method.paper
        assert method.needs_fisher == (method.shared is get_method("mode-imm").shared)
        assert method.extra_steps == (name == "t-imm-extra")
        assert method.aligned == name.endswith("-aligned")
        assert method.transfer_norms == (name == "t-imm-norms")
        assert (method.l2_transfer > 0) == name.endswith("-l2")
        assert (method.drop_transfer > 0) == name.endswith("-drop")
        assert (method.combine != "none") == (name in ("soup", "ensemble"))
        joint = "cases" if name.endswith("-all") else "none"
        assert method.joint == ("regions" if name == "transfer-joint" else joint)
        assert (method.normalize == "tensor") == name.endswith("-normalized")
        assert (method.adapt == "specific") == (name.endswith("-probe") or name == "imm-warmup")
        assert (method.weight_pull > 0) == (name == "t-imm-annealed")
        assert method.logit_pull == method.warm_up == 0
    learned = {m.name: m.granularity for m in METHODS if m.learns_ratios}
    assert learned == {
        "t-imm": "layer",
        "t-imm-extra": "layer",
        "t-imm-norms": "layer",
        "t-imm-filter": "filter",
        "t-imm-kernel": "kernel",
        "t-imm-normalized": "layer",
        "t-imm-annealed": "layer",
        "medmerge": "kernel",
        "medmerge-aligned": "kernel",
    }


def convolutions() -> tuple[nn.Module, Bank]:
    """Two 1-D convolutions of 2 × 2 kernels of 1 element, M1 all 1 and M2 all 3, with Fishers of 1 and 3."""
    net = nn.Sequential(nn.Conv1d(2, 2, 1, bias=False))
    models = {f"M{n}": {"0.weight": torch.full((2, 2, 1), 2.0 * n - 1)} for n in (1, 2)}
    fishers = [FisherOf(tensors) for tensors in models.values()]
    return net, Bank.build(models, fishers, Layout.from_model(net, ["0.weight"]))


class FisherOf:
    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self.zero, self.scaling = tensors, (), "sum"


def test_medmerge_has_a_weight_for_each_kernel_and_no_fisher() -> None:
    net, sources = convolutions()
    logits = logits_of(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.75, 0.25], [0.1, 0.9]]))
    made = build_initialisation("medmerge", net, sources, initial_logits=logits)
    assert isinstance(made, MergedModel)
    assert tuple(made.group_names) == ("0[0, 0]", "0[0, 1]", "0[1, 0]", "0[1, 1]")
    assert made.merge().tolist() == pytest.approx([2, 2.5, 1.5, 2.8])  # α_1 + 3 α_2


@pytest.mark.parametrize(("name", "groups"), [("t-imm", 1), ("t-imm-filter", 2), ("t-imm-kernel", 4)])
def test_t_imm_of_finer_groups_weighs_by_fishers(name: str, groups: int) -> None:
    made = build_initialisation(name, *convolutions())
    assert isinstance(made, MergedModel)
    assert len(made.group_names) == groups
    assert made.merge().tolist() == pytest.approx([2.5] * 4)  # (1·1 + 3·3) / (1 + 3)


@pytest.mark.parametrize("mixing", ["sigmoid", "softmax", "ratios", "free"])
@pytest.mark.parametrize("anchor", [2.0, -2.0])
def test_an_anchor_lets_one_source_dominate(mixing: str, anchor: float) -> None:
    net, sources = convolutions()
    made = build_initialisation("medmerge", net, sources, mixing=mixing, anchor=anchor)
    assert isinstance(made, MergedModel)
    share = torch.sigmoid(torch.tensor(anchor * (2 if mixing == "softmax" else 1))).item()
    assert made.ratios()[:, 0].tolist() == pytest.approx([share] * 4)
    assert made.merge().tolist() == pytest.approx([share + 3 * (1 - share)] * 4)
    if mixing in ("sigmoid", "softmax"):
        assert made.logits[0].tolist() == [anchor, -anchor]


def test_given_logits_go_before_an_anchor() -> None:
    net, sources = convolutions()
    made = build_initialisation("medmerge", net, sources, anchor=9.0, initial_logits=torch.zeros(2))
    assert isinstance(made, MergedModel)
    assert made.ratios().eq(0.5).all()


def test_granularity_and_constraint_are_options() -> None:
    net, sources = convolutions()
    weights = torch.tensor([[-1.0, 2.0], [0.5, 0.0]])
    made = build_initialisation(
        "medmerge", net, sources, granularity="filter", mixing="free", initial_logits=weights
    )
    assert isinstance(made, MergedModel)
    assert made.merge().tolist() == [5, 5, 0.5, 0.5]  # −1 + 2·3 and 0.5, neither of them a mean


def test_free_weights_refuse_fishers() -> None:
    with pytest.raises(InputError, match="expected a bank without Fishers for 'free' weights"):
        build_initialisation("t-imm-kernel", *convolutions(), mixing="free")


@pytest.mark.parametrize(
    "name",
    ["timm", "transfer-0", "transfer-x", "transfer", "transfer--1", "transfer-probe", "transfer-1-prob"],
)
def test_unknown_method_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"method: expected one of scratch, .*mean-imm, .*t-imm.* \(got '{name}'\)"
    ):
        get_method(name)


def test_scratch_needs_no_bank() -> None:
    assert values(build_initialisation("scratch", network(), None)) == [9, 9, 9, 9]


def test_too_few_models_are_refused() -> None:
    with pytest.raises(InputError, match=r"transfer-3: expected at least 3 source models \(got 2\)"):
        build_initialisation("transfer-3", network(), bank())
    with pytest.raises(InputError, match=r"mean-imm: expected at least 1 source models \(got 0\)"):
        build_initialisation("mean-imm", network(), None)


@pytest.mark.parametrize("name", ["soup", "ensemble"])
def test_combinations_are_no_initialisation(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: expected a method that initialises"):
        build_initialisation(name, network(), bank())


def test_missing_fishers_are_refused() -> None:
    with pytest.raises(InputError, match=r"t-imm: expected a bank with Fishers \(got one without\)"):
        build_initialisation("t-imm", network(), bank().without_fisher())
    with pytest.raises(InputError, match="expected a bank with Fishers"):
        get_method("mode-imm").shared(bank().without_fisher())


def test_network_that_does_not_fit_is_refused() -> None:
    net = nn.Sequential()
    net.add_module("body", nn.Linear(2, 1))
    with pytest.raises(InputError, match=r"network: body.weight: expected \[1, 1\] \(got \[1, 2\]\)"):
        build_initialisation("mean-imm", net, bank())


class Segmenter(nn.Module):
    def __init__(self, modalities: int, regions: int) -> None:
        super().__init__()
        self.enter = nn.Conv1d(modalities, 2, 1, bias=False)
        self.norm = nn.InstanceNorm1d(2, affine=True)
        self.head = nn.Conv1d(2, regions, 1)


def test_bank_of_networks_with_other_tasks() -> None:
    target = Segmenter(3, 3)
    sources = {"M1": Segmenter(2, 5), "M2": Segmenter(2, 7)}
    with torch.no_grad():
        target.enter.weight[:, 1] = torch.tensor([[10.0], [20.0]])
        sources["M1"].enter.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, :, None])
        sources["M2"].enter.weight.copy_(torch.tensor([[5.0, 6.0], [7.0, 8.0]])[:, :, None])
    made = assemble_bank(
        target,
        {name: net.state_dict() for name, net in sources.items()},
        None,
        split=split_parameters(target, heads=["head."]),
        source_modalities=[["T1", "T2"], ["T2", "T1"]],
        target_modalities=["T1", "T1c", "T2"],
        input_layers=["enter.weight"],
    )
    assert made.theta.tolist() == [[1, 10, 2, 3, 20, 4], [6, 10, 5, 8, 20, 7]]
    assert made.fisher is None


def test_bank_names_what_differs_beyond_the_task() -> None:
    target, other = Segmenter(1, 1), Segmenter(1, 1)
    other.extra = nn.Conv1d(1, 1, 1)
    with pytest.raises(InputError, match=r"M2: extra.weight: expected none as in M1 \(got \[1, 1, 1\]\)"):
        assemble_bank(
            target,
            {"M1": target.state_dict(), "M2": other.state_dict()},
            None,
            split=split_parameters(target, heads=["head."]),
            source_modalities=[["T1"], ["T1"]],
            target_modalities=["T1"],
            input_layers=["enter.weight"],
        )


@pytest.mark.parametrize(
    ("modalities", "fishers", "message"),
    [
        ([["T1"]], None, r"modalities: expected those of each of 2 models \(got 1 lists\)"),
        ([["T1"], ["T1"]], [], r"bank: expected one Fisher for each of 2 models \(got 0\)"),
    ],
)
def test_wrong_numbers_of_sources_are_refused(
    modalities: list[list[str]], fishers: list | None, message: str
) -> None:
    target = Segmenter(1, 1)
    with pytest.raises(InputError, match=message):
        assemble_bank(
            target,
            {"M1": target.state_dict(), "M2": target.state_dict()},
            fishers,
            split=split_parameters(target, heads=["head."]),
            source_modalities=modalities,
            target_modalities=["T1"],
            input_layers=["enter.weight"],
        )
