"""nnU-Net's model folders, and the zip files that it exports: which checkpoint of them is meant."""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from timm_ext.errors import InputError, first_line, listed
from timm_ext.files import visible
from timm_ext.interop.nnunet.plans import FIRST_VERSION

PLANS, HEADER = "plans.json", "dataset.json"
FINAL = "checkpoint_final.pth"
_FOLD = re.compile(r"fold_(\d+|all)")
_DATA_SET = re.compile(r"Dataset\d")
_RESULTS = re.compile(r".+__.+__.+")  # trainer, plans, configuration
_CHECKPOINTS = (FINAL, "checkpoint_best.pth")
_FIRST_VERSION = "model_final_checkpoint.model"


def is_model_folder(path: Path) -> bool:
    """Tell whether a folder is one of a configuration's results, with folds, or that of one fold."""
    return path.is_dir() and ((path / PLANS).is_file() or bool(_checkpoint_in(path)) or _is_first(path))


def is_export(path: Path) -> bool:
    """Tell whether a file is a zip archive that `nnUNetv2_export_model_to_zip` wrote."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == PLANS for name in archive.namelist())
    except Exception:  # a damaged archive may raise anything; whoever reads the file as another kind tells
        return False


def data_set_of(path: Path) -> str:
    """Return the name of a configuration's folder: that of its data set, where nnU-Net's names show it."""
    inside = _DATA_SET.match(path.parent.name) or _RESULTS.fullmatch(path.name)
    return path.parent.name if inside else path.name


def checkpoint_of(path: Path, fold: str | None) -> Path:
    """Return the checkpoint of a model folder: the final one, or the best where training goes on.

    Args:
        path: the folder of a configuration, or of one of its folds.
        fold: `0`, `1`, …, `all`; None where there is one fold alone.

    Raises:
        InputError: no such fold, none at all, several without a choice, or a folder of nnU-Net v1.
    """
    if _is_first(path):
        raise InputError(f"{path}: expected a model folder of nnU-Net v2 (got one of v1); {FIRST_VERSION}")
    if (found := _checkpoint_in(path)) is not None:
        if fold is not None and path.name != f"fold_{fold}":
            raise InputError(
                f"{path}: expected the folder of a configuration beside --fold (got {path.name})"
            )
        return found
    folds = folds_of(path)
    return folds[_chosen(list(folds), fold, path)]


def folds_of(path: Path) -> dict[str, Path]:
    """Return the checkpoints of a configuration's folds, `0`, `1`, … and `all`."""
    found = {}
    for folder in sorted(visible(path, "fold_*")):
        if (match := _FOLD.fullmatch(folder.name)) and (file := _checkpoint_in(folder)) is not None:
            found[match[1]] = file
    return found


@contextmanager
def extracted(path: Path, fold: str | None) -> Iterator[Path]:
    """Lend the checkpoint of an exported model as a file.

    Raises:
        InputError: the archive is damaged, or as for `checkpoint_of`.
    """
    with TemporaryDirectory() as place:
        try:
            with zipfile.ZipFile(path) as archive:
                member = _member(archive.namelist(), fold, path)
                target = Path(place) / PurePosixPath(member).name
                with archive.open(member) as source, target.open("wb") as file:
                    while block := source.read(1 << 20):
                        file.write(block)
        except InputError:
            raise
        except Exception as error:  # a damaged archive may raise anything
            raise InputError(f"{path}: expected a whole zip archive (got: {first_line(error)})") from error
        yield target


def _member(names: list[str], fold: str | None, path: Path) -> str:
    """Return the name of the one checkpoint that is meant."""
    found: dict[str, dict[str, str]] = {}
    for wanted in reversed(_CHECKPOINTS):
        for name in names:
            parts = PurePosixPath(name).parts
            match = _FOLD.fullmatch(parts[-2]) if len(parts) > 2 else None
            if match is not None and parts[-1] == wanted:
                found.setdefault("/".join(parts[:-2]), {})[match[1]] = name
    if len(found) != 1:
        raise InputError(
            f"{path}: expected the model of one configuration (got {listed(found) or 'none'}); "
            "nnUNetv2_export_model_to_zip -c exports one"
        )
    (folds,) = found.values()
    return folds[_chosen(sorted(folds), fold, path)]


def _chosen(folds: list[str], fold: str | None, path: Path) -> str:
    """Return the one fold that is meant."""
    if fold is None and len(folds) == 1:
        return folds[0]
    if fold not in folds:
        got = "none" if not folds else listed(folds)
        what = "a fold with a checkpoint" if fold is None else f"a checkpoint of fold {fold}"
        hint = "; choose one by --fold" if fold is None and folds else ""
        raise InputError(f"{path}: expected {what} (got folds: {got}){hint}")
    return fold


def _checkpoint_in(folder: Path) -> Path | None:
    return next((folder / name for name in _CHECKPOINTS if (folder / name).is_file()), None)


def _is_first(path: Path) -> bool:
    return (path / _FIRST_VERSION).is_file() or any(path.glob(f"fold_*/{_FIRST_VERSION}"))
