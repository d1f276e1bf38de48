"""The transforms that a MONAI config lists: their names and arguments, and which images the network sees."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from timm_ext.errors import InputError, shown
from timm_ext.interop.monai.config import literal, place_in

_MOST_NESTED = 16
_IMAGE, _LABEL = "image", "label"  # what MONAI's own trainers call them
_NAMES_OF_LABELS = {_LABEL, "labels", "mask", "seg"}
_OF_ANY_VALUES = {"Lambdad", "ImageFilterd", "TorchVisiond", "TorchIOd", "CuCIMd"}
DISABLED = "_disabled_"
_OF_EVERY_TRANSFORM = {"_target_", DISABLED, "_desc_", "_requires_", "keys", "allow_missing_keys", "lazy"}


@dataclass(frozen=True)
class Transform:
    """A transform of a config, of whose arguments only what is asked for must be a literal.

    Attributes:
        name: of its class, in the first of MONAI's spellings for dictionaries; of other programs' the path.
        definition: `{"_target_": CLASS, ARGUMENT: VALUE, …}`.
        config: to which `@` in it refers.
        images: keys under which the network's images are there before it; None where that is not known.
    """

    name: str
    definition: Mapping[str, Any]
    config: Mapping[str, Any]
    images: frozenset[str] | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument.

        Raises:
            InputError: it is no literal.
        """
        return literal(self.definition.get(name, default), self.config, name)

    def of_image(self, name: str, default: Any = None) -> Any:
        """Return an argument that is given once or by key: that of the first image.

        Raises:
            InputError: it is no literal.
        """
        given = place_in(self.definition.get(name, default), self.config, name)
        keys = self.keys
        if isinstance(given, list) and len(given) in {1, len(keys)} - {0}:
            place = next((place for place, key in enumerate(keys) if self.is_image(key)), 0)
            given = given[place % len(given)]
        return literal(given, self.config, name)

    @property
    def keys(self) -> tuple[str, ...]:
        """What it is applied to; none where that is no literal."""
        return _keys(self.definition.get("keys"), self.config)

    def is_image(self, key: str) -> bool:
        """Tell whether the network sees what is under a key."""
        if self.images is not None:
            return key in self.images
        return key not in _NAMES_OF_LABELS | {*_keys("@label_key", self.config)}

    def is_of_images(self) -> bool:
        """Tell whether it is applied to what the network sees; one whose keys are not known is."""
        return not self.keys or any(map(self.is_image, self.keys))

    def unlike(self, same: Mapping[str, Any], known: Collection[str]) -> list[str]:
        """Say which arguments nothing here follows.

        Args:
            same: arguments with the values that mean what is done here.
            known: names of those that are followed, or make no difference.
        """
        told = []
        for name in self.definition.keys() - _OF_EVERY_TRANSFORM - set(known):
            try:
                value = self.of_image(name) if self.keys else self.get(name)
            except InputError as error:
                told.append(str(error))
                continue
            if value is not None and value != same.get(name):
                told.append(f"{name} {shown(value)}{f', here {same[name]}' if name in same else ''}")
        return sorted(told)


def transforms_of(listed: object, config: Mapping[str, Any], place: str) -> list[Transform]:
    """Return the transforms of a `Compose` or a list, without those that are disabled.

    Raises:
        InputError: it is something else, or an expression.
    """
    definitions = _listed(listed, config, place)
    steps = [Transform(name_of(definition), definition, config) for definition in definitions]
    every: list[frozenset[str]] = []
    images = frozenset({_IMAGE, *_keys("@image_key", config)})
    for step in reversed(steps):
        names = _keys(step.definition.get("name" if step.name == "ConcatItemsd" else "names"), config)
        if step.name in ("ConcatItemsd", "CopyItemsd") and images & set(names):
            images |= set(step.keys)
        every.append(images)
    if not any(images & set(step.keys) for images, step in zip(every, reversed(steps), strict=True)):
        return steps  # they have other names
    return [
        Transform(step.name, step.definition, config, images)
        for step, images in zip(steps, reversed(every), strict=True)
    ]


def _listed(
    transforms: object, config: Mapping[str, Any], place: str, depth: int = 0
) -> list[Mapping[str, Any]]:
    """Return the definitions of transforms, those of a `Compose` among them, too."""
    if depth > _MOST_NESTED:
        raise InputError(f"{place}: expected a list of transforms (got lists more than {_MOST_NESTED} deep)")
    found = place_in(transforms, config, place)
    if isinstance(found, Mapping) and "_target_" in found:
        composed = name_of(found) == "Compose"
        with nullcontext() if composed else suppress(InputError):  # whoever follows it tells
            if _is_disabled(found, config, place):
                return []
        return _listed(found.get("transforms"), config, place, depth + 1) if composed else [found]
    if not isinstance(found, list):
        raise InputError(f"{place}: expected transforms by _target_ (got {shown(found)})")
    return [definition for one in found for definition in _listed(one, config, place, depth + 1)]


def _is_disabled(definition: Mapping[str, Any], config: Mapping[str, Any], place: str) -> bool:
    """Tell what MONAI's `ConfigComponent.is_disabled` does."""
    value = literal(definition.get(DISABLED, False), config, f"{place}: {DISABLED}")
    return value.lower().strip() == "true" if isinstance(value, str) else bool(value)


def name_of(definition: Mapping[str, Any]) -> str:
    """Return the name of a class of MONAI, of transforms in the first spelling; of others the path."""
    path = str(definition.get("_target_"))
    module, _, name = path.rpartition(".")
    if module and not module.startswith("monai."):
        return path
    for ending in ("Dict", "D"):
        if name.endswith(ending):
            return f"{name.removesuffix(ending)}d"
    return name


def changes_values(name: str) -> bool:
    """Tell whether a transform changes intensities, or may do so for all that is known of it."""
    return "." in name or name in _OF_ANY_VALUES or name in _of_intensities()


@cache
def _of_intensities() -> frozenset[str]:
    from monai.transforms.intensity import dictionary as intensity  # slow to load
    from monai.transforms.smooth_field import dictionary as smooth_field

    return frozenset((*intensity.__all__, *smooth_field.__all__))


def _keys(value: object, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one name or several as texts; none where they are not said."""
    try:
        found = literal(value, config, "keys")
    except InputError:
        return ()
    every: Sequence[object] = found if isinstance(found, list) else () if found is None else (found,)
    return tuple(map(str, every))
