import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from timm_ext.data.tasks import get_task
from timm_ext.errors import InputError
from timm_ext.training.examples import BatchOrder, dropout_seed, epoch_order, region_names, training_batches

sys.path.insert(0, str(Path(__file__).parent))
from examples_for_tests import Blobs, settings


def _keys(count, batch, steps, **place):
    return [list(keys) for keys in BatchOrder(count, settings(batch_size=batch), steps, **place)]


def test_every_case_comes_once_per_epoch():
    keys = [key for batch in _keys(5, 3, range(10)) for key in batch]
    assert Counter(keys) == Counter((epoch, index) for epoch in range(6) for index in range(5))
    assert [epoch for epoch, _ in keys] == sorted(epoch for epoch, _ in keys)


def test_order_changes_from_epoch_to_epoch_and_seed_to_seed():
    orders = {epoch_order(seed, epoch, 20) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(20)) for order in orders)


def test_a_step_reads_the_same_wherever_the_range_begins():
    assert _keys(7, 3, range(4, 9)) == _keys(7, 3, range(9))[4:]


def test_processes_share_each_batch():
    whole = _keys(7, 6, range(4))
    shares = [_keys(7, 6, range(4), rank=rank, world=3) for rank in range(3)]
    assert [[key for part in parts for key in part] for parts in zip(*shares, strict=True)] == whole


def test_dropout_seeds_differ():
    seeds = {dropout_seed(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_regions_are_named_by_the_task():
    cases = Blobs(1)
    assert region_names(cases, 2) == ("0", "1")
    cases.task = get_task("brats")
    assert region_names(cases, 3) == ("WT", "TC", "ET")


def test_a_batch_is_made_while_the_one_before_is_trained_on():
    class Slow(Blobs):
        def sample(self, index, epoch):
            if len(self.asked) >= 4:
                assert trained_on.wait(20)
            threads.append(torch.get_num_threads())
            return super().sample(index, epoch)

    trained_on, threads, cases = threading.Event(), [], Slow(4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        batches = training_batches(cases, BatchOrder(4, settings(batch_size=2), range(3)), 0)
        next(batches)
        next(batches)  # while the third waits
        assert torch.get_num_threads() == 3
        trained_on.set()
        assert len(list(batches)) == 1
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
    assert threads == [1] * 6
    assert cases.asked == [key for keys in _keys(4, 2, range(3)) for key in keys]


class _Broken(Blobs):
    def sample(self, index, epoch):
        raise InputError("scan.nii: truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_loader_processes_are_one_line(workers):
    order = BatchOrder(2, settings(), range(1))
    with pytest.raises(InputError) as caught:
        list(training_batches(_Broken(2), order, workers))
    assert str(caught.value) == "scan.nii: truncated"
