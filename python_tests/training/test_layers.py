"""`TrainSettings.fast_layers`: which layers a training goes by, whatever its model is made of."""

import copy
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import timm_ext
from timm_ext.errors import InputError
from timm_ext.layers import fast as layers
from timm_ext.layers.fast import _Volumes
from timm_ext.layers.tape import Call
from timm_ext.training.callbacks import Callback
from timm_ext.training.examples import BatchOrder, Data, dropout_seed, training_batches
from timm_ext.training.objective import soft_dice_loss
from timm_ext.training.settings import TrainSettings
from timm_ext.training.state import load_state, save_state
from timm_ext.training.trainer import Trainer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from examples_for_tests import Blobs, settings, small_network  # noqa: E402

STEPS = 4


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def by_hand(model: nn.Module, chosen: TrainSettings, *, fast: bool) -> nn.Module:
    """Train as the trainer does, in a plain loop."""
    optimizer, loss = torch.optim.Adam(model.parameters(), chosen.lr, fused=True), soft_dice_loss()
    order = BatchOrder(3, chosen, range(STEPS))
    for step, batch in enumerate(training_batches(Blobs(3), order, 0)):
        torch.manual_seed(dropout_seed(chosen.seed, step, 0))
        optimizer.zero_grad()
        with timm_ext.fast_layers() if fast else nullcontext():
            loss(model.train()(batch["image"]), batch["target"]).backward()
        optimizer.step()
    return model


def trained(model: nn.Module, folder: Path, *callbacks: Callback, **changes: object) -> nn.Module:
    data = Data(Blobs(3), Blobs(2, first=50))
    Trainer(settings(steps=STEPS, keep="last", **changes), folder).fit(model, data, callbacks=callbacks)
    return model


def test_the_switch_gives_the_bits_of_either_way(tmp_path: Path) -> None:
    found = {fast: trained(small_network(), tmp_path / str(fast), fast_layers=fast) for fast in (False, True)}
    for fast, model in found.items():
        assert torch.equal(weights(model), weights(by_hand(small_network(), settings(), fast=fast)))
    assert not torch.equal(weights(found[False]), weights(found[True]))
    assert torch.equal(weights(trained(small_network(), tmp_path / "default")), weights(found[True]))


class Watched(nn.Module):
    """A network that notes how its convolutions were called, by the modes that were active."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()
        self.fast: dict[bool, set[bool]] = {True: set(), False: set()}

    def forward(self, images: Tensor) -> Tensor:
        modes = torch.overrides._get_current_function_mode_stack()
        if type(images) is Tensor:  # not those without values, which the checks before a run take
            self.fast[self.training].add(any("Fast" in type(mode).__name__ for mode in modes))
        return self.network(images)


@pytest.mark.parametrize("fast", [True, False])
def test_validations_go_by_the_same_layers(tmp_path: Path, fast: bool) -> None:
    model = trained(Watched(), tmp_path, fast_layers=fast)
    assert model.fast == {True: {fast}, False: {fast}}


@pytest.mark.parametrize(("begun", "now"), [(True, False), (False, True)])
def test_a_run_of_the_other_layers_is_told(tmp_path: Path, begun: bool, now: bool) -> None:
    trained(small_network(), tmp_path, fast_layers=begun)
    chosen = settings(steps=9, keep="last", fast_layers=now)
    with pytest.raises(InputError, match=rf"other settings: fast_layers {begun}, now {now}$"):
        Trainer(chosen, tmp_path).fit(small_network(), Data(Blobs(3), Blobs(2, first=50)), resume=True)


def test_a_state_that_does_not_say_is_of_pytorchs_layers(tmp_path: Path) -> None:
    trained(small_network(), tmp_path, fast_layers=False)
    state = load_state(tmp_path / "state.pt")
    del state["settings"]["fast_layers"]
    save_state(tmp_path / "state.pt", state)
    data = Data(Blobs(3), Blobs(2, first=50))
    with pytest.raises(InputError, match="fast_layers False, now True"):
        Trainer(settings(steps=6, keep="last"), tmp_path).fit(small_network(), data, resume=True)
    found = Trainer(settings(steps=6, keep="last", fast_layers=False), tmp_path)
    assert len(found.fit(small_network(), data, resume=True).rows) == 6


class Checkpointed(nn.Module):
    """A network whose forward is computed again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.network, self.reentrant = small_network(), reentrant

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return self.network(images)
        return checkpoint(self.network, images.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_models_train_as_others(tmp_path: Path, reentrant: bool) -> None:
    plain = trained(small_network(), tmp_path / "plain")
    assert torch.equal(weights(trained(Checkpointed(reentrant), tmp_path / "saving")), weights(plain))


def training_of_a_compiled_model(folder: Path) -> tuple[int, int, float]:
    """Return the layers that ours claimed of a compiled and of a plain model, and how far these end apart."""
    claims: list[torch.Size] = []

    class Noting(_Volumes):
        def claim(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Call | None:
            claims.append(input.shape)
            return super().claim(input, weight, bias)

    layers._Volumes = Noting  # type: ignore[misc]
    model = torch.compile(small_network(dropout=0.0), backend="aot_eager")
    found = weights(trained(model, folder / "compiled"))
    compiled = len(claims)
    ours = weights(trained(small_network(dropout=0.0), folder / "ours"))
    start = weights(small_network(dropout=0.0))
    return compiled, len(claims) - compiled, float((found - ours).norm() / (ours - start).norm())


@pytest.mark.slow
def test_compiled_models_train_by_the_layers_of_the_compiler(tmp_path: Path) -> None:
    """The compiler sees the network itself, so that there is nothing for the layers to take.

    In a process of its own: what was compiled before decides whether the compiler takes a network once more.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        compiled, plain, apart = pool.submit(training_of_a_compiled_model, tmp_path).result()
    assert compiled == 0
    assert plain > 0
    assert apart < 0.1  # Adam's first steps are signs: rounding turns some of them


class Averaging(Callback):
    """An exponential moving average of a model's weights, beside the run."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.average = AveragedModel(model, avg_fn=lambda mean, value, count: 0.5 * mean + 0.5 * value)

    def on_step(self, step: int, loss: float) -> None:
        self.average.update_parameters(self.model)


def test_averages_of_the_weights_follow_the_run(tmp_path: Path) -> None:
    model = small_network()
    watch = Averaging(model)
    trained(model, tmp_path / "watched", watch)
    alone = trained(small_network(), tmp_path / "alone")
    assert torch.equal(weights(model), weights(alone))
    first, last = weights(small_network()), weights(model)
    between = weights(watch.average.module)
    assert 0 < (between - last).norm() < (first - last).norm()


def test_hooks_change_gradients_as_they_do_elsewhere(tmp_path: Path) -> None:
    """A hook of a weight, and one of a module that sees the gradients around it."""

    def hooked(seen: list[Tensor]) -> nn.Module:
        model = small_network()
        weight = next(value for value in model.parameters() if value.dim() == 5)
        weight.register_hook(lambda grad: grad.sign())
        layer = next(module for module in model.modules() if isinstance(module, nn.Conv3d))
        layer.register_full_backward_hook(lambda module, below, above: seen.append(above[0].clone()))
        layer.register_forward_pre_hook(lambda module, given: (given[0].requires_grad_(),))
        return model

    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    found = {fast: trained(hooked(seen[fast]), tmp_path / str(fast), fast_layers=fast) for fast in seen}
    assert len(seen[True]) == len(seen[False]) == STEPS
    assert (seen[True][0] - seen[False][0]).norm() < 1e-5 * seen[False][0].norm()
    expected = by_hand(hooked([]), settings(), fast=True)
    assert torch.equal(weights(found[True]), weights(expected))


def test_frozen_parts_stay(tmp_path: Path) -> None:
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    heads = {"name": "heads", "params": list(model.heads.parameters())}
    data = Data(Blobs(3))
    Trainer(settings(steps=STEPS), tmp_path).fit(model, data, parameter_groups=[heads])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"heads.{name}" for name, _ in model.heads.named_parameters()}


def test_threads_do_not_change_gradients_of_a_step(tmp_path: Path) -> None:
    """Of the layers; the loss is PyTorch's."""
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(weights(trained(small_network(), tmp_path / str(count))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
