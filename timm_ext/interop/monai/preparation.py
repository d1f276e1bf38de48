"""What MONAI's transforms do to images, as settings of this package; nothing in them is run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from timm_ext.data.normalise import HOUNSFIELD_WINDOW
from timm_ext.errors import InputError, shown
from timm_ext.inference import PredictSettings
from timm_ext.interop.monai.config import literal, place_in
from timm_ext.vocabulary.modalities import in_hounsfield_units

_WITHOUT_EFFECT = {
    *("LoadImaged", "EnsureChannelFirstd", "AddChanneld", "AsChannelFirstd", "EnsureTyped", "CastToTyped"),
    *("ToTensord", "ToDeviced", "Identityd", "ConcatItemsd", "SelectItemsd", "DeleteItemsd"),
}
_OF_SHAPE = ("Pad", "Crop", "Resize", "Spacing", "Orientation", "Rotate", "Flip")
_OF_LABELS = {"label", "labels", "mask", "seg"}
_AXES = ("RL", "AP", "SI")
_MOST_NESTED = 16
_LARGEST = 1e30  # of a number in a config
_MONAI_OVERLAP = 0.25  # where a config does not say it


@dataclass
class _Steps:
    """What was read of a preparation so far.

    Attributes:
        modalities: of the network, none where they are not known.
        channels: of the network.
        prepare: fields of `PrepareSettings`, at first what no transform at all means.
        notes: what is not followed, in words.
        axes: of the images, RAS or others; None as the file has them.
        on_values: names of the transforms that change intensities.
    """

    modalities: Sequence[str]
    channels: int
    prepare: dict[str, Any] = field(
        default_factory=lambda: {"spacing": None, "normalise": "none", "hounsfield": None, "crop": False}
    )
    notes: list[str] = field(default_factory=list)
    axes: str | None = None
    on_values: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Arguments:
    """The arguments of a transform, of which only what is asked for must be a literal."""

    definition: Mapping[str, Any]
    config: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        return literal(self.definition.get(name, default), self.config, name)


def settings_of(
    config: Mapping[str, Any],
    parts: tuple[object, object],
    modalities: Sequence[str],
    channels: int,
    where: object,
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings, by section, that prepare images as transforms of MONAI do.

    Followed are `Orientationd`, `Spacingd`, `ScaleIntensityRanged` of Hounsfield units to 0 … 1,
    `NormalizeIntensityd` of what is not zero and `CropForegroundd`, where our step is the same, and the
    window of a `SlidingWindowInferer`.

    Args:
        config: content of the file, to which `@` refers.
        parts: `Compose` or a list of transforms; and the inferer, or None.
        modalities: of the network, none where they are not known.
        channels: of the network.
        where: the file, for messages.

    Returns:
        The settings, and a text for each transform that is not followed.
    """
    window, notes = _window(parts[1], config, where)
    settings: dict[str, Any] = {"predict": {"window": window}}
    try:
        transforms = _listed(parts[0], config, f"{where}: preprocessing")
    except InputError as error:
        return settings, [f"{error}; images are prepared as the settings of timm_ext say", *notes]
    steps = _Steps(modalities, channels)
    for definition in transforms:
        _follow(definition, config, steps, where)
    if steps.axes is None:
        steps.notes.append(f"{where}: no Orientationd; images are turned to RAS here")
    if steps.on_values and steps.prepare["normalise"] == "none":
        steps.prepare |= {"normalise": "zscore", "hounsfield": HOUNSFIELD_WINDOW}
    return {"prepare": steps.prepare, **settings}, [*steps.notes, *notes]


def _listed(
    transforms: object, config: Mapping[str, Any], place: str, depth: int = 0
) -> list[Mapping[str, Any]]:
    """Return the definitions of transforms, those of a `Compose` among them, too."""
    if depth > _MOST_NESTED:
        raise InputError(f"{place}: expected a list of transforms (got lists more than {_MOST_NESTED} deep)")
    found = place_in(transforms, config, place)
    if isinstance(found, Mapping) and _name_of(found) == "Compose":
        return _listed(found.get("transforms"), config, place, depth + 1)
    if isinstance(found, Mapping) and "_target_" in found:
        return [found]
    if not isinstance(found, list):
        raise InputError(f"{place}: expected transforms by _target_ (got {shown(found)})")
    return [definition for one in found for definition in _listed(one, config, place, depth + 1)]


def _name_of(definition: Mapping[str, Any]) -> str:
    """Return the name of a transform of MONAI in its first spelling for dictionaries; of others the path."""
    path = str(definition.get("_target_"))
    module, _, name = path.rpartition(".")
    if module and not module.startswith("monai."):
        return path
    for ending in ("Dict", "D"):
        if name.endswith(ending):
            return f"{name.removesuffix(ending)}d"
    return name


def _follow(definition: Mapping[str, Any], config: Mapping[str, Any], steps: _Steps, where: object) -> None:
    """Change the settings as a transform says, and note in what it is not followed."""
    name, arguments = _name_of(definition), _Arguments(definition, config)
    if name in _WITHOUT_EFFECT or definition.get("_disabled_") is True or _is_of_labels(arguments):
        return
    try:
        if name not in _KNOWN:
            raise InputError("no setting is the same")
        unlike = _KNOWN[name](arguments, steps)
    except InputError as error:
        steps.notes.append(f"{where}: {name} is not followed: {error}")
    else:
        steps.notes += [f"{where}: {name}: {unlike}"] if unlike else []
    if not any(word in name for word in _OF_SHAPE):
        steps.on_values.append(name)


def _is_of_labels(arguments: _Arguments) -> bool:
    try:
        keys = arguments.get("keys")
    except InputError:  # whichever it is, it is of images
        return False
    return set(map(str, keys if isinstance(keys, list) else [keys])) <= _OF_LABELS


def _orientation(arguments: _Arguments, steps: _Steps) -> str:
    axes = "RAS" if arguments.get("as_closest_canonical") is True else str(arguments.get("axcodes"))
    if len(axes) != 3 or any(sum(code in pair for code in axes) != 1 for pair in _AXES):
        raise InputError(f"expected axcodes such as RAS (got {shown(axes)})")
    steps.axes = axes
    return "" if axes == "RAS" else f"axes {axes}, here RAS"


def _spacing(arguments: _Arguments, steps: _Steps) -> str:
    given, mode = arguments.get("pixdim"), arguments.get("mode", "bilinear")
    lengths = list(given) if isinstance(given, list) else [given]
    lengths += lengths[-1:] * (3 - len(lengths))
    if len(lengths) != 3 or not all(_number(length) and length > 0 for length in lengths):
        raise InputError(f"expected pixdim, three lengths in mm (got {shown(given)})")
    axes = steps.axes or "RAS"
    places = [next(place for place, code in enumerate(axes) if code in pair) for pair in _AXES]
    steps.prepare["spacing"] = [float(lengths[place]) for place in places]
    unlike = []
    if (mode[0] if isinstance(mode, list) and mode else mode) not in ("bilinear", 1):
        unlike.append(f"mode {shown(mode)}, here bilinear")
    if "min_pixdim" in arguments.definition or "max_pixdim" in arguments.definition:
        unlike.append("voxels of about that size are resampled here, too")
    if steps.on_values:
        unlike.append(f"after {steps.on_values[-1]}, here before it")
    return ", ".join(unlike)


def _range(arguments: _Arguments, steps: _Steps) -> str:
    low, high = arguments.get("a_min"), arguments.get("a_max")
    target = tuple(arguments.get(key) for key in ("b_min", "b_max", "clip"))
    if not _number(low) or not _number(high) or target != (0, 1, True):
        raise InputError(f"a window is clipped to 0 … 1 here (got {low} … {high} to {_told(target)})")
    if steps.modalities and not all(map(in_hounsfield_units, steps.modalities)):
        raise InputError(f"windows are of Hounsfield units here (got {', '.join(steps.modalities)})")
    _check_first(steps)
    steps.prepare |= {"normalise": "zscore", "hounsfield": [float(low), float(high)]}
    return "" if steps.modalities else "taken for images in Hounsfield units alone, such as CT"


def _told(target: tuple[Any, Any, Any]) -> str:
    """Say what a range is scaled to."""
    return f"{target[0]} … {target[1]}{'' if target[2] is True else ', not clipped'}"


def _normalise(arguments: _Arguments, steps: _Steps) -> str:
    if arguments.get("subtrahend") is not None or arguments.get("divisor") is not None:
        raise InputError("z-scores are of each image's own mean here (got subtrahend or divisor)")
    if steps.channels > 1 and not _true(arguments.get("channel_wise")):
        raise InputError("z-scores are of each modality here (got them of all together)")
    _check_first(steps)
    steps.prepare |= {"normalise": "zscore", "hounsfield": None}
    return "" if _true(arguments.get("nonzero")) else "of all voxels, here of those that are not 0"


def _check_first(steps: _Steps) -> None:
    """Refuse a second step; what others than MONAI's do is told apart."""
    if before := [name for name in steps.on_values if "." not in name]:
        raise InputError(f"intensities are changed by one step here (got {before[-1]} before)")


def _crop(arguments: _Arguments, steps: _Steps) -> str:
    margin, divisible = arguments.get("margin", 0), arguments.get("k_divisible", 1)
    if (margin, divisible) != (0, 1) or {"select_fn", "channel_indices"} & arguments.definition.keys():
        raise InputError("the box is that of the foreground here (got margin, k_divisible or a choice)")
    windowed = steps.on_values == ["ScaleIntensityRanged"] and steps.prepare["hounsfield"] is not None
    if not windowed and (steps.on_values or any(map(in_hounsfield_units, steps.modalities))):
        raise InputError("the box is that of what is above the window, or not 0 before z-scores, here")
    steps.prepare["crop"] = True
    return ""


_KNOWN: dict[str, Callable[[_Arguments, _Steps], str]] = {
    "Orientationd": _orientation,
    "Spacingd": _spacing,
    "ScaleIntensityRanged": _range,
    "NormalizeIntensityd": _normalise,
    "CropForegroundd": _crop,
}


def _window(inferer: object, config: Mapping[str, Any], where: object) -> tuple[list[int] | None, list[str]]:
    """Return the window of an inferer, None for whole volumes, and what of it is not followed."""
    place = f"{where}: inferer"
    try:
        definition = place_in(inferer, config, place)
        if not isinstance(definition, Mapping) or (name := _name_of(definition)) == "SimpleInferer":
            return None, []
        size = literal(definition.get("roi_size"), config, f"{place}: roi_size")
        overlap = literal(definition.get("overlap", _MONAI_OVERLAP), config, f"{place}: overlap")
    except InputError as error:
        return None, [str(error)]
    edges = size if isinstance(size, list) else [size] * 3
    known = name in ("SlidingWindowInferer", "SlidingWindowInfererAdapt")
    if not known or len(edges) != 3 or not all(type(edge) is int and edge > 0 for edge in edges):
        return None, [f"{place}: {name} of roi_size {shown(size)} is not followed"]
    own = PredictSettings().overlap
    unlike = f"{place}: overlap {shown(overlap)}, here {own} unless by --set predict.overlap"
    return edges, [] if overlap == own else [unlike]


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # NaN is not


def _true(value: object) -> bool:
    return value is True or value == "True"
