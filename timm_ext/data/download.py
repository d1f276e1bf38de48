"""Data sets of the Medical Segmentation Decathlon (Antonelli et al. 2022), fetched where they are missing."""

import logging
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timm_ext.data.formats.dataset_json import HEADER_NAME
from timm_ext.errors import InputError
from timm_ext.files import temporary_folder


def download_decathlon(folder: Path) -> None:
    """Fetch the data set after which a folder is named, unless it is there; MONAI knows where it lies.

    The archive is checked by its MD5 and unpacked whole or not at all.

    Args:
        folder: its name is that of a data set, such as `Task04_Hippocampus`.

    Raises:
        InputError: there is no data set of this name, or it could not be fetched.
    """
    from monai.apps.datasets import DecathlonDataset
    from monai.apps.utils import HashCheckError, download_url, extractall

    if (folder / HEADER_NAME).is_file():
        return
    if (url := DecathlonDataset.resource.get(folder.name)) is None:
        raise InputError(
            f"{folder}: expected a folder named after a data set of the Decathlon to download, one of "
            f"{', '.join(DecathlonDataset.resource)}"
        )
    with temporary_folder(folder) as parts, _silent(logging.getLogger("monai.apps")):
        archive, md5 = parts / f"{folder.name}.tar", DecathlonDataset.md5[folder.name]
        try:
            # Not `download_and_extract`, which wants another package to ask the server for the file's name.
            download_url(url, archive, md5, "md5", progress=False)
            extractall(archive, parts, file_type="tar")
            (parts / folder.name).replace(folder)
        except (OSError, RuntimeError, ValueError, tarfile.TarError, HashCheckError) as error:
            raise InputError(
                f"{folder}: expected to download it from {url} (got {error}); unpack that file there "
                "yourself, or name another data set"
            ) from error


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Let a logger say nothing: failures are told by the error."""
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
