"""What single methods of a comparison do otherwise than the plan says for all."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from timm_ext.errors import InputError
from timm_ext.study.arms import Row, get_row
from timm_ext.study.parts import check_fields
from timm_ext.study.settings import CommonSettings
from timm_ext.training.settings import TIES
from timm_ext.transfer.adapt import AdaptSettings
from timm_ext.transfer.arms import Arm

_ADAPT = {field.name for field in fields(AdaptSettings)}
_MERGE = {"granularity", "mixing", "anchor", "normalize", "unseen"}


def check_options(settings: CommonSettings) -> None:
    """Refuse options of methods that are not in the plan, unknown ones, and ties to no start.

    Raises:
        InputError: as said.
    """
    tied = [name for name in TIES if settings.source_train.get(name)]
    if tied and not (settings.chain and len(settings.source_tasks) > 1):
        raise InputError(
            f"source_train: expected chain and several source tasks with {tied[0]}, which keeps a source "
            "network near the one before"
        )
    check_fields("adapt", settings.adapt or {}, _ADAPT - {"logit_lr"})
    for field in ("method_train", "method_adapt", "method_merge"):
        given = getattr(settings, field) or {}
        if strangers := sorted(set(given) - {*settings.methods}):
            raise InputError(
                f"{field}: expected some of {', '.join(settings.methods)} (got {strangers[0]!r})"
            )
    for name, values in (settings.method_adapt or {}).items():
        check_fields(f"method_adapt: {name}", values, _ADAPT)
        if not (isinstance(row := get_row(name), Arm) and row.learns):
            raise InputError(f"method_adapt: expected methods that learn before fine-tuning (got {name})")
    for name, values in (settings.method_merge or {}).items():
        check_fields(f"method_merge: {name}", values, _MERGE)
        if not (isinstance(row := get_row(name), Arm) and row.learns_ratios):
            raise InputError(f"method_merge: expected methods that learn ratios (got {name})")


def adapt_options(settings: CommonSettings, arm: Arm) -> dict[str, Any]:
    """Return how an arm learns its ratios: the rate of the logits, and of the rest what is not off.

    Options that are off are left out, so that steps of studies without them stay as they are.

    Raises:
        InputError: an option is out of range or does not concern the arm.
    """
    single = (settings.method_adapt or {}).get(arm.name, {})
    general = {
        name: value
        for name, value in (settings.adapt or {}).items()
        if name != "weight_pull" or arm.tuning.weight_pull
    }
    values = AdaptSettings(**{"logit_lr": settings.logit_lr, **general, **single}).of(arm).to_dict()
    rate = values.pop("logit_lr")
    return {"logit_lr": rate, **({"adapt": values} if values else {})}


def merge_options(settings: CommonSettings, row: Row) -> dict[str, Any]:
    """Return the fields of a row's `Recipe` that the plan sets."""
    return dict((settings.method_merge or {}).get(row.name, {}))


def without_ties(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return training settings without ties."""
    return {name: value for name, value in given.items() if name not in TIES}
