"""MONAI's bundles: the network of their configs, the weights, the channels and labels of their metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_ext.documents import read_json, read_yaml
from timm_ext.errors import InputError, listed
from timm_ext.interop.monai.config import network_of
from timm_ext.interop.monai.labels import task_of_metadata
from timm_ext.interop.monai.preparation import settings_of

WEIGHTS = Path("models") / "model.pt"
_METADATA = Path("configs") / "metadata.json"
_CONFIGS = tuple(
    Path("configs") / f"{stem}{ending}"
    for ending in (".json", ".yaml", ".yml")
    for stem in ("inference", "train")
)
_NO_STEPS = "no preprocessing in its configs: images are prepared as the settings of timm_ext say"
_ENTRIES = ("network_def", "network")


@dataclass(frozen=True)
class Bundle:
    """What a bundle says of its network.

    Attributes:
        weights: file of its tensors.
        network: what rebuilds it.
        task: as JSON values, where the metadata name channels and labels that fit the network.
        settings: by section, as far as the preprocessing and the inferer say the same as settings of ours.
        notes: what was left out, in words.
    """

    weights: Path
    network: dict[str, Any]
    task: dict[str, Any] | None
    settings: dict[str, Any]
    notes: tuple[str, ...]


def root_of(path: Path) -> Path | None:
    """Return the folder of the bundle that a path is, or whose weights it is; None where it is of none."""
    folder = path if path.is_dir() else path.parent.parent
    inside = path.is_dir() or path.parent.name == WEIGHTS.parent.name
    return folder if inside and any((folder / name).is_file() for name in (_METADATA, *_CONFIGS)) else None


def read_bundle(root: Path, weights: Path | None = None) -> Bundle:
    """Read the description of a bundle.

    Args:
        root: its folder.
        weights: file of the tensors, by default `models/model.pt`.

    Raises:
        InputError: a file is missing or damaged, or as for `network_of`.
    """
    weights = weights or root / WEIGHTS
    if not weights.is_file():
        there = sorted(file.name for file in weights.parent.glob("model*"))
        raise InputError(
            f"{root}: expected the weights of a bundle, {WEIGHTS} (got {listed(there) or 'none'}); large "
            f"files are fetched by: python -m monai.bundle download_large_files --bundle_path {root}"
        )
    configs = _configs_of(root)
    file, config, entry = _definition(configs, root)
    network, notes = network_of(config, entry, file)
    metadata = read_json(root / _METADATA) if (root / _METADATA).is_file() else None
    task, missing = task_of_metadata(metadata, network, root.resolve().name)
    settings, unlike = _settings(configs, task, network["in_channels"])
    return Bundle(weights, network, task, settings, (*notes, *([missing] if missing else []), *unlike))


def _configs_of(root: Path) -> dict[Path, Mapping[str, Any]]:
    """Return the configs that a bundle has, those of inference first."""
    found = {}
    for file in (root / name for name in _CONFIGS):
        if file.is_file():
            config = read_json(file) if file.suffix == ".json" else read_yaml(file)[0]
            found[file] = config if isinstance(config, Mapping) else {}
    return found


def _settings(
    configs: Mapping[Path, Mapping[str, Any]], task: Mapping[str, Any] | None, channels: int
) -> tuple[dict[str, Any], list[str]]:
    """Return settings that say the same as the first config with a preprocessing, and what does not."""
    modalities = task["modalities"] if task else ()
    for file, config in configs.items():
        for section in (config, config.get("validate")):
            if isinstance(section, Mapping) and (steps := section.get("preprocessing")) is not None:
                inferer = section.get("inferer", config.get("inferer"))
                return settings_of(config, (steps, inferer), modalities, channels, file.name)
    return {}, [_NO_STEPS]


def _definition(configs: Mapping[Path, Mapping[str, Any]], root: Path) -> tuple[Path, Mapping[str, Any], str]:
    """Return the first config that defines a network, its content, and the name of the definition."""
    for file, config in configs.items():
        for entry in _ENTRIES:
            if isinstance(config.get(entry), Mapping):
                return file, config, entry
    files = listed(file.name for file in configs) or "no config"
    raise InputError(
        f"{root}: expected a bundle whose configs/inference.json or train.json defines network_def "
        f"(got {files} without)"
    )
