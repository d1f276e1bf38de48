"""Networks as tools hand them over: compiled, scripted, wrapped for several devices, checkpointed."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from timm_ext.errors import InputError
from timm_ext.fisher import Fisher, FisherAccumulator, estimate_fisher
from timm_ext.storage.state_dicts import without_wrappers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")

X = torch.randn(3, 2, 5, 5, 5, generator=torch.Generator().manual_seed(1))
Y = (torch.rand(3, 1, 5, 5, 5, generator=torch.Generator().manual_seed(2)) > 0.5).float()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.InstanceNorm3d(4, affine=True),
        nn.LeakyReLU(inplace=True),
        nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Dropout(), nn.ReLU()),
        nn.Conv3d(4, 1, 1),
    )


def fisher(model: nn.Module, **options: object) -> Fisher:
    accumulator = FisherAccumulator(model, labels="true", **options)
    with accumulator:
        accumulator.update(X[:2], Y[:2], ["a", "b"])
        accumulator.update(X[2:], Y[2:], ["c"])
    return accumulator.result()


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_block(model: nn.Module) -> nn.Module:
    model[3].compile(backend="eager")
    return model


def compiled_in_training(model: nn.Module) -> nn.Module:
    """Compiled code of both modes is there already."""
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X)
    with torch.no_grad():
        compiled.eval()(X)
    model[3][1].reset_running_stats()
    return compiled.train()


def in_part(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Wrap a part of the network, and a part of that part."""

    def wrapped(model: nn.Module) -> nn.Module:
        model[3][0] = wrap(model[3][0])
        model[3] = wrap(model[3])
        return model

    return wrapped


PARTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda part: torch.compile(part, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DataParallel, compiled": lambda part: torch.compile(nn.DataParallel(part), backend="eager"),
    "averaged": AveragedModel,
    "checkpoint wrapper": lambda part: checkpoint_wrapper(part, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
    "Fabric": lambda part: Fabric(accelerator="cpu", devices=1).setup(part),
}

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in training": compiled_in_training,
    "compiled in place": compiled_in_place,
    "compiled forward": compiled_forward,
    "compiled block": compiled_block,
    "DataParallel": nn.DataParallel,
    "DataParallel, compiled": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "Fabric": lambda model: Fabric(accelerator="cpu", devices=1).setup(model),
    "averaged": AveragedModel,
    "checkpoint wrapper": checkpoint_wrapper,
    **{f"{name} in parts": in_part(wrap) for name, wrap in PARTS.items()},
    "compiled in parts, compiled": lambda model: torch.compile(in_part(PARTS["compiled"])(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_network_has_the_same_bits_and_names(wrapper: str) -> None:
    expected = fisher(network())
    model = WRAPPERS[wrapper](network())
    got = fisher(model)
    assert list(got.tensors) == list(expected.tensors)
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert got.zero == expected.zero
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("part", PARTS)
def test_names_are_those_of_the_checkpoint(part: str) -> None:
    model = in_part(PARTS[part])(network())
    names = [name for name, _ in network().named_parameters()]
    own = without_wrappers(model.state_dict(), network().state_dict()).tensors
    assert list(fisher(model).tensors) == [name for name in own if name in names] == names


def test_names_of_wrappers_that_tell_parameters_apart_stay() -> None:
    class Both(nn.DataParallel):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.bias = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x) + self.bias

    model = nn.Sequential(Both(nn.Conv3d(2, 1, 1)))
    assert list(fisher(model).tensors) == [name for name, _ in model.named_parameters()]


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [lambda wrap: wrap, in_part])
def test_distributed_data_parallel(process_group, wrap) -> None:
    expected = fisher(network())
    got = fisher(wrap(nn.parallel.DistributedDataParallel)(network()))
    assert list(got.tensors) == list(expected.tensors)
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.mark.filterwarnings("ignore:FSDP")
def test_parameters_that_are_spread_over_processes(process_group) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    with pytest.raises(InputError, match=r"expected whole parameters .*FSDP"):
        FisherAccumulator(FullyShardedDataParallel(network(), device_id=torch.device("cpu")))
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match=r"expected whole parameters .*FSDP"):
        FisherAccumulator(model)


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p.module(), lambda p: nn.Sequential(p.module())])
def test_exported_programs(make) -> None:
    program = torch.export.export(network().eval(), (X,))
    with pytest.raises(InputError, match=r"pass the network that it was exported from"):
        fisher(make(program))


SCRIPTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "traced": lambda model: torch.jit.trace(model.eval(), X[:1]),
    "scripted": torch.jit.script,
    "loaded": saved_and_loaded,
    "optimised": lambda model: _run_often(torch.jit.script(model)),
}


def _run_often(model: nn.Module) -> nn.Module:
    for _ in range(4):
        model.eval()(X).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return model.train()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_equals_the_network(script: str, single_example_loop, assert_same_fisher) -> None:
    wide = network().double()
    expected = single_example_loop(wide, X.double(), Y.double())
    model = SCRIPTS[script](network())
    training = model.training
    got = fisher(model)
    scale = max(float(tensor.max()) for tensor in expected.values())
    assert list(got.tensors) == list(expected)
    for name, tensor in expected.items():
        assert (got.tensors[name].double() - tensor).abs().max() < 1e-5 * scale, name
    assert model.training is training


def test_scripted_block_within_a_network() -> None:
    model = network().double()
    model[3] = torch.jit.script(model[3])
    expected = fisher_of_doubles(network().double())
    got = fisher_of_doubles(model)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, rtol=1e-10, atol=1e-16, msg=name)


def fisher_of_doubles(model: nn.Module) -> Fisher:
    accumulator = FisherAccumulator(model, labels="true")
    with accumulator:
        accumulator.update(X.double(), Y.double(), ["a", "b", "c"])
    return accumulator.result()


def test_scripts_whose_fisher_is_not_defined() -> None:
    frozen = torch.jit.freeze(torch.jit.script(network().eval()))
    with pytest.raises(InputError, match=r"got none: a frozen network, or one from torch\.jit\.freeze"):
        FisherAccumulator(frozen)
    batch = nn.Sequential(nn.Conv3d(2, 1, 3), nn.BatchNorm3d(1, track_running_stats=False))
    with pytest.raises(InputError, match=r"batch norm 1\.weight: expected running statistics"):
        FisherAccumulator(torch.jit.script(batch))


class Checkpointed(nn.Module):
    """`how`: whether the block is checkpointed, or all in one, in a row, or within one another."""

    def __init__(self, reentrant: bool | None, how: str = "block") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 1, 1)
        self.block = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1))
        self.reentrant, self.how = reentrant, how

    def forward(self, x: Tensor) -> Tensor:
        parts = nn.Sequential(self.stem, self.block, self.head)
        if self.how == "all":
            return self._through(parts, x)
        if self.how == "row":
            return self.head(checkpoint_sequential(parts[:2], 2, x, use_reentrant=self.reentrant))
        if self.how == "first":
            return self.head(self.block(self._through(self.stem, x)))
        if self.how == "nested":
            return self._through(lambda y: self.head(self.block(self._through(self.stem, y))), x)
        return self.head(self._through(self.block, self.stem(x)))

    def _through(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("how", ["block", "all", "row", "first", "nested"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_checkpoints(strict: bool, how: str) -> None:
    """A reentrant one hides its layers; behind one that begins at the images there is no graph at all."""
    expected = fisher(Checkpointed(None))
    got = fisher(Checkpointed(False, how), strict=strict)
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in expected.tensors.items())
    with pytest.raises(
        InputError, match=r"^model: expected activation checkpointing with use_reentrant=False"
    ):
        fisher(Checkpointed(True, how), strict=strict)


class Supervised(nn.Module):
    """Heads of coarser maps that are off, or compute what nobody reads."""

    def __init__(self, runs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.coarse = nn.Conv3d(2, 4, 3), nn.Conv3d(4, 1, 1), nn.Conv3d(4, 1, 1)
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        if self.runs:
            self.coarse(features[..., ::2, ::2, ::2])
        return self.head(features)


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_heads_of_deep_supervision_that_is_off(runs: bool, strict: bool) -> None:
    model = Supervised(runs)
    before = copy.deepcopy(model.state_dict())
    accumulator = FisherAccumulator(model, strict=strict)
    with accumulator:
        accumulator.update(X, None, ["a", "b", "c"])
    with pytest.warns(UserWarning, match=r"2 parameters .* F = 0: coarse\.weight, coarse\.bias"):
        got = accumulator.result()
    assert got.unused == ("coarse.weight", "coarse.bias")
    assert {accumulator.coverage()[name] for name in got.unused} == {"unused"}
    assert not got.tensors["coarse.weight"].any()
    assert got.tensors["head.weight"].all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class CutOff(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.spare = nn.Conv3d(2, 4, 3), nn.Conv3d(4, 1, 1), nn.Conv3d(4, 1, 1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return self.head(self.stem(x).detach())
        if self.how == "no_grad":
            with torch.no_grad():
                features = self.stem(x)
            return self.head(features)
        if self.how == "input as array":
            return self.head(self.stem(torch.from_numpy(x.numpy())).detach())
        if self.how == "numpy":
            return self.head(torch.from_numpy(self.stem(x).detach().numpy()))
        return self.head(nn.functional.conv3d(x, self.stem.weight.data, self.stem.bias.data))


@pytest.mark.parametrize("how", ["detach", "no_grad", "numpy", "input as array", "data"])
@pytest.mark.parametrize("strict", [False, True])
def test_parameters_that_are_cut_off_are_told_from_unused_ones(how: str, strict: bool) -> None:
    model = CutOff(how)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"got none for stem\.weight, stem\.bias: detach, no_grad"):
        fisher_of(model, strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.stem.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"spare\.weight, spare\.bias"):
        assert fisher_of(model, strict=False).unused == ("spare.weight", "spare.bias")


def fisher_of(model: nn.Module, strict: bool) -> Fisher:
    return estimate_fisher(model, [(X, None, ["a", "b", "c"])], strict=strict)


def test_parameters_that_one_example_alone_uses() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return (self.one if float(x.sum()) > 0 else self.other)(x)

    model, x = Switch(), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    got = estimate_fisher(model, [(x[n : n + 1], None, [str(n)]) for n in range(2)])
    assert got.unused == ()
    assert all(bool(tensor.any()) for tensor in got.tensors.values())
