"""Names of tensors that several checkpoints have in common behind what tools put in front of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from timm_ext.errors import listed
from timm_ext.merging.streaming.shards import Place, Shards
from timm_ext.storage.state_dicts import prefixes_of


def by_common_names(models: Sequence[Shards]) -> list[Shards]:
    """Take a prefix off the names of checkpoints, such as `model.`, where others have the names without it.

    What lies beside the tensors behind a prefix, such as a loss's, is left out; the notes say so. Checkpoints
    that differ in other ways stay as they are.
    """
    for names in (model.tensors for model in models):
        found = [_behind_prefix(model, names) for model in models]
        plain = [model for model in found if model is not None]
        if len(plain) == len(models):
            return plain
    return list(models)


def _behind_prefix(model: Shards, names: Mapping[str, Place]) -> Shards | None:
    """Return a checkpoint by names of another; None where it has not all of them behind one prefix."""
    if model.tensors.keys() == names.keys():
        return model
    prefixes = prefixes_of(model.tensors, set(names))
    prefix = prefixes[0]
    kept = {name.removeprefix(prefix): p for name, p in model.tensors.items() if name.startswith(prefix)}
    if len(prefixes) > 1 or not prefix or kept.keys() != names.keys():
        return None
    left = [name for name in model.tensors if not name.startswith(prefix)]
    note = f"{model.path}: {prefix!r} taken off the names{f'; left out: {listed(left)}' if left else ''}"
    return replace(model, tensors=kept, notes=(*model.notes, note))
