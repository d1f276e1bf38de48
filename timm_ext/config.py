"""Typed settings of every command: read from YAML, overridden by `--set`, written beside each output."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    TypeAdapter,
    model_validator,
)

from timm_ext.data.prepare import PrepareSettings
from timm_ext.documents import Location, parse_yaml, read_yaml, validated
from timm_ext.documents.fields import Cases, Edges
from timm_ext.errors import InputError, printable, shown
from timm_ext.files import atomic_write
from timm_ext.fisher.settings import EstimateSettings, Likelihood
from timm_ext.inference import PredictSettings
from timm_ext.training.settings import TrainSettings
from timm_ext.transfer.settings import AdaptSettings, Recipe

_MOST_PARTS = 8  # of the name of a setting

AUTO = "auto"
PLANNED = {
    "prepare.spacing": "scan",
    "train.steps": None,
    "train.batch_size": None,
    "train.validate_every": "epoch",
    "train.patch": "whole",
    "fisher.patch": "whole",
    "predict.window": "whole",
}
"""Fields that may be `auto`, decided from data, network and machine; and the word for None in their YAML."""


_MOVED: dict[Location, Location] = {("train", "head"): ("merge", "head")}
"""Fields by the place that they had; both are read."""

_EDGES = "three edges such as [64,64,64]"
_FORMS: dict[Location, str] = {
    ("prepare", "spacing"): "auto, scan, a length in mm or three such as [1,1,2]",
    ("prepare", "size"): f"null or {_EDGES}",
    ("train", "patch"): f"auto, whole or {_EDGES}",
    ("fisher", "patch"): f"auto, whole or {_EDGES}",
    ("predict", "window"): f"auto, whole or {_EDGES}",
}


class Section(BaseModel):
    """A frozen group of settings that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkSettings(Section):
    """Which network is built where none is given.

    Attributes:
        name: one of `timm_ext.networks.registry.network_names()`.
        options: the network's own options; its depth is planned with the patch unless it stands here.
    """

    name: str = "isensee2017"
    options: dict[str, Any] = Field(default_factory=dict)


class FisherSettings(Section, EstimateSettings):
    """How the Fisher information is estimated, and of which examples.

    Attributes:
        patch: edges in voxels of the patches that are the examples, or None for whole volumes.
        patches: of each case, half of them on voxels of a region, as in training; drawn with `seed`.
    """

    likelihood: Likelihood = "auto"

    patch: Edges | None = None
    patches: Cases = 4

    def options(self, *, softmax: bool) -> dict[str, Any]:
        """Return those of the estimate alone."""
        options = super().options(softmax=softmax)
        return {name: value for name, value in options.items() if name in EstimateSettings.model_fields}


class RunSettings(Section):
    """All settings of the commands; every section and field has a default.

    The fields of `PLANNED` are `auto` unless they are given: `automatic` names those. Until `planned` fills
    them in they hold what they mean without planning. In YAML they are words: `auto`, and those of `PLANNED`.
    """

    network: NetworkSettings = NetworkSettings()
    prepare: PrepareSettings = PrepareSettings()
    train: TrainSettings = TrainSettings()
    fisher: FisherSettings = FisherSettings()
    merge: Recipe = Recipe()
    adapt: AdaptSettings = AdaptSettings()
    predict: PredictSettings = PredictSettings()
    _automatic: frozenset[str] = PrivateAttr(default=frozenset(PLANNED))

    @model_validator(mode="wrap")
    @classmethod
    def _read_words(cls, values: Any, handler: ModelWrapValidatorHandler["RunSettings"]) -> "RunSettings":
        if not isinstance(values, dict):
            return handler(values)
        plain, automatic = _without_words(values)
        settings = handler(plain)
        settings._automatic = automatic
        return settings

    @property
    def automatic(self) -> frozenset[str]:
        """Names of the fields that planning is to decide, `section.field`."""
        return self._automatic

    def planned(self, values: Mapping[str, Any]) -> "RunSettings":
        """Fill in fields that are `auto`; those that are not keep what the user said.

        Args:
            values: by name, `section.field`.
        """
        result = self
        for name in values.keys() & self._automatic:
            section, field = name.split(".")
            old = getattr(result, section)
            change = {field: values[name]}
            new = old.model_copy(update=change) if isinstance(old, Section) else replace(old, **change)
            result = result.model_copy(update={section: new})
        result._automatic = self._automatic - values.keys()
        return result


Kind = TypeVar("Kind")


def load_settings(
    kind: type[Kind],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    base: Mapping[str, Mapping[str, Any]] | None = None,
) -> Kind:
    """Read settings from YAML, then apply overrides.

    Args:
        kind: the model or dataclass that they must fit.
        path: the file; None reads none.
        overrides: `"section.field=value"`, for settings without sections `"field=value"`; values as in YAML.
        base: sections that hold where neither file nor overrides say otherwise, for example those that a
            network was trained with.

    Returns:
        Validated, frozen settings.

    Raises:
        InputError: the file cannot be read or is not YAML, or a field is unknown or has a wrong value; the
            message names the file, the line and the field.
    """
    values, lines = ({}, {}) if path is None else _read_yaml(path)
    for section, fallback in (base or {}).items():
        given = values.get(section)
        values[section] = {**fallback, **given} if isinstance(given, dict) else given or dict(fallback)
    moved = _MOVED if kind is RunSettings else {}
    for before, now in moved.items():
        _move(values, lines, before, now)
    where = {location: f"{path}, line {line}" for location, line in lines.items()}
    for override in overrides:
        location, value = _parse_override(override)
        location = moved.get(location, location)
        _put(values, location, value)
        where |= {location[:depth]: "--set" for depth in range(min(2, len(location)), len(location) + 1)}
    return validated(
        kind, values, path or "settings", lines=where, forms=_FORMS if kind is RunSettings else None
    )


def write_settings(path: Path, settings: BaseModel, **facts: Any) -> None:
    """Write the effective settings as YAML that `load_settings` reads back, atomically.

    Args:
        path: the file.
        settings: what was used.
        **facts: written as comments above, for example the command and versions.
    """
    head = "".join(f"# {name}: {printable(str(value))}\n" for name, value in facts.items())
    with atomic_write(path) as temporary:
        temporary.write_text(head + settings_to_yaml(settings), encoding="utf-8")


def settings_to_dict(settings: BaseModel) -> dict[str, Any]:
    """Return settings as JSON values."""
    values: dict[str, Any] = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return values


def settings_to_yaml(settings: BaseModel) -> str:
    """Return settings as YAML."""
    values = settings_to_dict(settings)
    if isinstance(settings, RunSettings):
        for name, word in PLANNED.items():
            section, field = name.split(".")
            if name in settings.automatic:
                values[section][field] = AUTO
            elif values[section][field] is None:
                values[section][field] = word
    return yaml.safe_dump(values, sort_keys=False)


def _without_words(values: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Take the words of `PLANNED` out of what was read, and tell which fields are left to planning."""
    plain = copy.deepcopy(dict(values))
    automatic = set()
    for name, word in PLANNED.items():
        section, field = name.split(".")
        given = plain.get(section, {})
        if not isinstance(given, dict):
            continue  # a section that is made already, or is wrong and refused as such
        if given.get(field, AUTO) == AUTO:
            automatic.add(name)
            given.pop(field, None)
        elif word is not None and given[field] == word:
            given[field] = None
    if isinstance(train := plain.get("train"), dict) and train.get("epochs") is not None:
        automatic.discard("train.steps")
    return plain, frozenset(automatic)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    values, lines = read_yaml(path)
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected sections with fields (got {type(values).__name__})")
    return values, lines


def _parse_override(text: str) -> tuple[Location, Any]:
    name, equals, value = text.partition("=")
    location = tuple(name.strip().split("."))
    if not equals or not all(location) or len(location) > _MOST_PARTS:
        raise InputError(f"--set: expected section.field=value (got {shown(repr(text))})")
    return location, parse_yaml(value, f"--set {shown(name)}")


def _put(values: dict[str, Any], location: Location, value: Any) -> None:
    for part in location[:-1]:
        inner = values.setdefault(str(part), {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {'.'.join(map(str, location))}: {part} has no fields")
        values = inner
    values[str(location[-1])] = value


def _move(values: dict[str, Any], lines: dict[Location, int], before: Location, now: Location) -> None:
    """Put a field of a file that stands at the place it had where it is now."""
    section, field = map(str, before)
    inner = values.get(section)
    if isinstance(inner, dict) and field in inner:
        _put(values, now, inner.pop(field))
        lines[now] = lines[before]
