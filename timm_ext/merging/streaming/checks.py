"""What sources of a streamed merge must have in common, and what their Fishers and ratios must be."""

from collections.abc import Iterable, Sequence

from timm_ext.errors import InputError, lines_of, shown
from timm_ext.files import sha256
from timm_ext.merging.merge import check_ratios
from timm_ext.merging.streaming.blocks import CHUNK, DTYPES, Item
from timm_ext.merging.streaming.open_files import OpenFiles
from timm_ext.merging.streaming.shards import Place, Shards
from timm_ext.storage.integrity import check_seal


def check_sources(models: Sequence[Shards], fishers: Sequence[Shards], ratios: Sequence[float]) -> None:
    """Refuse ratios, tensors and Fishers that do not fit; of tensors all that do not are listed."""
    check_ratios(ratios, len(models))
    _check_tensors(models)
    if fishers:
        _check_fishers(fishers, models)


def check_content(models: Sequence[Shards], fishers: Sequence[Shards], items: Iterable[Item]) -> None:
    """Refuse damaged files among those that hold a digest, and copied tensors that differ."""
    for checkpoint in (*models, *fishers):
        for file, digest in checkpoint.digests.items():
            check_seal(file, digest)
    _check_copied([item for item in items if item.copied])


def _check_tensors(models: Sequence[Shards]) -> None:
    """Refuse checkpoints with other tensors than the first, all differences at once."""
    first, *others = models
    if not first.tensors:
        raise InputError(f"{first.path}: expected tensors (got none)")
    lines = []
    for other in others:
        if other.tensors and first.tensors.keys().isdisjoint(other.tensors):
            instead, wanted = next(iter(other.tensors)), next(iter(first.tensors))
            raise InputError(
                f"checkpoints: expected the names of {first.path} in {other.path} (got none of them, but "
                f"{shown(instead)} in place of {shown(wanted)}): another architecture, or names of a wrapper"
            )
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
    files = OpenFiles()
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


def _agree(places: Sequence[Place], files: OpenFiles) -> bool:
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
