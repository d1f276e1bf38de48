"""What MONAI's transforms do to images, as settings of this package; nothing in them is run."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from timm_ext.data.normalise import HOUNSFIELD_WINDOW
from timm_ext.errors import InputError, listed, shown
from timm_ext.inference import PredictSettings
from timm_ext.interop.monai.config import literal, place_in
from timm_ext.interop.monai.transforms import DISABLED, Transform, changes_values, name_of, transforms_of
from timm_ext.vocabulary.modalities import in_hounsfield_units

WITHOUT_EFFECT = {
    *("LoadImaged", "EnsureChannelFirstd", "AddChanneld", "AsChannelFirstd", "EnsureTyped", "CastToTyped"),
    *("ToTensord", "ToNumpyd", "ToDeviced", "Identityd", "ConcatItemsd", "CopyItemsd", "SelectItemsd"),
    *("DeleteItemsd", "DataStatsd", "IntensityStatsd", "SimulateDelayd", "ApplyPendingd"),
}
_WHOLE = ("int", "bool", "long", "short")
_AXES = ("RL", "AP", "SI")
_LARGEST = 1e30  # of a number in a config
_UNLESS_SAID = {"overlap": 0.25, "mode": "constant"}  # what MONAI's inferers do
_OF_WINDOWS = {
    "overlap": PredictSettings().overlap,
    "mode": "gaussian",
    "sigma_scale": 0.125,
    "padding_mode": "constant",
    "cval": 0,
    "with_coord": False,
}
_WITHOUT_EFFECT_ON_WINDOWS = {
    *("sw_batch_size", "sw_device", "device", "progress", "cache_roi_weight_map", "cpu_thresh"),
    *("buffer_steps", "buffer_dim"),
}
_REMEDY = " unless by --set predict.overlap"


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
class _Rule:
    """How a transform is followed.

    Attributes:
        follow: changes the settings, and says what of it is unlike.
        heard: arguments that it reads.
        same: arguments that it does not read, with the values that mean what is done here.
        idle: arguments without effect on prepared images.
    """

    follow: Callable[[Transform, _Steps], str]
    heard: Collection[str]
    same: Mapping[str, Any] = field(default_factory=dict)
    idle: Collection[str] = ("dtype",)


def settings_of(
    config: Mapping[str, Any],
    parts: tuple[object, object],
    modalities: Sequence[str],
    channels: int,
    where: object,
    changed: Sequence[str] = (),
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
        changed: names of what else changes intensities.

    Returns:
        The settings, and a text for each transform and each argument that is not followed.
    """
    window, notes = _window(parts[1], config, where)
    settings: dict[str, Any] = {"predict": {"window": window}}
    try:
        transforms = transforms_of(parts[0], config, f"{where}: preprocessing")
    except InputError as error:
        return settings, [f"{error}; images are prepared as the settings of timm_ext say", *notes]
    steps = _Steps(modalities, channels)
    for transform in transforms:
        if transform.is_of_images():
            steps.notes += [f"{where}: {line}" for line in _followed(transform, steps)]
    steps.notes += [f"{where}: {name} is not followed: no setting is the same" for name in changed]
    steps.on_values += changed
    if steps.axes is None:
        steps.notes.append(f"{where}: no Orientationd; images are turned to RAS here")
    if steps.on_values and steps.prepare["normalise"] == "none":
        steps.prepare |= {"normalise": "zscore", "hounsfield": HOUNSFIELD_WINDOW}
    return {"prepare": steps.prepare, **settings}, [*steps.notes, *notes]


def _followed(transform: Transform, steps: _Steps) -> list[str]:
    """Change the settings as a transform of images says, and say in what it is not followed."""
    name = transform.name
    if name in WITHOUT_EFFECT:
        return _cast(transform)
    try:
        if (rule := _KNOWN.get(name)) is None:
            raise InputError("no setting is the same")
        transform.get(DISABLED)  # an expression may switch it off
        told = rule.follow(transform, steps)
        unlike = [told] if told else []
        unlike += transform.unlike(rule.same, {*rule.heard, *rule.idle})
        said = [f"{name}: {', '.join(unlike)}"] if unlike else []
    except InputError as error:
        said = [f"{name} is not followed: {error}"]
    if changes_values(name):
        steps.on_values.append(name)
    return said


def _cast(transform: Transform) -> list[str]:
    """Say where a cast to whole numbers is left out."""
    try:
        kind = str(transform.of_image("dtype"))
    except InputError as error:
        kind = str(error)
    whole = transform.name in ("CastToTyped", "EnsureTyped") and any(word in kind for word in _WHOLE)
    return [f"{transform.name}: dtype {shown(kind)}, here float32"] if whole else []


def _orientation(transform: Transform, steps: _Steps) -> str:
    axes = "RAS" if transform.get("as_closest_canonical") is True else str(transform.get("axcodes"))
    if len(axes) != 3 or any(sum(code in pair for code in axes) != 1 for pair in _AXES):
        raise InputError(f"expected axcodes such as RAS (got {shown(axes)})")
    steps.axes = axes
    return "" if axes == "RAS" else f"axes {axes}, here RAS"


def _spacing(transform: Transform, steps: _Steps) -> str:
    given, mode = transform.get("pixdim"), transform.of_image("mode", "bilinear")
    lengths = list(given) if isinstance(given, list) else [given]
    lengths += lengths[-1:] * (3 - len(lengths))
    if len(lengths) != 3 or not all(_number(length) and length > 0 for length in lengths):
        raise InputError(f"expected pixdim, three lengths in mm (got {shown(given)})")
    axes = steps.axes or "RAS"
    places = [next(place for place, code in enumerate(axes) if code in pair) for pair in _AXES]
    steps.prepare["spacing"] = [float(lengths[place]) for place in places]
    unlike = []
    if mode not in ("bilinear", 1):
        unlike.append(f"mode {shown(mode)}, here bilinear")
    if any(transform.definition.get(name) is not None for name in ("min_pixdim", "max_pixdim")):
        unlike.append("voxels of about that size are resampled here, too")
    if steps.on_values:
        unlike.append(f"after {steps.on_values[-1]}, here before it")
    return ", ".join(unlike)


def _range(transform: Transform, steps: _Steps) -> str:
    low, high = transform.get("a_min"), transform.get("a_max")
    target = tuple(transform.get(key) for key in ("b_min", "b_max", "clip"))
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


def _normalise(transform: Transform, steps: _Steps) -> str:
    if transform.get("subtrahend") is not None or transform.get("divisor") is not None:
        raise InputError("z-scores are of each image's own mean here (got subtrahend or divisor)")
    if steps.channels > 1 and not _true(transform.get("channel_wise")):
        raise InputError("z-scores are of each modality here (got them of all together)")
    _check_first(steps)
    steps.prepare |= {"normalise": "zscore", "hounsfield": None}
    return "" if _true(transform.get("nonzero")) else "of all voxels, here of those that are not 0"


def _check_first(steps: _Steps) -> None:
    """Refuse a second step; what others than MONAI's do is told apart."""
    if before := [name for name in steps.on_values if "." not in name]:
        raise InputError(f"intensities are changed by one step here (got {before[-1]} before)")


def _crop(transform: Transform, steps: _Steps) -> str:
    plain = _all_are(0, transform.get("margin", 0)) and _all_are(1, transform.get("k_divisible", 1))
    chosen = [transform.definition.get(name) for name in ("select_fn", "channel_indices")]
    if not plain or any(choice is not None for choice in chosen):
        raise InputError("the box is that of the foreground here (got margin, k_divisible or a choice)")
    images = [key for key in transform.keys if transform.is_image(key)]
    if transform.keys and [source := transform.get("source_key")] != images:
        raise InputError(f"the box is that of {listed(images)} here (got that of {shown(source)})")
    windowed = steps.on_values == ["ScaleIntensityRanged"] and steps.prepare["hounsfield"] is not None
    if not windowed and (steps.on_values or any(map(in_hounsfield_units, steps.modalities))):
        raise InputError("the box is that of what is above the window, or not 0 before z-scores, here")
    steps.prepare["crop"] = True
    return ""


def _all_are(wanted: int, value: Any) -> bool:
    """Tell whether a number that is given once or by axis is always the same."""
    return all(one == wanted for one in (value if isinstance(value, list) else [value]))


_KNOWN: dict[str, _Rule] = {
    "Orientationd": _Rule(_orientation, ("axcodes", "as_closest_canonical")),
    "Spacingd": _Rule(
        _spacing,
        ("pixdim", "mode", "min_pixdim", "max_pixdim"),
        {"diagonal": False, "padding_mode": "border", "align_corners": False, "scale_extent": False},
        ("dtype", "recompute_affine", "ensure_same_shape"),
    ),
    "ScaleIntensityRanged": _Rule(_range, ("a_min", "a_max", "b_min", "b_max", "clip")),
    "NormalizeIntensityd": _Rule(_normalise, ("subtrahend", "divisor", "nonzero", "channel_wise")),
    "CropForegroundd": _Rule(
        _crop,
        ("source_key", "margin", "k_divisible", "select_fn", "channel_indices"),
        idle=("mode", "allow_smaller", "start_coord_key", "end_coord_key"),
    ),
}


def _window(inferer: object, config: Mapping[str, Any], where: object) -> tuple[list[int] | None, list[str]]:
    """Return the window of an inferer, None for whole volumes, and what of it is not followed."""
    place = f"{where}: inferer"
    try:
        definition = place_in(inferer, config, place)
        if not isinstance(definition, Mapping) or (name := name_of(definition)) == "SimpleInferer":
            return None, []
        size = literal(definition.get("roi_size"), config, f"{place}: roi_size")
    except InputError as error:
        return None, [str(error)]
    edges = size if isinstance(size, list) else [size] * 3
    known = name in ("SlidingWindowInferer", "SlidingWindowInfererAdapt")
    if not known or len(edges) != 3 or not all(type(edge) is int and edge > 0 for edge in edges):
        return None, [f"{place}: {name} of roi_size {shown(size)} is not followed"]
    given = Transform(name, {**_UNLESS_SAID, **definition}, config)
    unlike = given.unlike(_OF_WINDOWS, {"roi_size", *_WITHOUT_EFFECT_ON_WINDOWS})
    return edges, [f"{place}: {told}{_REMEDY if told.startswith('overlap ') else ''}" for told in unlike]


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # NaN is not


def _true(value: object) -> bool:
    return value is True or value == "True"
