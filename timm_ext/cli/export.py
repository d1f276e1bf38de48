"""The command that writes a network for other programs, and how every command that merges writes one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from timm_ext.cli.common import Fold, NamedNetwork, hold_output, named_network
from timm_ext.errors import InputError
from timm_ext.files import stem_of
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from torch import nn

TORCH_SUFFIXES = (".pth", ".pt")
_OURS = ".safetensors"


@dataclass(frozen=True)
class Facts:
    """What a file of ours notes of a network.

    Attributes:
        kind: see `save_network`.
        task: as JSON values.
        parents: SHA-256 of the sources.
        settings: as JSON values.
        more: further values; under `nnunet` what nnU-Net needs to take the network back.
    """

    kind: str
    task: Mapping[str, Any] | None
    parents: Sequence[str]
    settings: Mapping[str, Any] | None
    more: Mapping[str, Any] = field(default_factory=dict)


def check_form(out: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse a form of output that a network cannot take, before any work is done.

    Args:
        out: file of ours (`.safetensors`), PyTorch file (`.pth`, `.pt`), or folder of nnU-Net (no suffix).
        metadata: of the first source's file.

    Raises:
        InputError: another suffix, or a folder of a network that does not come from nnU-Net.
    """
    from timm_ext.interop.nnunet.write import noted_by_nnunet

    if out.suffix == "" or out.is_dir():
        noted_by_nnunet(metadata, f"{out}: a folder is nnU-Net's")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: expected an absent or empty folder (got something there)")
    elif out.suffix not in (_OURS, *TORCH_SUFFIXES):
        raise InputError(
            f"{out}: expected NAME{_OURS}, NAME{TORCH_SUFFIXES[0]} or, of nnU-Net's networks, a folder "
            f"without suffix (got {out.suffix})"
        )


def write_network(out: Path, model: "nn.Module", facts: Facts) -> str:
    """Write a network in the form that the name of the output says.

    Returns:
        What the output is good for beside this package, in words; empty for a file of ours.

    Raises:
        InputError: as for `check_form`, or it cannot be written.
    """
    from timm_ext.interop.nnunet.model import NOTE
    from timm_ext.interop.nnunet.write import noted_by_nnunet, write_folder, write_weights
    from timm_ext.interop.state_dict import write_state_dict
    from timm_ext.networks.io import save_network
    from timm_ext.networks.monai import PREFIX
    from timm_ext.networks.registry import config_of

    if out.suffix == _OURS:
        parents, settings, more = list(facts.parents), facts.settings, facts.more
        save_network(out, model, task=facts.task, parents=parents, settings=settings, kind=facts.kind, **more)
        return ""
    if out.suffix not in TORCH_SUFFIXES:
        write_folder(out, model, noted_by_nnunet(facts.more, out))
        return f"a model folder of nnU-Net: nnUNetv2_predict_from_modelfolder -m {out} -f 0 …"
    if NOTE in facts.more:
        write_weights(out, model)
        return f"nnUNetv2_train … -pretrained_weights {out}"
    if str(config_of(model)["name"]).startswith(PREFIX):
        write_state_dict(out, model, key=None)
        return "load_state_dict(torch.load(FILE)), or models/model.pt of a bundle of MONAI"
    write_state_dict(out, model)
    return "load_state_dict(torch.load(FILE)['state_dict'])"


def export(
    network: Annotated[
        Path, typer.Argument(metavar="NETWORK", help="A network's file, nnU-Net's folder or MONAI's bundle.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="PATH",
            help="NAME.pth for `nnUNetv2_train -pretrained_weights`, PyTorch or MONAI (`models/model.pt`), a "
            "folder for "
            "`nnUNetv2_predict_from_modelfolder`, NAME.safetensors for this package.",
        ),
    ],
    fold: Fold = None,
    named: NamedNetwork = None,
) -> None:
    """Write a network for nnU-Net, MONAI or plain PyTorch, or take one of theirs over.

    Example: `timm-ext export merged.safetensors --out init.pth`
    """
    from timm_ext.interop.networks import open_network

    hold_output(out, folder=False, inputs=[network] if network.is_file() else [])
    model, checkpoint = open_network(network, fold=fold, named=named_network(named))
    noted = checkpoint.metadata
    check_form(out, noted)
    more = {key: value for key, value in noted.items() if key in ("nnunet", "merge")}
    parents = [str(checkpoint.sha256)]
    use = write_network(
        out, model, Facts(checkpoint.kind, noted.get("task"), parents, noted.get("settings"), more)
    )
    say(f"{out}: {stem_of(network)}{f'; {use}' if use else ''}")
