"""Networks as nnU-Net v2 takes them: a checkpoint to start from, or a whole model folder."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from timm_ext.errors import InputError
from timm_ext.files import atomic_folder, write_json
from timm_ext.interop.nnunet.folder import FINAL, HEADER, PLANS
from timm_ext.interop.nnunet.model import NOTE
from timm_ext.interop.state_dict import write_state_dict

_TRAINER = "nnUNetTrainer"
_WEIGHTS = "network_weights"


def write_weights(path: Path, model: nn.Module) -> None:
    """Write `{"network_weights": …}`, every alias of a tensor included.

    `nnUNetv2_train -pretrained_weights` takes it.

    Raises:
        InputError: the file cannot be written.
    """
    write_state_dict(path, model, _WEIGHTS)


def write_folder(path: Path, model: nn.Module, noted: Mapping[str, Any]) -> None:
    """Write a folder that `nnUNetv2_predict_from_modelfolder -f 0` takes.

    It holds plans and header of the noted network and, in `fold_0`, a checkpoint with all that nnU-Net reads
    of one but the state of its optimizer, which no merge has.

    Args:
        path: of the folder, absent or empty.
        model: the network.
        noted: what the first source's checkpoint notes under `nnunet`.

    Raises:
        InputError: the folder holds something, or cannot be written.
    """
    plans, header = noted["plans"], noted["dataset_json"]
    arguments = {"plans": plans, "configuration": noted["configuration"], "fold": 0, "dataset_json": header}
    content = {
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": copy.deepcopy(arguments),
        "trainer_name": noted.get("trainer_name") or _TRAINER,
        "inference_allowed_mirroring_axes": _tuple(noted.get("inference_allowed_mirroring_axes")),
    }
    with atomic_folder(path) as folder:
        write_json(folder / PLANS, plans)
        write_json(folder / HEADER, header)
        write_state_dict(folder / "fold_0" / FINAL, model, _WEIGHTS, **content)


def noted_by_nnunet(metadata: Mapping[str, Any], where: object) -> Mapping[str, Any]:
    """Return what a network's file notes of nnU-Net.

    Raises:
        InputError: nothing: the network is not one of nnU-Net's.
    """
    noted = metadata.get(NOTE)
    if not isinstance(noted, Mapping):
        raise InputError(f"{where}: expected a network that comes from nnU-Net, with its plans (got another)")
    return noted


def _tuple(axes: Any) -> Any:
    return tuple(axes) if isinstance(axes, list) else axes
