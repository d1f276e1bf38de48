"""Merging of checkpoints that need not fit in memory, tensor by tensor, from files to files."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from timm_ext.checkpoint import FORMAT, versions
from timm_ext.documents import parse_json
from timm_ext.errors import InputError, lines_of
from timm_ext.files import (
    atomic_folder,
    atomic_write,
    real_path,
    remove_stale_partials,
    sha256,
    write_json,
)
from timm_ext.merging.streaming.blocks import CHUNK, DTYPES, Files, Item, Output, merge_blocks
from timm_ext.merging.streaming.companions import companions_of, copy_companions
from timm_ext.merging.streaming.shards import (
    INDEX,
    KEY,
    SINGLE,
    Place,
    ShardPlan,
    Shards,
    index_of,
    open_shards,
    plan_shards,
)
from timm_ext.storage.integrity import BLANK, check_seal, seal

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
    """

    tensors: int
    nbytes_read: int
    nbytes_written: int
    copied: tuple[str, ...]
    counters: tuple[str, ...]
    without_fisher: tuple[str, ...]
    left_out: tuple[str, ...]


def merge_checkpoints(
    sources: Sequence[Path | str],
    out: Path | str,
    *,
    ratios: Sequence[float],
    fishers: Sequence[Path | str] = (),
    shard_size: int | None = None,
    hashes: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> StreamedMerge:
    """Merge every tensor of several checkpoints of one architecture, whatever it is.

        merged[p] = Σ_t α_t F[t, p] θ[t, p] / Σ_t α_t F[t, p]        with α_t = ratio_t / Σ_j ratio_j

    by `fused_merge`, F = 1 without Fishers: float32 arithmetic for bfloat16 and float16, a value within the
    range of the sources. Nothing is reset. Of counters of batches (`num_batches_tracked`) the largest is
    taken; other integers, booleans and 8-bit numbers must be the same in all sources. The memory needed is a
    few megabytes for each source and worker, whatever the size of the tensors; the bits do not depend on the
    number of workers.

    Args:
        sources: safetensors files, or folders of shards.
        out: a `.safetensors` file, or a new or empty folder, which gets the shards of the first source, an
            index, and the first source's configuration and tokenizer files (links that lead out of its folder
            are left out). It appears once it is whole; the result of the same merge may be there already.
        ratios: one for each source, non-negative; their sum does not matter.
        fishers: one checkpoint of Fishers for each source, in the same order, or none at all. A tensor that
            none of them holds is merged by the ratios alone.
        shard_size: largest number of bytes of a shard in a folder; None: shards as in the first source.
        hashes: note the SHA-256 of every source file in the result, which reads them once more.
        workers: threads; None: two for each core, since half of them wait for the disk, and at most 8.
        progress: called with the number of bytes read so far and in all, from any thread.

    Raises:
        InputError: files, tensors, ratios or Fishers do not fit, all tensors that do not being listed; values
            cannot be merged; or the result cannot be written. Nothing is left behind.
    """
    out = Path(out)
    models, planes = [open_shards(path) for path in sources], [open_shards(path) for path in fishers]
    _check_ratios(ratios, models)
    _check_tensors(models)
    _check_fishers(planes, models)
    folder = out.suffix != ".safetensors"
    if shard_size is not None and not (folder and shard_size > 0):
        raise InputError(
            f"shards of {shard_size} bytes: expected more than 0, and a folder for them (got {out})"
        )
    companions, left_out = companions_of(models[0].path) if folder else ([], [])
    about = _provenance(models, planes, ratios, hashes, sealed=not folder)
    plans = plan_shards(models[0], None if folder else out.name, shard_size, about)
    _check_room(out, plans, companions, folder=folder, nbytes=models[0].nbytes)
    items = _items(models, planes)
    _check_seals([*models, *planes])
    _check_copied([item for item in items.values() if item.copied])
    total = sum(place.nbytes for item in items.values() for place in item.read)
    count = _Counter(total, progress)
    threads = workers or min(2 * len(os.sched_getaffinity(0)), _MOST_WORKERS)
    with atomic_folder(out, over=True) if folder else atomic_write(out) as place:
        outputs = [_output(place / plan.name if folder else place, plan, items) for plan in plans]
        merge_blocks(outputs, ratios, workers=threads, progress=count)
        if folder:
            copy_companions(companions, place)
            if len(plans) > 1 or plans[0].name != SINGLE:
                write_json(place / INDEX, index_of(plans))
        elif BLANK.encode() in plans[0].header:
            seal(place)
    return StreamedMerge(
        tensors=len(items),
        nbytes_read=total,
        nbytes_written=models[0].nbytes,
        copied=tuple(name for name, item in items.items() if item.copied),
        counters=tuple(name for name, item in items.items() if item.counter),
        without_fisher=tuple(name for name, item in items.items() if planes and item.merged_plainly),
        left_out=tuple(file.name for file in left_out),
    )


def _check_seals(shards: Sequence[Shards]) -> None:
    """Refuse damaged files among those that hold a digest."""
    for checkpoint in shards:
        for file, digest in checkpoint.digests.items():
            check_seal(file, digest)


def _check_ratios(ratios: Sequence[float], models: Sequence[Shards]) -> None:
    got = ", ".join(map(str, ratios))
    if not models or len(ratios) != len(models):
        raise InputError(
            f"ratios: expected one for each of {len(models)} checkpoints (got {len(ratios)}: {got})"
        )
    if not all(isfinite(ratio) and ratio >= 0 for ratio in ratios) or max(ratios) == 0:
        raise InputError(f"ratios: expected finite numbers >= 0, not all of them 0 (got {got})")


def _check_tensors(models: Sequence[Shards]) -> None:
    """Refuse checkpoints with other tensors than the first, all differences at once."""
    first, *others = models
    if not first.tensors:
        raise InputError(f"{first.path}: expected tensors (got none)")
    lines = []
    for other in others:
        for name, place in first.tensors.items():
            got = other.tensors.get(name)
            if got is None or (got.dtype, got.shape) != (place.dtype, place.shape):
                lines.append(
                    f"{other.path}: {name}: expected {place} as in {first.path} (got {got or 'none'})"
                )
        unknown = [name for name in other.tensors if name not in first.tensors]
        lines += [
            f"{other.path}: {name}: expected none as in {first.path} (got {other.tensors[name]})"
            for name in unknown
        ]
    _refuse("checkpoints: expected the same tensors", "differ", lines)


def _check_fishers(fishers: Sequence[Shards], models: Sequence[Shards]) -> None:
    """Refuse Fishers that do not fit the models, all differences at once."""
    if not fishers:
        return
    if len(fishers) != len(models):
        raise InputError(f"fishers: expected one for each of {len(models)} checkpoints (got {len(fishers)})")
    for fisher, model in zip(fishers, models, strict=True):
        _check_origin(fisher, model)
    expected = models[0].tensors
    names = dict.fromkeys(name for fisher in fishers for name in fisher.tensors)
    lines = []
    for name in names:
        places = [fisher.tensors.get(name) for fisher in fishers]
        shape = expected[name].shape if name in expected and expected[name].dtype in DTYPES else None
        fits = [place is not None and place.shape == shape and place.dtype in DTYPES for place in places]
        if not all(fits) or len({place.dtype for place in places if place}) > 1:
            wanted = "none" if shape is None else f"floating point {list(shape)} in each"
            lines.append(
                f"{name}: expected {wanted} (got {', '.join(str(place or 'none') for place in places)})"
            )
    _refuse("fishers: expected tensors of the checkpoints", "do not fit", lines)
    if not names:
        raise InputError(f"{fishers[0].path}: expected a Fisher (got no tensor)")


def _check_origin(fisher: Shards, model: Shards) -> None:
    if (kind := fisher.provenance.get("kind", "fisher")) != "fisher":
        raise InputError(f"{fisher.path}: expected a Fisher (got a {kind} checkpoint)")
    network = (fisher.provenance.get("provenance") or {}).get("network_sha256")
    if network is not None and (model.path.is_dir() or sha256(model.path) != network):
        raise InputError(f"{fisher.path}: expected the Fisher of {model.path} (got that of another network)")


def _check_copied(items: Sequence[Item]) -> None:
    """Refuse integers, booleans, 8-bit numbers and the like that differ, all of them at once."""
    files = Files()
    try:
        differ = [item for item in items if not _agree(item.theta, files)]
    finally:
        files.close()
    lines = [f"{item.name}: {item.theta[0]}" for item in differ]
    if small := sorted({item.theta[0].dtype for item in differ if item.theta[0].dtype.startswith("F")}):
        raise InputError(
            f"checkpoints: expected weights of 16 bits or more, or the same in all of them (got {len(lines)} "
            f"that differ, of types such as {small[0]}, which have scales of their own and no mean); convert "
            f"them to bfloat16 or float32 first{lines_of(lines)}"
        )
    _refuse(
        "checkpoints: expected the same integers and booleans in all of them",
        "differ",
        lines,
    )


def _agree(places: Sequence[Place], files: Files) -> bool:
    for offset in range(0, places[0].nbytes, CHUNK):
        chunks = [bytearray(min(CHUNK, place.nbytes - offset)) for place in places]
        for chunk, place in zip(chunks, places, strict=True):
            files.read(place, offset, memoryview(chunk))
        if any(chunk != chunks[0] for chunk in chunks):
            return False
    return True


def _refuse(what: str, how: str, lines: Sequence[str]) -> None:
    if lines:
        raise InputError(f"{what} (got {len(lines)} that {how}){lines_of(lines)}")


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
        with ThreadPoolExecutor(_MOST_WORKERS) as pool:
            names = [file.name for file in shards.files]
            noted["sha256"] = dict(zip(names, pool.map(sha256, shards.files), strict=True))
    return noted


def _check_room(
    out: Path, plans: Sequence[ShardPlan], companions: Sequence[Path], *, folder: bool, nbytes: int
) -> None:
    """Refuse a result that cannot be written, before any work is done for it."""
    for place in (out, out.parent):  # a killed merge may have left as much as this one needs
        remove_stale_partials(place)
    if folder and out.exists() and not _is_own_result(out, plans, companions):
        raise InputError(f"{out}: expected a .safetensors file, or a new or empty folder (got neither)")
    if not folder and out.is_dir():
        raise InputError(f"{out}: expected a file (got a folder)")
    there = next(parent for parent in real_path(out).parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise InputError(f"{out}: expected {nbytes / 1e9:.2f} GB of room on the disk (got {free / 1e9:.2f})")


def _is_own_result(folder: Path, plans: Sequence[ShardPlan], companions: Sequence[Path]) -> bool:
    """Tell whether a folder is empty, or the result of this very merge, which may be made again."""
    if not folder.is_dir():
        return False
    there = {file.name: file for file in folder.iterdir()}
    others = there.keys() - {plan.name for plan in plans}
    if others - {INDEX, *(file.name for file in companions)}:
        return False
    return not there or all(_has_header(there.get(plan.name), plan.header) for plan in plans)


def _has_header(file: Path | None, header: bytes) -> bool:
    if file is None or not file.is_file() or file.is_symlink():
        return False
    with file.open("rb") as opened:
        return opened.read(len(header)) == header


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


def _output(path: Path, plan: ShardPlan, items: Mapping[str, Item]) -> Output:
    placed = tuple((begin, items[name]) for name, begin in plan.begins.items() if items[name].nbytes)
    return Output(path, plan.header, placed, plan.nbytes)


class _Counter:
    """Adds up the bytes that the workers report."""

    def __init__(self, total: int, progress: Callable[[int, int], object] | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)
