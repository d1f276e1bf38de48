import copy
import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merged_model_samples import FisherStub, bank_of, image, network, plain_merge
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.groups import GRANULARITIES, make_groups
from timm_ext.layout import Layout
from timm_ext.merging.bank import Bank
from timm_ext.merging.merged_model import MergedModel
from timm_ext.merging.mixing import logits_of
from timm_ext.parameters import named_parameters


def test_only_logits_and_task_specific_parameters_are_parameters() -> None:
    model = MergedModel(network(9), bank_of())
    specific = (
        "batch_norm.weight",
        "batch_norm.bias",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    )
    assert [name for name, _ in model.named_parameters()] == ["logits", *(f"network.{n}" for n in specific)]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [id(p) for p in model.specific_parameters()] == [id(p) for p in model.network.parameters()]


def test_starts_from_equal_ratios() -> None:
    model = MergedModel(network(9), bank_of(3))
    assert tuple(model.group_names) == ("first", "up")
    assert torch.equal(model.ratios(), torch.full((2, 3), 1 / 3))


def test_the_callers_network_is_left_alone() -> None:
    net = network(9)
    before = copy.deepcopy(net.state_dict())
    model = MergedModel(net, bank_of())
    model.train()(image()).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("mixing", "fisher"),
    [("sigmoid", True), ("sigmoid", False), ("softmax", True), ("softmax", False), ("free", False)],
)
def test_merge_is_the_definition(granularity: str, mixing: str, fisher: bool) -> None:
    bank = bank_of(3, fisher=fisher)
    model = MergedModel(network(9), bank, granularity=granularity, mixing=mixing)
    with torch.no_grad():
        model.logits.normal_(generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        model.merge().double(), plain_merge(model, bank, model.logits), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("granularity", ["layer", "kernel"])
@pytest.mark.parametrize("mixing", ["sigmoid", "free"])
def test_gradient_of_the_logits_is_that_of_plain_pytorch(granularity: str, mixing: str) -> None:
    bank = bank_of(3, fisher=mixing != "free")
    model = MergedModel(network(9).double(), bank, granularity=granularity, mixing=mixing)
    logits = torch.randn(model.logits.shape, generator=torch.Generator().manual_seed(2))
    model.logits.data.copy_(logits)
    model.eval()(image().double()).square().mean().backward()

    logits = logits.double().requires_grad_()
    shared = bank.layout.split(plain_merge(model, bank, logits))
    net = network(9).double().eval()
    torch.func.functional_call(net, shared, (image().double(),)).square().mean().backward()
    scale = logits.grad.abs().max().item()
    torch.testing.assert_close(model.logits.grad.double(), logits.grad, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(model.network.head.weight.grad, net.head.weight.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_is_the_forward_to_the_bit(dtype: torch.dtype) -> None:
    bank = bank_of()
    bank = Bank.build(
        {name: bank.layout.split(row) for name, row in zip(bank.sources, bank.theta, strict=True)},
        [FisherStub(bank.layout.split(row)) for row in bank.fisher],
        bank.layout,
        dtype=dtype,
    )
    model = MergedModel(network(9), bank, initial_logits=torch.tensor([0.7, -0.4])).eval()
    plain = model.fold()
    assert torch.equal(plain(image()), model(image()))
    assert not plain.training
    assert all(p.requires_grad for p in plain.parameters())


def test_fold_has_the_structure_of_the_network() -> None:
    net = network(9)
    plain = MergedModel(net, bank_of()).fold()
    assert list(plain.state_dict()) == list(net.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in net.named_parameters()]
    storages = {p.untyped_storage().data_ptr() for p in plain.parameters()}
    assert len(storages) == len(list(plain.parameters()))


def test_training_a_folded_network_leaves_the_merged_one_alone() -> None:
    model = MergedModel(network(9), bank_of())
    before = model.merge().detach()
    with torch.no_grad():
        for parameter in model.fold().parameters():
            parameter.fill_(7)
    assert torch.equal(model.merge(), before)
    assert not (model.network.head.weight == 7).any()


def test_train_and_eval_reach_the_network_and_its_buffers() -> None:
    model = MergedModel(network(9), bank_of())
    model.train()(image())
    assert model.network.batch_norm.num_batches_tracked == 1
    running = model.network.batch_norm.running_mean.clone()
    model.eval()(image())
    assert torch.equal(model.network.batch_norm.running_mean, running)
    assert torch.equal(model.fold().batch_norm.running_mean, running)


def test_keyword_arguments_reach_the_network() -> None:
    model = MergedModel(network(9), bank_of()).eval()
    assert torch.equal(model(image(), scale=2.0), 2 * model(image()))


def test_no_grad_needs_no_graph() -> None:
    model = MergedModel(network(9), bank_of()).eval()
    with torch.no_grad():
        assert torch.equal(model(image()), model(image()).detach())
        assert not model(image()).requires_grad


def test_state_holds_logits_specific_parameters_and_buffers_only() -> None:
    model = MergedModel(network(9), bank_of())
    state = model.state_dict()
    own = {"batch_norm.weight", "norm.weight", "head.weight", "batch_norm.running_mean"}
    assert {"logits", *(f"network.{name}" for name in own)} <= state.keys()
    assert (
        sum(tensor.numel() for tensor in state.values()) == 2 * 2 + 8 + 9 + 8 + 15
    )  # logits, BN and its buffers, IN, head
    with torch.no_grad():
        model.logits.fill_(0.3)
        model.network.head.weight.fill_(0.1)
    other = MergedModel(network(3), bank_of())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(image()), model.eval()(image()))


def test_deep_copies_share_the_bank_and_nothing_else() -> None:
    bank = bank_of()
    model = MergedModel(network(9), bank)
    twin = copy.deepcopy(model)
    assert twin._matrices.data_ptr() == bank.matrices.data_ptr()
    with torch.no_grad():
        twin.logits[:, 0] += 1
        twin.network.head.weight.fill_(0)
    assert (model.logits == 0).all()
    assert not torch.equal(twin.merge(), model.merge())
    assert (model.network.head.weight != 0).any()


def tied(view: Callable[[Tensor], Tensor]) -> nn.Module:
    """The second layer's weight is a view of the first's; the third layer is the second."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = nn.Parameter(view(self.a.weight.data))
            self.c = self.b
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.c(self.b(self.a(x))))

    return Tied()


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.t()], ids=["same", "transposed"])
def test_tied_parameters_stay_tied(view: Callable[[Tensor], Tensor]) -> None:
    weights = [torch.randn(3, 3) for _ in range(2)]
    net = tied(view)
    models = {f"M{t}": {"a.weight": w} for t, w in enumerate(weights)}
    model = MergedModel(net, Bank.build(models, None, Layout.from_model(net, ["a.weight"])))
    assert [n for n, _ in model.named_parameters()] == ["logits", "network.head.weight", "network.head.bias"]
    mean, x = sum(weights) / 2, torch.randn(5, 3)
    expected = net.head(x @ mean.t() @ view(mean).t() @ view(mean).t())
    torch.testing.assert_close(model(x), expected)
    plain = model.fold()
    assert torch.equal(plain(x), model(x))
    assert list(named_parameters(plain)) == ["a.weight", "head.weight", "head.bias"]


def test_a_view_of_a_strided_first_parameter_is_refused() -> None:
    net = tied(lambda w: w.t())
    net.a, net.b = net.b, net.a
    bank = Bank.build({"M": {"a.weight": torch.zeros(3, 3)}}, None, Layout.from_model(net, ["a.weight"]))
    with pytest.raises(
        InputError, match=r"b.weight: expected a view of a contiguous parameter \(got a view of a.weight"
    ):
        MergedModel(net, bank)


def test_lightning_fabric_trains_it() -> None:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model = MergedModel(network(9), bank_of())
    optimizer = torch.optim.Adam(
        [{"params": [model.logits], "lr": 0.1}, {"params": model.specific_parameters(), "lr": 1e-3}]
    )
    wrapped, optimizer = fabric.setup(model, optimizer)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = wrapped(image()).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (model.logits != 0).all()


def test_data_parallel_training_does_not_send_the_bank() -> None:
    model = MergedModel(network(9), bank_of())
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        sent = {buffer.data_ptr() for buffer in parallel.modules_buffers}
        parallel(image()).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert model.network.batch_norm.running_mean.data_ptr() in sent
    assert not sent & {model._matrices.data_ptr(), model._offsets.data_ptr()}
    assert model.logits.grad.abs().sum() > 0


def test_provenance_is_json_and_tells_the_mix() -> None:
    model = MergedModel(network(9), bank_of(), initial_logits=logits_of(torch.tensor([0.75, 0.25])))
    facts = json.loads(json.dumps(model.provenance()))
    assert facts["sources"] == ["M1", "M2"]
    assert facts["groups"] == ["first", "up"]
    assert facts["mean_ratios"] == pytest.approx([0.75, 0.25])
    assert facts["logits"] == model.logits.tolist()
    assert "granularity=layer" in repr(model)


def test_provenance_of_too_many_groups_leaves_the_logits_out() -> None:
    net = nn.Sequential(nn.Linear(101, 100), nn.Linear(1, 1))
    bank = Bank.build({"M": net.state_dict()}, None, Layout.from_model(net, ["0.weight"]))
    assert "logits" not in MergedModel(net, bank, granularity="element").provenance()


def test_network_that_does_not_fit_is_refused() -> None:
    net = nn.ModuleDict({"first": nn.Conv3d(2, 5, 3), "up": nn.ConvTranspose3d(4, 4, 2, bias=False)})
    with pytest.raises(
        InputError, match=r"got 3 that differ\)\n  network: first.weight: expected \[4, 2, 3, 3, 3\]"
    ):
        MergedModel(net, bank_of())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixing": "mean"}, r"mixing: expected one of sigmoid, softmax, ratios, free \(got 'mean'\)"),
        ({"granularity": "row"}, r"granularity: expected one of model, .* \(got 'row'\)"),
        ({"initial_logits": torch.zeros(3)}, r"initial logits: expected \[2, 2\] \(got \[3\]\)"),
        ({"initial_logits": torch.tensor([0.0, math.nan])}, "initial logits: expected finite numbers"),
        (
            {"mixing": "ratios", "initial_logits": torch.tensor([-1.0, 2.0])},
            "initial ratios: expected numbers ≥ 0",
        ),
        ({"mixing": "ratios", "initial_logits": torch.zeros(2)}, "initial ratios: expected numbers ≥ 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MergedModel(network(9), bank_of(), **arguments)


@given(count=st.integers(1, 4), seed=st.integers(0, 100), granularity=st.sampled_from(GRANULARITIES))
def test_laws_of_the_merge(count: int, seed: int, granularity: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Conv1d(2, 3, 2)
    layout = Layout.from_model(net, ["weight", "bias"])
    models = [
        {n: torch.randn(p.shape, generator=generator) for n, p in net.named_parameters()}
        for _ in range(count)
    ]
    fishers = [
        FisherStub({n: torch.rand(t.shape, generator=generator) for n, t in m.items()}) for m in models
    ]
    groups = len(make_groups(layout, granularity).names)
    logits = torch.randn(groups, count, generator=generator)

    def merged(order: list[int], fishers: list[FisherStub]) -> Tensor:
        bank = Bank.build({str(i): models[i] for i in order}, [fishers[i] for i in order], layout)
        start = logits[:, order]
        return MergedModel(net, bank, granularity=granularity, initial_logits=start).merge().detach()

    result = merged(list(range(count)), fishers)
    theta = torch.stack([layout.flatten(m) for m in models])
    assert (result >= theta.amin(0)).all()
    assert (result <= theta.amax(0)).all()
    if count == 1:
        assert torch.equal(result, theta[0])
    permuted = merged(torch.randperm(count, generator=generator).tolist(), fishers)
    torch.testing.assert_close(permuted, result, rtol=1e-5, atol=1e-6)
    scaled = merged(
        list(range(count)), [FisherStub({n: 8 * t for n, t in f.tensors.items()}) for f in fishers]
    )
    assert torch.equal(scaled, result)


def test_an_offset_is_added_to_the_merge_and_folded() -> None:
    bank = bank_of()
    model, plain = (
        MergedModel(network(9), bank, with_offset=True).eval(),
        MergedModel(network(9), bank).eval(),
    )
    assert torch.equal(model.merge(), plain.merge())
    delta = 0.1 * torch.randn(bank.layout.numel, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.offset.copy_(delta)
        assert torch.equal(model.merge(), plain.merge() + delta)
        assert torch.allclose(model(image()), model.fold().eval()(image()), atol=1e-6)
    model(image()).square().sum().backward()
    assert model.offset.grad.abs().max() > 0
    assert model.logits.grad.abs().max() > 0
    assert set(model.state_dict()) - set(plain.state_dict()) == {"offset"}
    assert torch.equal(copy.deepcopy(model).merge(), model.merge())
    assert all(parameter is not model.offset for parameter in model.specific_parameters())
