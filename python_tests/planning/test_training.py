from dataclasses import replace
from math import prod

import pytest

from timm_ext.errors import InputError
from timm_ext.planning import Choice, Machine, configure_training, sliding_voxels
from timm_ext.planning.budget import GIB

LAPTOP, GPU = Machine("cpu", 8 * GIB), Machine("gpu", 24 * GIB)
ISENSEE = {"name": "isensee2017", "in_channels": 2, "out_channels": 7, "options": {}}
SEGRESNET = {**ISENSEE, "name": "monai.SegResNet"}
HEAD, HIPPOCAMPUS, SLICES = (140, 175, 140), (36, 50, 36), (240, 240, 24)


def configured(shape, machine=LAPTOP, *, spacing=(1.0, 1.0, 1.0), network=ISENSEE, cases=20, **choice):
    return configure_training([shape] * cases, [shape] * 4, spacing, machine, Choice(network, **choice))


@pytest.mark.parametrize("network", [ISENSEE, SEGRESNET], ids=lambda network: network["name"])
@pytest.mark.parametrize("shape", [HEAD, HIPPOCAMPUS, SLICES, (7, 9, 8), (600, 600, 600)], ids=str)
@pytest.mark.parametrize("machine", [LAPTOP, GPU], ids=lambda machine: machine.kind)
def test_a_configuration_fits_machine_network_and_data(network, shape, machine):
    made = configured(shape, machine, network=network)
    divisor = made.footprint.divisor
    assert all(edge % divisor == 0 for edge in made.patch)
    assert all(edge < length + 2 * divisor for edge, length in zip(made.patch, shape, strict=True))
    assert made.step_bytes <= machine.step_bytes
    assert made.footprint.flops * made.voxels <= machine.step_flops
    assert made == configured(shape, machine, network=network)


def test_the_depth_leaves_four_voxels_on_the_coarsest_grid():
    for shape, levels in ((HEAD, 5), (HIPPOCAMPUS, 4), (SLICES, 3), ((7, 9, 8), 2)):
        made = configured(shape, GPU)
        assert made.network["options"]["levels"] == levels
        assert min(made.patch) >= 4 << (levels - 1) or levels == 2
    assert configured(SLICES, network={**ISENSEE, "options": {"levels": 4}}).network["options"]["levels"] == 4
    assert configured(SLICES, network=ISENSEE, fixed=True).network["options"]["levels"] == 5


def test_a_patch_covers_alike_shares_of_the_volume():
    made = configured((128, 256, 128))
    shares = [edge / length for edge, length in zip(made.patch, (128, 256, 128), strict=True)]
    assert max(shares) < 1.6 * min(shares)
    thick = configured((512, 512, 200), spacing=(0.5, 0.5, 2.5))
    assert thick.patch[2] < thick.patch[0]


def test_small_volumes_are_taken_whole():
    assert configured(HIPPOCAMPUS).patch == (40, 56, 40)


def test_room_on_a_gpu_makes_larger_batches_but_not_beyond_a_share_of_the_data():
    assert configured(HIPPOCAMPUS, cases=200).batch_size == 2
    roomy = configured(HIPPOCAMPUS, GPU, cases=200)
    assert 4 < roomy.batch_size <= 0.05 * 200
    assert configured(HIPPOCAMPUS, GPU, cases=5).batch_size == 2


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_a_batch_is_a_multiple_of_the_devices(devices):
    made = configured(HEAD, replace(GPU, devices=devices), cases=200)
    assert made.batch_size % devices == 0
    assert made.batch_size >= 2
    assert made.step_bytes <= GPU.step_bytes


def test_processes_share_the_memory_of_a_cpu():
    made = configured(HEAD, Machine("cpu", 8 * GIB, devices=4), cases=200)
    assert made.step_bytes <= 8 * GIB / 4 / 4
    assert made.batch_size == 4


def test_validations_take_no_more_than_a_fifth_of_the_time():
    for shape in (HEAD, HIPPOCAMPUS):
        for machine in (LAPTOP, GPU):
            made = configured(shape, machine)
            assert made.validation_in_steps <= made.validate_every / 4
            assert made.validate_every >= 20 / made.batch_size


def test_steps_are_500_epochs_within_the_limits_of_a_machine():
    assert configured(HIPPOCAMPUS, cases=2).steps == 1000
    assert configured(HIPPOCAMPUS, cases=6).steps == 1500
    assert configured(HIPPOCAMPUS, cases=2000).steps == 5000
    assert configured(HIPPOCAMPUS, cases=6, share=0.2).steps == 300


def test_what_is_decided_stays():
    made = configured(HEAD, patch=(32, 48, 32), batch_size=3, steps=7)
    assert (made.patch, made.batch_size, made.steps) == ((32, 48, 32), 3, 7)
    assert made.network["options"]["levels"] == 4
    assert made.validate_every <= 7
    whole = configured(HIPPOCAMPUS, whole=True)
    assert (whole.patch, whole.size, whole.network["options"]["levels"]) == (None, (48, 64, 48), 5)
    with pytest.raises(InputError, match=r"divisible by 16 \(got \[32, 40, 32\]\)"):
        configured(HEAD, patch=(32, 40, 32), fixed=True)


def test_windows_of_a_volume():
    assert sliding_voxels((60, 60, 60), None, 8) == 64**3
    assert sliding_voxels((60, 60, 60), (64, 64, 64), 8) == 64**3
    # 100 voxels by windows of 64 that overlap by half: three along each axis, as MONAI cuts them
    assert sliding_voxels((100, 64, 64), (64, 64, 64), 8) == 3 * 64**3


def test_like_machines_plan_alike():
    for first, second in ((9, 15), (16, 64)):
        one, two = (Machine("cpu", size * GIB) for size in (first, second))
        assert configured(HEAD, one) == configured(HEAD, two)
    assert prod(configured(HEAD, Machine("cpu", 2 * GIB)).patch) < prod(configured(HEAD).patch)
