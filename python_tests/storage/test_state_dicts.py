"""Tensors of a network in the files of training tools: where they lie, and under which names."""

import argparse
import datetime
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from timm_ext.checkpoint import describe, load_checkpoint
from timm_ext.errors import InputError
from timm_ext.networks import build_network, load_network
from timm_ext.storage.state_dicts import without_wrappers

State = dict[str, Tensor]
UNET = {"channels": [2, 4], "strides": [2], "num_res_units": 1, "norm": "batch"}
CONFIGS = {
    "isensee2017": {"base_filters": 2, "levels": 3},
    "monai.UNet": UNET,  # whose tensors begin with `model.` themselves
    "monai.DynUNet": {  # which registers its layers under several names
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [2, 4, 8],
    },
}


def config_of(name: str) -> dict[str, object]:
    return {"name": name, "in_channels": 1, "out_channels": 2, "options": CONFIGS[name]}


def state_of(name: str) -> State:
    return dict(build_network(name, in_channels=1, out_channels=2, seed=3, **CONFIGS[name]).state_dict())


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def in_parts(part: str, state: State) -> State:
    """A wrapper around every module but the outermost."""
    return {f".{part}.".join(name.rsplit(".", 1)): tensor for name, tensor in state.items()}


class Averaged(nn.Module):
    """As PyTorch's AveragedModel registers it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        self.register_buffer("n_averaged", torch.tensor(7))


MOMENTS = {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4.0)}}
OPTIMIZER = {"state": MOMENTS, "param_groups": [{"lr": 1.0}]}
ARGUMENTS = argparse.Namespace(folder=Path("x"), day=datetime.date(2024, 1, 2))
LIGHTNING = {
    "epoch": 3,
    "global_step": 9,
    "pytorch-lightning_version": "2.4.0",
    "optimizer_states": [OPTIMIZER],
    "lr_schedulers": [],
    "loops": {"fit_loop": {"state_dict": {}}},
    "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.3), "best": torch.ones(2)}},
    "hyper_parameters": {
        "lr": 1e-3,
        "args": ARGUMENTS,
    },
}

TOOLS: dict[str, Callable[[State], object]] = {
    "plain": lambda s: s,
    "lightning": lambda s: LIGHTNING | {"state_dict": under("model.", s)},
    "lightning, other attribute": lambda s: LIGHTNING | {"state_dict": under("_segmenter.", s)},
    "lightning, with a loss": lambda s: LIGHTNING
    | {"state_dict": under("net.", s) | {"loss.weight": torch.ones(2), "loss.ce.weight": torch.ones(2)}},
    "lightning, averaged beside": lambda s: LIGHTNING
    | {"state_dict": under("model.", s) | under("ema_model.", {n: t * 0 for n, t in s.items()})},
    "lightning, compiled": lambda s: {"state_dict": under("model._orig_mod.", s)},
    "lightning, DeepSpeed": lambda s: {"module": under("_forward_module.model.", s), "optimizer": OPTIMIZER},
    "DDP of compiled": lambda s: {"model": under("module._orig_mod.", s), "optimizer": OPTIMIZER},
    "compiled DDP": lambda s: {"model_state_dict": under("_orig_mod.module.", s), "loss": 0.3},
    "DataParallel three times": lambda s: under("module.module.module.", s),
    "FSDP": lambda s: {"model": under("_fsdp_wrapped_module.", in_parts("_fsdp_wrapped_module", s))},
    "activation checkpoints": lambda s: {"network": in_parts("_checkpoint_wrapped_module", s)},
    "compiled by parts": lambda s: in_parts("_orig_mod", s),
    "stochastic weight averages": lambda s: {"n_averaged": torch.tensor(3), **under("module.", s)},
    "averages in a record": lambda s: {"averaged": under("module.", s), "epoch": torch.tensor(3)},
    "averages alone": lambda s: {"initted": torch.tensor(True)} | under("ema_model.", s),
    "averages beside the online network": lambda s: {"step": torch.tensor(5)}
    | under("online_model.", {n: t * 0 for n, t in s.items()})
    | under("ema_model.", s),
    "MONAI's saver": lambda s: {"network": s, "optimizer": OPTIMIZER, "trainer": {"epoch": 3}},
    "MONAI's research": lambda s: {"epoch": 3, "best_acc": 0.9, "state_dict": s, "scheduler": MOMENTS},
    "nnU-Net": lambda s: {
        "network_weights": OrderedDict(s),
        "grad_scaler_state": None,
        "logging": {"ema": [np.float64(0.5)], "curve": np.arange(4.0)},
        "init_args": {"plans": {"x": [1, 2]}},
    },
    "two levels": lambda s: {"state": {"model": under("module.", s), "optimizers": OPTIMIZER}},
    "state within the model": lambda s: {"model": {"state_dict": s, "arch": "unet"}},
}  # fmt: skip


@pytest.mark.parametrize("network", CONFIGS)
@pytest.mark.parametrize("tool", TOOLS)
def test_files_of_training_tools_give_the_network(tmp_path: Path, tool: str, network: str) -> None:
    state = state_of(network)
    torch.save(TOOLS[tool](state), tmp_path / "x.ckpt")
    model, checkpoint = load_network(tmp_path / "x.ckpt", network=config_of(network))
    got = model.state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in state.items())
    assert bool(checkpoint.notes) == (tool not in ("plain", "nnU-Net"))  # whose place is told by its keys


@pytest.mark.parametrize("tool", TOOLS)
def test_without_the_network_only_what_no_network_is_called_goes(tmp_path: Path, tool: str) -> None:
    state = state_of("monai.UNet")
    torch.save(TOOLS[tool](state), tmp_path / "x.ckpt")
    got = load_checkpoint(tmp_path / "x.ckpt").tensors
    lost = [name for name in state if not any(key == name or key.endswith(f".{name}") for key in got)]
    assert not lost
    if "lightning" not in tool:
        assert got.keys() == state.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x"])
@pytest.mark.parametrize("form", ["safetensors", "zip", "pickle"])
def test_suffixes_do_not_matter(tmp_path: Path, name: str, form: str) -> None:
    state = state_of("isensee2017")
    if form == "safetensors":
        save_file(under("module.", state), tmp_path / name)
    else:
        torch.save(under("module.", state), tmp_path / name, _use_new_zipfile_serialization=form == "zip")
    if name == "x" and form == "pickle":
        assert (tmp_path / name).read_bytes()[:1] == b"\x80"
    model, _ = load_network(tmp_path / name, network=config_of("isensee2017"))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())


def test_what_was_taken_off_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_of("isensee2017")
    content = {"state_dict": under("model._orig_mod.", state) | {"loss.weight": torch.ones(2)}, "ema": state}
    torch.save(content, tmp_path / "x.ckpt")
    _, checkpoint = load_network(tmp_path / "x.ckpt", network=config_of("isensee2017"))
    assert checkpoint.notes == (
        "taken from 'state_dict'",
        "'_orig_mod.', 'model.' taken off the names",
        "left out: loss.weight",
        "left alone: ema",
    )
    torch.save(under("module.", state), tmp_path / "y.ckpt")
    assert describe(load_checkpoint(tmp_path / "y.ckpt"))["notes"] == ["'module.' taken off the names"]


def test_parts_called_module_go_where_the_network_is_known(tmp_path: Path) -> None:
    state = state_of("monai.UNet")
    torch.save(in_parts("module", state) | {"loss.weight": torch.ones(2)}, tmp_path / "x.pt")
    model, checkpoint = load_network(tmp_path / "x.pt", network=config_of("monai.UNet"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert checkpoint.notes == ("'module.' taken off the names", "left out: loss.weight")
    assert load_checkpoint(tmp_path / "x.pt").tensors.keys() == {*in_parts("module", state), "loss.weight"}
    own = {"a.module.weight": torch.ones(1)}
    assert without_wrappers({"module.a.module.weight": torch.ones(1)}, own).tensors.keys() == own.keys()


def test_networks_own_parts_stay() -> None:
    tensors = {name: torch.ones(1) for name in ("module.a", "_orig_mod.b", "model.c")}
    for names in (tensors, None):
        got = without_wrappers(tensors, names)
        if names:
            assert got.tensors.keys() == tensors.keys()
            assert got.notes == ()
    alike = {"a._orig_mod.w": torch.ones(1), "a.w": torch.ones(1)}
    assert without_wrappers(alike).tensors.keys() == alike.keys()


def broken(change: Callable[[State], object]) -> Callable[[State], object]:
    def make(state: State) -> object:
        return change(dict(state)) or state

    return make


def drop_first(state: State) -> State:
    return {name: state[name] for name in list(state)[1:]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: under("model.", drop_first(s)), r"got 1 that differ: 1 are missing.*'model.' taken off"),
        (lambda s: s | {"total_ops": torch.zeros(1)}, "1 are unknown; .*counters of a tool.*\n.*total_ops"),
        (lambda s: {n: t.half() for n, t in s.items()}, "stored as float16; convert"),
        (
            lambda s: {n: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for n, t in s.items()},
            "stored as float8_e4m3fn; convert",
        ),
        (
            lambda s: {n: t.bfloat16() if t.ndim > 1 else t for n, t in s.items()},
            "stored as bfloat16; convert",
        ),
        (lambda s: {n: t[..., :1] for n, t in s.items()}, "other shapes; other numbers of channels"),
        (
            lambda s: {f"{i}": t for i, t in enumerate(s.values())},
            "no name in common, such as 0 in place of encoder.0.entry.conv.weight; a prefix, or another",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_explained_and_few_are_listed(
    tmp_path: Path, change: Callable[[State], object], message: str
) -> None:
    torch.save(change(state_of("isensee2017")), tmp_path / "x.pt")
    with pytest.raises(InputError, match=message) as error:
        load_network(tmp_path / "x.pt", network=config_of("isensee2017"))
    assert len(str(error.value).splitlines()) <= 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"generator": {"w": torch.ones(2)}, "critic": {"w": torch.ones(2)}},
            "several sets: generator, critic",
        ),
        ({"fsdp._flat_param": torch.ones(9)}, "flattened shards of FSDP"),
        ({"w": torch.ones(3).to_sparse()}, "expected dense tensors"),
        ({"w": torch.zeros(1).expand(10**12)}, "1 tensors.* of memory"),
        ({"epoch": 3, "state": {0: {"exp_avg": torch.ones(2)}}}, "got dict with 'epoch', 'state'"),
        (
            {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"w": torch.ones(2)}}}}}}}}},
            "expected tensors by name",
        ),
    ],
)
def test_contents_without_one_network_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "x.pt")


def other(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


SEVERAL: dict[str, Callable[[State, State], object]] = {
    "A, B": lambda s, t: {"A": s, "B": t},
    "last, best": lambda s, t: {"last": s, "best": t},
    "a.b, a.b": lambda s, t: {"a.b": s, "a": {"b": t}},
    "previous.state_dict, current.state_dict": lambda s, t: {
        "previous": {"state_dict": s},
        "current": {"state_dict": t},
    },
    "model, best_model": lambda s, t: {"model": s, "best_model": t, "epoch": 3},
    "semantic, instance": lambda s, t: {"semantic": s, "instance": t},
    "online, target": lambda s, t: {"online": s, "target": t},
    "ema, swa": lambda s, t: {"ema": s, "swa": t},
    "net1., net2.": lambda s, t: {"state_dict": under("net1.", s) | under("net2.", t)},
    "online., target.": lambda s, t: under("online.", s) | under("target.", t),
    "model., no prefix": lambda s, t: under("model.", s) | t,
}


@pytest.mark.parametrize("sets", SEVERAL)
def test_of_several_sets_of_one_network_none_is_taken_unless_they_are_equal(
    tmp_path: Path, sets: str
) -> None:
    state, network = state_of("isensee2017"), config_of("isensee2017")
    torch.save(SEVERAL[sets](state, other(state)), tmp_path / "x.pt")
    message = re.escape(f"x.pt: expected the tensors of one network (got several sets: {sets})") + "$"
    with pytest.raises(InputError, match=message):
        load_network(tmp_path / "x.pt", network=network)
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "x.pt", names=list(state))
    torch.save(SEVERAL[sets](state, {n: t.clone() for n, t in state.items()}), tmp_path / "x.pt")
    model, _ = load_network(tmp_path / "x.pt", network=network)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda s, t: {"ema": t, "model": s},
        lambda s, t: {"teacher": {"state_dict": t}, "student": {"state_dict": s}},
        lambda s, t: {"params_ema": t, "params": s},
        lambda s, t: under("teacher.", t) | under("student.", s),
        lambda s, t: {"online": t, "ema": s},
    ],
)
def test_averaged_weights_give_way_to_others(tmp_path: Path, make: Callable[[State, State], object]) -> None:
    state = state_of("isensee2017")
    torch.save(make(state, other(state)), tmp_path / "x.pt")
    model, _ = load_network(tmp_path / "x.pt", network=config_of("isensee2017"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_several_networks_in_a_safetensors_file_are_named_with_it(tmp_path: Path) -> None:
    state = state_of("isensee2017")
    save_file(under("net1.", state) | under("net2.", other(state)), tmp_path / "x.safetensors")
    with pytest.raises(
        InputError, match=r"x\.safetensors: expected .* \(got several sets: net1\., net2\.\)$"
    ):
        load_network(tmp_path / "x.safetensors", network=config_of("isensee2017"))


def test_a_usual_place_says_nothing_beside_another_set_of_the_same_names(tmp_path: Path) -> None:
    content = {"state_dict": {"w": torch.ones(2)}, "best": {"w": torch.zeros(2)}}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"\(got several sets: state_dict, best\)$"):
        load_checkpoint(tmp_path / "x.pt")


def test_programs_are_named_with_what_to_pass_instead(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv3d(1, 1, 1))
    torch.jit.script(net).save(tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"got a TorchScript program\); pass a file of its state_dict"):
        load_checkpoint(tmp_path / "x.pt")
    torch.export.save(torch.export.export(net, (torch.zeros(1, 1, 2, 2, 2),)), tmp_path / "x.pt2")
    with pytest.raises(InputError, match=r"got an exported program\); pass a file of its state_dict"):
        load_checkpoint(tmp_path / "x.pt2")
