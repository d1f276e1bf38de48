"""Networks of this package and of other programs, opened alike."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from timm_ext.checkpoint import Checkpoint, load_checkpoint
from timm_ext.data.tasks import task_from_dict
from timm_ext.errors import InputError, listed, shown
from timm_ext.interop.monai import auto3dseg, bundle
from timm_ext.interop.named import Named
from timm_ext.interop.nnunet import folder as folders
from timm_ext.interop.nnunet.images import Images, images_from
from timm_ext.interop.nnunet.model import NOTE, is_checkpoint, metadata_of, refuse_first_version
from timm_ext.interop.nnunet.target import Target
from timm_ext.interop.nnunet.unlike import images_said, unlike
from timm_ext.networks.io import names_of, restore_network
from timm_ext.networks.monai import PREFIX, as_stored
from timm_ext.storage.metadata import network_config
from timm_ext.storage.state_dicts import without_wrappers

_KINDS = ("network", "merged")
_CHECKPOINT = Path(folders.FINAL).suffix
_OURS = ".safetensors"


def read_checkpoint(
    path: Path | str,
    *,
    fold: str | None = None,
    kinds: Sequence[str] | None = _KINDS,
    named: Named | None = None,
) -> Checkpoint:
    """Read the tensors of a network and what is known of it, whoever wrote it.

    Args:
        path: a file of this package, a checkpoint of nnU-Net v2, the folder of one of its configurations or
            of a fold, or the zip file it exports; a bundle of MONAI or its weights, a checkpoint of
            Auto3DSeg; or another program's tensors, of which nothing is known.
        fold: of a folder or zip file of nnU-Net with several, `0`, `1`, … or `all`.
        kinds: of which it must be one; None takes all.
        named: what such tensors are of; a file that says its network must agree.

    Returns:
        The checkpoint; of other programs with `network`, `task` and of nnU-Net `nnunet` in its metadata.

    Raises:
        InputError: as for `load_checkpoint`, `checkpoint_of`, `metadata_of`, `read_bundle` and `network_of`;
            a fold of a file.
    """
    path = Path(path)
    if (root := bundle.root_of(path)) is not None:
        if fold is not None:
            raise InputError(f"{path}: expected a folder of nnU-Net with --fold (got a bundle of MONAI)")
        checkpoint = _of_bundle(root, path if path.is_file() else None, kinds)
    else:
        checkpoint = _of_file(path, fold, kinds, named)
    if named is None or (kinds is None and checkpoint.kind not in _KINDS):
        return checkpoint
    return _as_named(checkpoint, named, path)


def _of_file(path: Path, fold: str | None, kinds: Sequence[str] | None, named: Named | None) -> Checkpoint:
    """Read a file, or a folder or zip file of nnU-Net."""
    with ExitStack() as stack:
        if path.is_dir():
            if not folders.is_model_folder(path):
                raise InputError(
                    f"{path}: expected a network's file, a folder of nnU-Net with {folders.PLANS} and folds, "
                    "or a bundle of MONAI with configs and models (got another folder)"
                )
            file = folders.checkpoint_of(path, fold)
        elif folders.is_export(path):
            file = stack.enter_context(folders.extracted(path, fold))
        elif fold is not None:
            raise InputError(f"{path}: expected a folder or exported zip file of nnU-Net beside --fold")
        else:
            file = path
        # A safetensors file may say what it holds.
        names = None if named is None or file.suffix == _OURS else named.expected_names(file)
        checkpoint = load_checkpoint(file, kind=kinds, names=names)
        refuse_first_version(checkpoint.beside, path)
        if is_checkpoint(checkpoint.beside):
            noted = metadata_of(checkpoint.beside, path)
            return replace(checkpoint, metadata=noted, path=path if path.is_file() else file)
    if not auto3dseg.is_checkpoint(checkpoint.beside):
        return checkpoint
    network, task, settings, notes = auto3dseg.described(checkpoint.beside, path)
    return _described(checkpoint, network, task, settings, notes)


def _of_bundle(root: Path, weights: Path | None, kinds: Sequence[str] | None) -> Checkpoint:
    """Read a bundle of MONAI."""
    found = bundle.read_bundle(root, weights)
    names = names_of(network_config(found.network, root), found.weights)
    checkpoint = load_checkpoint(found.weights, kind=kinds, names=names)
    return _described(checkpoint, found.network, found.task, found.settings, found.notes)


def _described(
    checkpoint: Checkpoint,
    network: dict[str, Any],
    task: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    notes: Sequence[str],
) -> Checkpoint:
    """Note what a file holds, with the heads on coarser grids that its tensors show."""
    short = str(network["name"]).removeprefix(PREFIX)
    options = as_stored(short, network["options"], checkpoint.tensors)
    known = {"task": task, "settings": settings}
    noted = {
        "network": {**network, "options": options},
        **{key: dict(one) for key, one in known.items() if one},
    }
    return replace(checkpoint, metadata=noted, notes=(*checkpoint.notes, *notes))


def _as_named(checkpoint: Checkpoint, named: Named, path: Path) -> Checkpoint:
    """Note what the user says of a network where its file says nothing.

    Raises:
        InputError: the file says that it holds another network.
    """
    noted = checkpoint.metadata
    if (known := noted.get("network")) is None:
        plain = without_wrappers(checkpoint.tensors, named.expected_names(checkpoint.path or path), path)
        noted = {**noted, "network": named.described(plain.tensors)}
    elif known["name"] != named.name:
        raise InputError(f"{path}: expected {named.name}, as --network says (got {shown(known['name'])})")
    if named.task is not None:
        noted = {**noted, "task": dict(named.task)}
    return replace(checkpoint, metadata=noted)


def open_network(
    path: Path | str, *, fold: str | None = None, named: Named | None = None
) -> tuple[nn.Module, Checkpoint]:
    """Read a network in evaluation mode, on the CPU; see `read_checkpoint`.

    Raises:
        InputError: as for `read_checkpoint` and `load_network`.
    """
    return restore_network(read_checkpoint(path, fold=fold, named=named))


def is_foreign_folder(path: Path) -> bool:
    """Tell whether a folder holds networks of another program."""
    return folders.is_model_folder(path) or bundle.root_of(path) is not None


def is_foreign(path: Path) -> bool:
    """Tell whether a file or folder of another program says which network it holds.

    Raises:
        InputError: it is a PyTorch file that cannot be read.
    """
    if path.is_dir() or path.suffix != _CHECKPOINT:
        return is_foreign_folder(path) or folders.is_export(path)
    return path.is_file() and is_checkpoint(load_checkpoint(path).beside)


def sources_of(path: Path, folds: Sequence[str]) -> list[Path]:
    """Return the folders of some folds of a configuration, as source networks.

    Raises:
        InputError: a fold is missing, or named twice.
    """
    if len(set(folds)) < len(folds):
        raise InputError(f"{path}: expected each fold once (got {', '.join(folds)})")
    if missing := [fold for fold in folds if fold not in folders.folds_of(path)]:
        raise InputError(f"{path}: expected a checkpoint of each fold (got none of {', '.join(missing)})")
    return [path / f"fold_{fold}" for fold in folds]


def open_alike(
    paths: Sequence[Path],
    *,
    fold: str | None = None,
    named: Mapping[Path, Named] | None = None,
    known: Mapping[Path, Checkpoint] | None = None,
) -> dict[Path, tuple[nn.Module, Checkpoint]]:
    """Open networks whose images one program prepares; see `read_checkpoint`.

    Args:
        paths: of the networks.
        fold: of folders of nnU-Net.
        named: networks that the user names, by path.
        known: checkpoints that were read already, by path.

    Raises:
        InputError: as for `open_network`, or some are nnU-Net's, which prepares images in its own way.
    """
    names, read = named or {}, known or {}
    opened = {}
    for path in paths:
        checkpoint = read.get(path) or read_checkpoint(path, fold=fold, named=names.get(path))
        opened[path] = restore_network(checkpoint)
    foreign = [path for path, (_, checkpoint) in opened.items() if NOTE in checkpoint.metadata]
    if 0 < len(foreign) < len(opened):
        raise InputError(
            f"sources: expected networks whose images are prepared alike (got nnU-Net's, {listed(foreign)}, "
            "beside others)"
        )
    return opened


def images_of(checkpoint: Checkpoint) -> Images | None:
    """Return how cases become images of a network that another program trained; None of one of ours.

    Raises:
        InputError: as for `images_from`.
    """
    noted = checkpoint.metadata.get(NOTE)
    if noted is None:
        return None
    task = task_from_dict(checkpoint.metadata["task"], where=checkpoint.path)
    return images_from(noted, task, checkpoint.path)


def unlike_images(
    checkpoints: Mapping[Path, Checkpoint], target: Target | None = None
) -> dict[Path, list[str]]:
    """Say in what the images of nnU-Net's networks differ, by their plans.

    Args:
        checkpoints: of the networks.
        target: a data set whose plans they are compared with; without its plans it is the first network's.

    Returns:
        The differences of each network that has some.
    """
    said = {}
    for path, checkpoint in checkpoints.items():
        if (noted := checkpoint.metadata.get(NOTE)) is not None:
            task = task_from_dict(checkpoint.metadata["task"], where=path)
            said[path] = images_said(noted["plans"], str(noted["configuration"]), task.modalities, path)
    own = next(iter(said.values()), {})
    if target is not None and target.network is not None:
        plans, name = target.noted["plans"], str(target.noted["configuration"])
        own = images_said(plans, name, target.task.modalities, target.path)
    return {path: differing for path, one in said.items() if (differing := unlike(own, one))}
