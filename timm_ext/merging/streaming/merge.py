"""Merging of checkpoints that need not fit in memory, tensor by tensor, from files to files."""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_ext.checkpoint import FORMAT, versions
from timm_ext.documents import parse_json
from timm_ext.errors import InputError
from timm_ext.files import real_path, sha256
from timm_ext.merging.streaming.blocks import Item, merge_blocks
from timm_ext.merging.streaming.checks import check_content, check_sources
from timm_ext.merging.streaming.names import by_common_names
from timm_ext.merging.streaming.result import Result, is_folder, make_result
from timm_ext.merging.streaming.shards import KEY, Shards
from timm_ext.merging.streaming.torch_files import opened
from timm_ext.storage.integrity import BLANK

_MOST_WORKERS = 8


@dataclass(frozen=True)
class StreamedMerge:
    """What a merge did.

    Attributes:
        tensors: number of tensors written.
        nbytes_read: bytes of the sources and their Fishers.
        nbytes_written: bytes of the merged tensors.
        copied: tensors that are no floating-point numbers, and agree in all sources.
        counters: counters of batches, of which the largest was taken.
        without_fisher: tensors that no Fisher holds, merged by the ratios alone.
        left_out: files beside the first source that were not copied, being links that lead elsewhere.
        notes: how the tensors of PyTorch files were found, see `Checkpoint`.
    """

    tensors: int
    nbytes_read: int
    nbytes_written: int
    copied: tuple[str, ...]
    counters: tuple[str, ...]
    without_fisher: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def merge_checkpoints(
    sources: Sequence[Path | str],
    out: Path | str,
    *,
    ratios: Sequence[float],
    fishers: Sequence[Path | str] = (),
    shard_size: int | None = None,
    hashes: bool = False,
    workers: int | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> StreamedMerge:
    """Merge every tensor of several checkpoints of one architecture, whatever it is.

        merged[p] = Σ_t α_t F[t, p] θ[t, p] / Σ_t α_t F[t, p]        with α_t = ratio_t / Σ_j ratio_j

    by `fused_merge`, F = 1 without Fishers: float32 arithmetic for bfloat16 and float16, a value within the
    range of the sources. Nothing is reset. Of counters of batches (`num_batches_tracked`) the largest is
    taken; other integers, booleans and 8-bit numbers must be the same in all sources. The memory needed is a
    few megabytes for each source and worker, whatever the size of the tensors; the bits do not depend on the
    number of workers. PyTorch files are read first, one after the other and each whole, and copied beside the
    result for as long as it takes.

    Args:
        sources: safetensors or PyTorch files, or folders of shards of either.
        out: a `.safetensors` file, or a new or empty folder, which gets the shards of the first source, an
            index, and the first source's configuration and tokenizer files. It appears once it is whole; the
            result of the same merge may be there already.
        ratios: one for each source, non-negative; their sum does not matter.
        fishers: one for each source, or none at all. A tensor that none holds is merged by the ratios alone.
        shard_size: largest number of bytes of a shard in a folder; None: shards as in the first source.
        hashes: note the SHA-256 of every source file in the result, which reads them once more.
        workers: threads; None: two for each core, since half of them wait for the disk, and at most 8.
        on_progress: called with the number of bytes read so far and in all, from any thread.

    Raises:
        InputError: files, tensors, ratios or Fishers do not fit, all tensors that do not being listed; values
            cannot be merged; or the result cannot be written. Nothing is left behind.
    """
    out = Path(out)
    folder = is_folder(out, shard_size)
    with (
        opened([Path(path) for path in sources], out, kind="network") as models,
        opened([Path(path) for path in fishers], out, kind="fisher") as fisher_files,
    ):
        models = by_common_names(models)
        check_sources(models, fisher_files, ratios)
        about = _provenance(models, fisher_files, ratios, hashes, sealed=not folder)
        result = make_result(out, models[0], about, folder=folder, shard_size=shard_size)
        items = _items(models, fisher_files)
        check_content(models, fisher_files, items.values())
        total = sum(place.nbytes for item in items.values() for place in item.read)
        threads = workers or min(2 * len(os.sched_getaffinity(0)), _MOST_WORKERS)
        with result.begun(items) as outputs:
            merge_blocks(outputs, ratios, workers=threads, advance=_Counter(total, on_progress))
    return _told(items, total, models, fisher_files, result)


def _told(
    items: Mapping[str, Item],
    total: int,
    models: Sequence[Shards],
    fisher_files: Sequence[Shards],
    result: Result,
) -> StreamedMerge:
    return StreamedMerge(
        tensors=len(items),
        nbytes_read=total,
        nbytes_written=models[0].nbytes,
        copied=tuple(name for name, item in items.items() if item.copied),
        counters=tuple(name for name, item in items.items() if item.counter),
        without_fisher=tuple(name for name, item in items.items() if fisher_files and item.merged_plainly),
        left_out=tuple(file.name for file in result.left_out),
        notes=tuple(note for shards in (*models, *fisher_files) for note in shards.notes),
    )


def _provenance(
    models: Sequence[Shards],
    fishers: Sequence[Shards],
    ratios: Sequence[float],
    hashes: bool,
    *,
    sealed: bool,
) -> dict[str, str]:
    """Return the metadata of the result: those of the first source, and what it was merged from.

    A network of ours in one file gets a digest.
    """
    for model in models:
        if (kind := model.provenance.get("kind", "network")) not in ("network", "merged"):
            raise InputError(f"{model.path}: expected a network (got a {kind} checkpoint)")
    common = {}
    for key in ("network", "task"):
        values = [model.provenance.get(key) for model in models]
        if any(value != values[0] for value in values):
            raise InputError(
                f"checkpoints: expected the same {key} in all, since given ratios merge every tensor, heads "
                f"included (got several {key}s); a merge method, without ratios, makes new heads for a task"
            )
        if values[0] is not None:
            common[key] = values[0]
    if any(_aliases(model) != _aliases(models[0]) for model in models):
        raise InputError("checkpoints: expected the same further names of tensors in all (got others)")
    about = {
        **({"digest": BLANK, "format": FORMAT} if sealed and "network" in common else {}),
        **({"aliases": aliases} if (aliases := _aliases(models[0])) else {}),
        "kind": "merged",
        "versions": versions(),
        **common,
        "merge": {
            "method": "fisher" if fishers else "linear",
            "ratios": list(ratios),
            "sources": [_source(model, hashes) for model in models],
            "fishers": [_source(fisher, hashes) for fisher in fishers],
        },
    }
    others = {key: text for key, text in models[0].metadata.items() if not key.startswith(KEY)}
    return {"format": "pt", **others, KEY: json.dumps(about)}


def _aliases(model: Shards) -> Any:
    """Return further names of tensors, also of a file that has them in an entry of their own."""
    old = model.metadata.get(f"{KEY}.aliases", "{}")
    return model.provenance.get("aliases") or parse_json(old, model.path)


def _source(shards: Shards, hashes: bool) -> dict[str, Any]:
    noted: dict[str, Any] = {"name": real_path(shards.path).name, "bytes": shards.nbytes}
    if hashes:
        files = shards.origins or shards.files
        with ThreadPoolExecutor(_MOST_WORKERS) as pool:
            noted["sha256"] = dict(zip([f.name for f in files], pool.map(sha256, files), strict=True))
    return noted


def _items(models: Sequence[Shards], fishers: Sequence[Shards]) -> dict[str, Item]:
    """Return where each tensor lies in the sources."""
    return {
        name: Item(
            name,
            theta=tuple(model.tensors[name] for model in models),
            fisher=tuple(fisher.tensors[name] for fisher in fishers if name in fisher.tensors),
        )
        for name in models[0].tensors
    }


class _Counter:
    """Adds up the bytes that the workers report."""

    def __init__(self, total: int, on_progress: Callable[[int, int], object] | None) -> None:
        self._done, self._total, self._on_progress = 0, total, on_progress
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)
