"""What single methods of a comparison do otherwise than the plan says for all."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from timm_ext.errors import InputError
from timm_ext.merging.methods import Method, get_method
from timm_ext.study.parts import check_fields
from timm_ext.study.settings import CommonSettings
from timm_ext.training.settings import TIES, AdaptSettings

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
        if not _learns(get_method(name)):
            raise InputError(f"method_adapt: expected methods that learn before fine-tuning (got {name})")
    for name, values in (settings.method_merge or {}).items():
        check_fields(f"method_merge: {name}", values, _MERGE)
        if not get_method(name).learns_ratios:
            raise InputError(f"method_merge: expected methods that learn ratios (got {name})")


def adapt_options(settings: CommonSettings, method: Method) -> dict[str, Any]:
    """Return how a method learns its ratios: the rate of the logits, and of the rest what is not off.

    Options that are off are left out, so that steps of studies without them stay as they are.

    Raises:
        InputError: an option is out of range or does not concern the method.
    """
    single = (settings.method_adapt or {}).get(method.name, {})
    general = {
        name: value
        for name, value in (settings.adapt or {}).items()
        if name != "weight_pull" or method.weight_pull
    }
    values = AdaptSettings(**{"logit_lr": settings.logit_lr, **general, **single}).of(method).to_dict()
    rate = values.pop("logit_lr")
    return {"logit_lr": rate, **({"adapt": values} if values else {})}


def merge_options(settings: CommonSettings, method: Method) -> dict[str, Any]:
    """Return the fields of a method's `Recipe` that the plan sets."""
    return dict((settings.method_merge or {}).get(method.name, {}))


def _learns(method: Method) -> bool:
    return method.adapt != "none" or method.learns_ratios


def ties_of(method: Method) -> dict[str, float]:
    """Return what a method ties in fine-tuning."""
    return {name: value for name in TIES if (value := getattr(method, name))}


def without_ties(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return training settings without ties."""
    return {name: value for name, value in given.items() if name not in TIES}
