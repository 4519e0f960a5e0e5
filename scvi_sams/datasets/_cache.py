"""Files fetched once, kept in a cache folder, and checked ever after."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import h5py
import pooch

from scvi_sams._exceptions import ScreenError

_CACHE_VARIABLE = "SCVI_SAMS_CACHE"


class DatasetUnavailableError(ScreenError, ConnectionError):
    """A public screen could not be downloaded, and is not in the cache either."""


def fetch(url: str, cache_dir: str | os.PathLike[str] | None, progressbar: bool) -> Path:
    """Download an HDF5 file into the cache, unless it is there as it was first seen.

    No checksum is published for the public screens. The size and SHA-256 of a file are therefore
    written beside it (``<file>.json``) at its first use. A file that differs from them, or is cut
    off, is downloaded again.
    """
    folder = Path(cache_dir or os.environ.get(_CACHE_VARIABLE) or pooch.os_cache("scvi_sams"))
    path = folder / url.rsplit("/", 1)[-1]
    record_path = path.with_name(f"{path.name}.json")
    record = _read_record(record_path)
    if path.is_file():
        seen = _fingerprint(path)
        if record == seen:
            return path
        if record is None and is_whole(path):
            # A cache that cannot be written to is still one.
            with contextlib.suppress(OSError):
                _write_record(record_path, {"url": url} | seen)
            return path
        warnings.warn(
            f"{path} is cut off, or is not what it was at its first use: it is downloaded again.",
            UserWarning,
            stacklevel=4,
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # An interrupted download must not leave half a file under the final name.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            partial = Path(scratch) / path.name
            pooch.HTTPDownloader(progressbar=progressbar)(url, str(partial), None)
            if not is_whole(partial):
                raise OSError("what came is not a whole HDF5 file")
            seen = _fingerprint(partial)
            if record is not None and record != seen:
                raise ScreenError(
                    f"{url} has now {seen['size']} bytes and SHA-256 {seen['sha256']}, but "
                    f"{record['size']} bytes and {record['sha256']} were recorded at its first "
                    f"use. If the new one is right, delete {record_path}."
                )
            os.replace(partial, path)
        _write_record(record_path, {"url": url} | seen)
    except OSError as error:
        raise DatasetUnavailableError(
            f"Could not download {url} into {folder} ({error}). If this machine is offline, "
            f"download the file elsewhere and pass it as `path=`, or put it into that folder "
            f"(chosen by `cache_dir=` or the environment variable {_CACHE_VARIABLE})."
        ) from error
    return path


def is_whole(path: Path) -> bool:
    """Whether a file is HDF5, and none of it missing."""
    try:
        h5py.File(path).close()
    except OSError:
        return False
    return True


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": pooch.file_hash(str(path))}


def _read_record(path: Path) -> dict[str, Any] | None:
    """Fingerprint of a file at its first use; None if there is none that can be read."""
    try:
        record = json.loads(path.read_text())
        return {key: record[key] for key in ("size", "sha256")}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_record(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, path)
