"""The stream of a merge: output files cut into blocks, each read, merged and written by one worker.

Sources are read into buffers of fixed size (not mapped: the resident memory of a mapping grows with what was
touched and is paid for by a page fault per few pages, while a read from the page cache runs at memory speed),
half a megabyte of a model at a time, so that they are still in the cache when they are merged. Output blocks
go to the disk past the page cache where the file system can do that: then the memory of a merge is its
buffers, pages that other programs use are left alone, and the disk writes from the first block on.
"""

import mmap
import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from timm_ext.errors import InputError
from timm_ext.files import sync
from timm_ext.merging.buffers import is_counter
from timm_ext.merging.streaming.open_files import OpenFiles
from timm_ext.merging.streaming.shards import Place
from timm_ext.ops.merge import fused_merge

BLOCK = 4 << 20  # bytes of an output file that are written at once
CHUNK = 512 << 10  # bytes of a tensor that are merged at once
_SECTOR = 4096  # what unbuffered writes are multiples of
_APART = 1088  # bytes between rows; rows whole pages apart compete for the same cache sets

INTEGERS = {f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Item:
    """A tensor to be written.

    Attributes:
        name: of the tensor.
        theta: where it lies in each model.
        fisher: where each model's Fisher of it lies; none if it is merged by the ratios alone.
    """

    name: str
    theta: tuple[Place, ...]
    fisher: tuple[Place, ...] = ()

    @property
    def counter(self) -> bool:
        """Whether it counts batches, of which the largest number is taken."""
        return is_counter(self.name) and self.theta[0].dtype in INTEGERS

    @property
    def copied(self) -> bool:
        """Whether it is taken as it is: other integers, booleans and types without arithmetic."""
        return self.theta[0].dtype not in DTYPES and not self.counter

    @property
    def merged_plainly(self) -> bool:
        """Whether it is merged by the ratios alone."""
        return self.theta[0].dtype in DTYPES and not self.fisher

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.theta[0].nbytes

    @property
    def read(self) -> tuple[Place, ...]:
        """The places that are read for it."""
        return self.theta[:1] if self.copied else self.theta + self.fisher

    def offset_in(self, place: Place, offset: int) -> int:
        """Return the offset in the bytes of one place, whose elements may be wider, for one in the output."""
        return offset * place.nbytes // self.nbytes


@dataclass(frozen=True)
class Output:
    """A file to write: its header, its tensors with their first bytes in it, in order, and its length."""

    path: Path
    header: bytes
    items: tuple[tuple[int, Item], ...]
    nbytes: int


@dataclass(frozen=True)
class Block:
    """Bytes [begin, end) of an output file, and the tensors that have bytes there."""

    output: Output
    begin: int
    end: int
    items: tuple[tuple[int, Item], ...]


def blocks_of(outputs: Iterable[Output]) -> Iterator[Block]:
    """Yield all blocks of all output files, in order."""
    for output in outputs:
        starts = [start for start, _ in output.items]
        for begin in range(0, output.nbytes, BLOCK):
            end = min(begin + BLOCK, output.nbytes)
            last = bisect_left(starts, end)
            first = max(bisect_right(starts, begin) - 1, 0)
            yield Block(output, begin, end, output.items[first:last])


def merge_blocks(
    outputs: Sequence[Output],
    ratios: Sequence[float],
    *,
    workers: int,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Merge and write output files; their bits do not depend on the number of workers.

    Args:
        outputs: what to write.
        ratios: of the models.
        workers: threads; each holds a block and a chunk of every model.
        advance: called with the number of bytes read, from any worker, after each block.

    Raises:
        InputError: a source cannot be read, or holds values that cannot be merged.
        OSError: an output cannot be written.
    """
    for output in outputs:
        with output.path.open("wb") as file:
            file.truncate(output.nbytes)
    blocks = _Shared(blocks_of(outputs))
    with _one_thread_each(), ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_work, blocks, ratios, advance) for _ in range(workers)]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            blocks.stop()
    for output in outputs:
        os.truncate(output.path, output.nbytes)  # the last block was written in whole sectors
        sync(output.path)


class _Shared:
    """Blocks that several workers take from one iterator."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Block]:
        while True:
            with self._lock:
                block = next(self._blocks, None)
            if block is None:
                return
            yield block

    def stop(self) -> None:
        with self._lock:
            self._blocks = iter(())


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let every worker merge in its own thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _work(blocks: Iterable[Block], ratios: Sequence[float], advance: Callable[[int], object] | None) -> None:
    merger = _Merger(ratios)
    try:
        for block in blocks:
            count = merger.run(block)
            if advance is not None:
                advance(count)
    finally:
        merger.close()


class _Merger:
    """One worker: its buffers and open files."""

    def __init__(self, ratios: Sequence[float]) -> None:
        self._models = len(ratios)
        self._ratios = torch.tensor([ratios], dtype=torch.float64)
        self._files = OpenFiles()
        self._memory = mmap.mmap(-1, BLOCK)  # on a page boundary, as unbuffered writes want it
        self._out = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._out_bytes = memoryview(self._memory)
        self._matrices: dict[str, Tensor] = {}

    def close(self) -> None:
        """Close its files."""
        self._files.close()

    def run(self, block: Block) -> int:
        """Merge and write a block, and return the number of bytes that were read for it."""
        header = block.output.header[block.begin : block.end]
        self._out_bytes[: len(header)] = header
        parts = [
            (item, max(block.begin - start, 0), min(block.end - start, item.nbytes))
            for start, item in block.items
        ]
        for item, begin, end in parts:
            for place in item.read:
                self._files.announce(place, item.offset_in(place, begin), item.offset_in(place, end))
        at = len(header)
        for item, begin, end in parts:
            for first in range(begin, end, CHUNK):
                last = min(first + CHUNK, end)
                self._merge(item, first, self._out[at : at + last - first])
                at += last - first
        length = -(-(block.end - block.begin) // _SECTOR) * _SECTOR
        self._files.write(block.output.path, self._out_bytes[:length], block.begin)
        return sum(
            item.offset_in(place, end) - item.offset_in(place, begin)
            for item, begin, end in parts
            for place in item.read
        )

    def _merge(self, item: Item, offset: int, out: Tensor) -> None:
        """Merge the bytes of an item from `offset` on into `out`."""
        if item.copied:
            self._files.read(item.theta[0], offset, out.numpy().data)
            return
        if item.counter:
            self._take_largest(item, offset, out)
            return
        out = out.view(DTYPES[item.theta[0].dtype])
        theta = self._read("theta", item.theta, offset, out.numel())
        fisher = None
        if item.fisher:
            fisher = self._read("fisher", item.fisher, item.offset_in(item.fisher[0], offset), out.numel())
            _check_fisher(fisher, item)
        self._merge_rows(theta, fisher, out, item)

    def _take_largest(self, item: Item, offset: int, out: Tensor) -> None:
        rows = self._matrix("counter", torch.uint8, out.numel())
        for row, place in zip(rows, item.theta, strict=True):
            self._files.read(place, offset, row.numpy().data)
        dtype = INTEGERS[item.theta[0].dtype]
        np.maximum.reduce([row.numpy().view(dtype) for row in rows], out=out.numpy().view(dtype))

    def _merge_rows(self, theta: Tensor, fisher: Tensor | None, out: Tensor, item: Item) -> None:
        kept = None if isfinite(theta.sum()) else _non_finite(theta, item)
        if kept is not None:
            values = theta[0, kept]
            theta[:, kept] = 0
        dtype = theta.dtype if fisher is None else torch.promote_types(theta.dtype, fisher.dtype)
        merged = out if dtype == theta.dtype else self._matrix("merged", dtype, out.numel())[0]
        fused_merge(
            self._as("wide theta", theta, dtype),
            None if fisher is None else self._as("wide fisher", fisher, dtype),
            self._ratios,
            torch.tensor([0, out.numel()]),
            mixing="ratios",
            out=merged,
        )
        if merged is not out:
            out.copy_(merged)
        if kept is not None:
            out[kept] = values

    def _as(self, use: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return rows if rows.dtype == dtype else self._matrix(use, dtype, rows.shape[1]).copy_(rows)

    def _read(self, use: str, places: Sequence[Place], offset: int, elements: int) -> Tensor:
        """Read a tensor of every model from the byte `offset` on, as `[T, elements]`."""
        rows = self._matrix(use, DTYPES[places[0].dtype], elements)
        for row, place in zip(rows.view(torch.uint8), places, strict=True):
            self._files.read(place, offset, row.numpy().data)
        return rows

    def _matrix(self, use: str, dtype: torch.dtype, elements: int) -> Tensor:
        """Return a buffer `[T, elements]` for one use, kept for the next chunk."""
        nbytes = elements * dtype.itemsize
        if use not in self._matrices or self._matrices[use].shape[1] < nbytes:
            stride = -(-nbytes // CHUNK) * CHUNK + _APART
            self._matrices[use] = torch.empty(self._models, stride, dtype=torch.uint8)
        return self._matrices[use][:, :nbytes].view(dtype)


def _check_fisher(fisher: Tensor, item: Item) -> None:
    low, high = (float(bound) for bound in torch.aminmax(fisher))  # NaN if there is one
    if low >= 0 and high < float("inf"):
        return
    for row, place in zip(fisher, item.fisher, strict=True):
        if bad := int(((row < 0) | ~row.isfinite()).sum()):
            raise InputError(
                f"{place.file}: expected a finite, non-negative Fisher (got {bad} or more elements of "
                f"{item.name} that are not)"
            )


def _non_finite(theta: Tensor, item: Item) -> Tensor | None:
    """Return which elements are NaN or infinite, the same in all models as in a mask; None if none is."""
    finite = theta.isfinite()
    kept = ~finite.all(0)
    if not kept.any():
        return None  # only their sum was
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[theta.itemsize]
    bits = theta[:, kept].view(integer)
    if (bits == bits[0]).all():
        return kept
    worst = int(finite.sum(1).argmin())
    bad = int((~finite[worst]).sum())
    raise InputError(
        f"{item.theta[worst].file}: expected finite weights, or the same in all models (got {bad} or more "
        f"elements of {item.name} that are NaN or infinite)"
    )
