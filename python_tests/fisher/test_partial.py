"""Interrupted estimates go on where they were."""

import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.fisher import estimate_fisher, remove_partial


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


def test_an_interrupt_saves_what_is_there(model, tmp_path):
    path = tmp_path / "F.partial"
    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model, interrupted(batches(), 3, KeyboardInterrupt()), partial=path, save_every=1e9)
    assert path.exists()


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


def test_other_batches_are_refused(model, interrupted_after_one):
    x = torch.cat([batch[0] for batch in batches()])
    other = [(x[:3], None, ["case0", "case1", "case2"])]
    with pytest.raises(
        InputError, match=r"F\.partial: expected the batches .* \(got others in example case2;"
    ):
        estimate_fisher(model, other, partial=interrupted_after_one)


def test_other_images_of_the_same_names_are_refused(model, interrupted_after_one):
    (x, y, ids), *rest = batches()
    with pytest.raises(
        InputError, match=r"and the data of the interrupted run \(got others in example case1;"
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
