"""Interrupted estimates go on where they were."""

import pytest
import torch
from torch import nn

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.errors import InputError
from timm_ext.fisher import estimate_fisher, micro_batch, remove_partial


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True), nn.Conv2d(3, 1, 1))


def batches(count=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * count, 2, 6, 6, generator=generator)
    return [(x[n : n + 2], None, [f"case{n}", f"case{n + 1}"]) for n in range(0, 2 * count, 2)]


def interrupted(data, after, error):
    yield from data[:after]
    raise error


def assert_same_bits(one, other):
    assert one.count == other.count
    assert one.zero == other.zero
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk went away")])
def test_a_second_run_gives_the_same_bits(model, tmp_path, error):
    path = tmp_path / "F.partial"
    with pytest.raises(type(error)):
        estimate_fisher(model, interrupted(batches(), 4, error), partial=path, save_every=0)
    seen = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    resumed = estimate_fisher(model, batches(), partial=path)
    handle.remove()
    assert sum(seen) < 12, "examples of the first run were computed again"
    assert_same_bits(resumed, estimate_fisher(model, batches()))
    assert path.exists()
    remove_partial(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_saves_what_is_there(model, tmp_path, end):
    path = tmp_path / "F.partial"
    with pytest.raises(end):
        estimate_fisher(model, interrupted(batches(), 3, end()), partial=path, save_every=1e9)
    assert len(load_checkpoint(path).metadata["partial"]["examples"]) == 6


def test_nothing_is_written_before_it_is_due(model, tmp_path):
    path = tmp_path / "F.partial"
    estimate_fisher(model, batches(), partial=path, save_every=1e9)
    assert not path.exists()


def test_a_finished_estimate_is_not_computed_again(model, tmp_path):
    path = tmp_path / "F.partial"
    first = estimate_fisher(model, batches(), partial=path, save_every=0)
    assert_same_bits(estimate_fisher(model, batches(), partial=path), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, r"F\.partial: expected an estimate with these settings, .*seed=7.* \(got .*seed=0"),
        ({"samples": 2}, r"expected an estimate with these settings"),
    ],
)
def test_other_settings_are_refused(model, tmp_path, change, message):
    path = tmp_path / "F.partial"
    estimate_fisher(model, batches(), partial=path, save_every=0)
    with pytest.raises(InputError, match=message):
        estimate_fisher(model, batches(), partial=path, **change)


def test_another_model_is_refused(model, tmp_path):
    path = tmp_path / "F.partial"
    estimate_fisher(model, batches(), partial=path, save_every=0)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(InputError, match=r"expected an estimate with this model, .*delete the file"):
        estimate_fisher(model, batches(), partial=path)


@pytest.fixture
def interrupted_after_one(model, tmp_path):
    path = tmp_path / "F.partial"
    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model, interrupted(batches(), 1, KeyboardInterrupt()), partial=path)
    return path


def test_other_batches_change_the_rounding_alone(model, interrupted_after_one, assert_same_fisher):
    """Examples that the first run has seen are left out of the batches in which they come."""
    x = torch.cat([batch[0] for batch in batches()])
    other = [(x[n : n + 3], None, [f"case{m}" for m in range(n, n + 3)]) for n in range(0, 12, 3)]
    resumed = estimate_fisher(model, other, partial=interrupted_after_one)
    assert resumed.count == 12
    assert_same_fisher(resumed.tensors, estimate_fisher(model, batches()).tensors, relative=1e-5)


def test_a_batch_that_was_interrupted_half_way(model, tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batch, "examples_at_a_time", lambda x, parameters: 1)
    x = torch.cat([batch[0] for batch in batches()])
    y = (x[:, :1] > 0).float()
    data = [(x[n : n + 4], y[n : n + 4], [f"case{m}" for m in range(n, n + 4)]) for n in range(0, 12, 4)]
    expected = estimate_fisher(model, data, labels="true")
    path, passes = tmp_path / "F.partial", []

    def stop(module, inputs, output):
        passes.append(len(inputs[0]))
        if len(passes) == 8:  # two of them are the checks of the first example alone
            raise KeyboardInterrupt

    handle = model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model, data, labels="true", partial=path)
    handle.remove()
    assert_same_bits(estimate_fisher(model, data, labels="true", partial=path), expected)


def test_a_part_of_a_batch_with_labels_that_cannot_be_divided(model, interrupted_after_one):
    def likelihood(logits, target):
        return -(logits.flatten(1) - torch.tensor(target)[:, None]).square().sum(1)

    options = {"likelihood": likelihood, "labels": "true"}
    interrupted_after_one.unlink()
    data = [(x, [0.0, 1.0], ids) for x, _, ids in batches()]
    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(
            model, interrupted(data, 1, KeyboardInterrupt()), partial=interrupted_after_one, **options
        )
    x = torch.cat([batch[0] for batch in data])
    mixed = [(x[:3], [0.0, 1.0, 0.0], ["case0", "case1", "case2"])]
    with pytest.raises(InputError, match=r"the batches of the interrupted run \(got case0, case1 together"):
        estimate_fisher(model, mixed, partial=interrupted_after_one, **options)


def test_other_images_of_the_same_names_are_refused(model, interrupted_after_one):
    (x, y, ids), *rest = batches()
    with pytest.raises(
        InputError, match=r"expected the data of the interrupted run \(got others in example case1;"
    ):
        estimate_fisher(
            model,
            [(x + torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), y, ids), *rest],
            partial=interrupted_after_one,
        )


def test_other_labels_are_refused(model, tmp_path):
    path = tmp_path / "F.partial"
    labelled = [(x, torch.zeros(2, 1, 6, 6), ids) for x, _, ids in batches()]
    estimate_fisher(model, labelled, labels="true", partial=path, save_every=0)
    labelled[2][1][0] = 1
    with pytest.raises(InputError, match=r"got others in example case4;"):
        estimate_fisher(model, labelled, labels="true", partial=path)


def test_examples_that_are_gone_are_named(model, interrupted_after_one):
    with pytest.raises(InputError, match=r"got none of the examples case0, case1;"):
        estimate_fisher(model, batches()[1:], partial=interrupted_after_one)


def test_a_damaged_file_is_refused(model, tmp_path):
    path = tmp_path / "F.partial"
    path.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match=r"F\.partial"):
        estimate_fisher(model, batches(), partial=path)


DROPPED = object()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": DROPPED}, r"F\.partial: examples: "),
        ({"examples": ["case0"]}, r"F\.partial: examples: "),
        ({"examples": {"case0": 7}}, r"F\.partial: examples\.case0: .* \(got 7\)"),
        ({"examples": {}}, r"expected the sums of an interrupted estimate"),
        ({"coverage": {"0.weight": "rule"}}, r"F\.partial: coverage\.0\.weight: .*"),
        ({"coverage": {"9.weight": ["rule"]}}, r"expected the sums .* in 9\.weight;"),
        ({"zero": None}, r"expected the sums of an interrupted estimate \(got other ones;"),
        ({"zero": ["9.bias"]}, r"expected the sums .* in 9\.bias;"),
        ({"settings": 3}, r"F\.partial: settings: .* \(got 3\)"),
        ({"model": None}, r"F\.partial: model: .* \(got None\)"),
    ],
)
def test_foreign_metadata_are_refused(model, interrupted_after_one, change, message):
    checkpoint = load_checkpoint(interrupted_after_one)
    about = {
        key: value
        for key, value in {**checkpoint.metadata["partial"], **change}.items()
        if value is not DROPPED
    }
    save_checkpoint(interrupted_after_one, checkpoint.tensors, kind="fisher-partial", partial=about)
    with pytest.raises(InputError, match=message):
        estimate_fisher(model, batches(), partial=interrupted_after_one)


@pytest.mark.parametrize("about", [None, [], "x", 3, {}])
def test_missing_metadata_are_refused(model, interrupted_after_one, about):
    checkpoint = load_checkpoint(interrupted_after_one)
    save_checkpoint(interrupted_after_one, checkpoint.tensors, kind="fisher-partial", partial=about)
    with pytest.raises(InputError, match=r"F\.partial"):
        estimate_fisher(model, batches(), partial=interrupted_after_one)


@pytest.mark.parametrize(
    "change",
    [
        lambda sums: sums.pop("0.weight"),
        lambda sums: sums.update(extra=torch.ones(1)),
        lambda sums: sums.update({"0.bias": torch.ones(1)}),
        lambda sums: sums.update({"0.bias": sums["0.bias"].double()}),
        lambda sums: sums.update({"0.bias": sums["0.bias"] - 1e9}),
        lambda sums: sums.update({"0.bias": sums["0.bias"] * float("nan")}),
    ],
)
def test_foreign_sums_are_refused(model, interrupted_after_one, change):
    checkpoint = load_checkpoint(interrupted_after_one)
    change(checkpoint.tensors)
    save_checkpoint(
        interrupted_after_one,
        checkpoint.tensors,
        kind="fisher-partial",
        partial=checkpoint.metadata["partial"],
    )
    with pytest.raises(InputError, match=r"expected the sums of an interrupted estimate \(got other ones in"):
        estimate_fisher(model, batches(), partial=interrupted_after_one)
