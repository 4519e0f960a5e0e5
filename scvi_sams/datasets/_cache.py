"""Files fetched once, kept in a cache folder, and checked ever after."""

from __future__ import annotations

__all__ = ["DatasetUnavailableError", "fetch"]

import json
import os
import tempfile
from pathlib import Path

import pooch

from scvi_sams._exceptions import ScreenError

CACHE_VARIABLE = "SCVI_SAMS_CACHE"


class DatasetUnavailableError(ScreenError, ConnectionError):
    """A public screen could not be downloaded, and is not in the cache either."""


def fetch(
    url: str, cache_dir: str | os.PathLike[str] | None = None, progressbar: bool = True
) -> Path:
    """Download a file into the cache, unless it is there, and check that it is unchanged.

    No checksum is published for the public screens. The size and SHA-256 of a file are therefore
    written beside it (``<file>.json``) when it is first seen, and every later use is checked
    against them.

    Parameters
    ----------
    url
        Address of the file; its last part becomes the name of the file.
    cache_dir
        Folder to keep the file in. By default the environment variable ``SCVI_SAMS_CACHE``, else
        the user's cache folder for ``scvi_sams``.
    progressbar
        Whether to show the progress of the download.

    Returns
    -------
    Path of the file.

    Raises
    ------
    DatasetUnavailableError
        If the file is not in the cache and cannot be downloaded.
    ScreenError
        If the file is not the one that was recorded at its first use.
    """
    folder = Path(cache_dir or os.environ.get(CACHE_VARIABLE) or pooch.os_cache("scvi_sams"))
    path = folder / url.rsplit("/", 1)[-1]
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # An interrupted download must not leave half a file under the final name.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                partial = Path(scratch) / path.name
                pooch.HTTPDownloader(progressbar=progressbar)(url, str(partial), None)
                partial.replace(path)
        except OSError as error:
            raise DatasetUnavailableError(
                f"Could not download {url} into {folder} ({error}). If this machine is offline, "
                f"download the file elsewhere and pass it as `path=`, or put it into that folder "
                f"(chosen by `cache_dir=` or the environment variable {CACHE_VARIABLE})."
            ) from error
    _verify(path, url)
    return path


def _verify(path: Path, url: str) -> None:
    """Compare a file with its record, or write the record if there is none."""
    record_path = path.with_name(f"{path.name}.json")
    seen = {"url": url, "size": path.stat().st_size, "sha256": pooch.file_hash(path)}
    if not record_path.exists():
        record_path.write_text(json.dumps(seen, indent=2) + "\n")
        return
    recorded = json.loads(record_path.read_text())
    if (seen["size"], seen["sha256"]) != (recorded["size"], recorded["sha256"]):
        raise ScreenError(
            f"{path} has {seen['size']} bytes and SHA-256 {seen['sha256']}, but "
            f"{recorded['size']} bytes and {recorded['sha256']} were recorded when it was first "
            f"used. Delete the file to download it again; if it was replaced on purpose, delete "
            f"{record_path} as well."
        )
