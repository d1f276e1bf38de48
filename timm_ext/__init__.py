"""Fisher-weighted adaptive merging of pre-trained 3D segmentation networks into one initialisation.

Importing the package loads torch and the operators only; the other names below load their module when they
are used. In the command `timm-ext` torch is one of them: its help needs none.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ext.system.signals import quiet_start

quiet_start()  # torch takes seconds to load, in which Ctrl-C must not print a traceback

from timm_ext._moved import keep_old_names  # noqa: E402
from timm_ext.errors import InputError  # noqa: E402

__version__ = "0.1.0"
keep_old_names()

if TYPE_CHECKING:
    from timm_ext.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from timm_ext.fisher import Fisher, FisherAccumulator, estimate_fisher
    from timm_ext.groups import Groups, make_groups
    from timm_ext.layers import fast_layers
    from timm_ext.layout import Layout
    from timm_ext.merging import Bank, MergedModel
    from timm_ext.networks import build_network
    from timm_ext.ops._library import build_info
    from timm_ext.ops.fisher import conv_weight_grad_square_, sample_labels, square_accumulate_
    from timm_ext.ops.merge import fused_merge, ratios
    from timm_ext.parameters import split_parameters

_MODULE_OF = {
    "Bank": "merging",
    "Checkpoint": "checkpoint",
    "Fisher": "fisher",
    "FisherAccumulator": "fisher",
    "Groups": "groups",
    "Layout": "layout",
    "MergedModel": "merging",
    "build_info": "ops._library",
    "build_network": "networks",
    "conv_weight_grad_square_": "ops.fisher",
    "estimate_fisher": "fisher",
    "fast_layers": "layers",
    "fused_merge": "ops.merge",
    "load_checkpoint": "checkpoint",
    "make_groups": "groups",
    "ratios": "ops.merge",
    "sample_labels": "ops.fisher",
    "save_checkpoint": "checkpoint",
    "split_parameters": "parameters",
    "square_accumulate_": "ops.fisher",
}

__all__ = [
    "Bank",
    "Checkpoint",
    "Fisher",
    "FisherAccumulator",
    "Groups",
    "InputError",
    "Layout",
    "MergedModel",
    "__version__",
    "build_info",
    "build_network",
    "conv_weight_grad_square_",
    "estimate_fisher",
    "fast_layers",
    "fused_merge",
    "load_checkpoint",
    "make_groups",
    "ratios",
    "sample_labels",
    "save_checkpoint",
    "split_parameters",
    "square_accumulate_",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'timm_ext' has no attribute {name!r}")
    return getattr(import_module(f"timm_ext.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _is_command() -> bool:
    """Tell whether this process is the command, by the script `timm-ext` or by `python -m timm_ext`."""
    if sys.argv[:1] == ["-m"]:  # Python has not yet put the file in its place
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "timm_ext"
    return Path(next(iter(sys.argv), "")).stem == "timm-ext"


if not _is_command():  # it loads them when it needs them
    import_module("timm_ext.ops.fisher")
    import_module("timm_ext.ops.merge")
