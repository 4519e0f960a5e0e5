"""The file of a saved model: plain data alone, written whole or not at all, checked when read."""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from importlib.metadata import version
from inspect import Parameter, signature
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anndata
import numpy as np
import pandas as pd
import scvi
import torch

from scvi_sams._compat import download, torch_device
from scvi_sams._exceptions import ScreenError, listed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from anndata import AnnData

    from scvi_sams.model.samsvae import SAMSVAE


FORMAT = 1  # to be raised when an older version of this package could not read what is written
_RECORD = "scvi_sams"
_PACKAGES = ("scvi-sams", "scvi-tools", "torch", "anndata", "numpy", "pandas")
_FRAME = "DataFrame"
_INFINITE = {"counts_per_cell"}  # of features that are no counts


class ModelFile(NamedTuple):
    """What the file of a model holds."""

    path: Path
    state: dict[str, torch.Tensor]
    var_names: np.ndarray
    attributes: dict[str, Any]
    record: dict[str, Any]  # who wrote it; empty in files of 0.1.0 and of other packages


# -- writing --------------------------------------------------------------------------------------


def save_model(
    model: SAMSVAE,
    folder: str | os.PathLike[str],
    prefix: str | None,
    overwrite: bool,
    save_anndata: bool,
    save_kwargs: dict[str, Any] | None,
    anndata_write_kwargs: dict[str, Any],
) -> None:
    """Write a model beside the files of its folder, then move it over them, the model last."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise ScreenError(
            f"{folder} already exists: save to another folder, or over it with overwrite=True."
        )
    if save_anndata and model.adata is None:
        raise ScreenError("The model has no AnnData: leave save_anndata out.")
    _check_constructor(model)
    content = _packed(model, save_kwargs)
    with _named(folder, model):
        folder.mkdir(parents=True, exist_ok=True)
        # In the folder itself, as a file can only be moved whole within one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
            names = [f"{prefix or ''}model.pt"]
            if save_anndata:
                names.insert(0, f"{prefix or ''}adata.h5ad")
                _write_adata(model.adata, Path(beside) / names[0], anndata_write_kwargs)
            (Path(beside) / names[-1]).write_bytes(content)
            for name in names:
                _flush(Path(beside) / name)
            for name in names:
                os.replace(Path(beside) / name, folder / name)
            _flush(folder)


@contextmanager
def _named(folder: Path, model: SAMSVAE) -> Iterator[None]:
    """Say which folder could not be written, and what became of it."""
    try:
        yield
    except OSError as error:
        kept = " What was there before is as it was." if folder.is_dir() else ""
        raise OSError(
            error.errno,
            f"{type(model).__name__} could not be saved to {folder}: "
            f"{error.strerror or error}.{kept}",
        ) from error


def _write_adata(adata: AnnData, path: Path, arguments: dict[str, Any]) -> None:
    kept_in = adata.filename if adata.isbacked else None
    adata.write_h5ad(path, **arguments)
    if kept_in is not None:  # anndata takes the copy for the file that the matrix is read from
        adata.file.filename = kept_in


def _flush(path: Path) -> None:
    """Wait until a file is on the disk: its name in the folder must not be there before it is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_constructor(model: SAMSVAE) -> None:
    """Check that the arguments that the model was made with can be written, which a load needs."""
    arguments = signature(type(model).__init__).parameters.values()
    recorded = model.init_params_["non_kwargs"] | model.init_params_["kwargs"]
    lost = [
        argument.name
        for argument in arguments
        if argument.name not in {"self", "adata", "registry", *recorded}
        and argument.kind is not Parameter.VAR_POSITIONAL
    ]
    if lost:
        raise ScreenError(
            f"{type(model).__name__} does not record {listed(lost)}, so that what is saved could "
            "not be loaded. End its __init__ with "
            "`self.init_params_ = self._get_init_params(locals())`; this one can be saved after "
            "model.init_params_ = {'non_kwargs': {...}, 'kwargs': {}} with its arguments."
        )


def _packed(model: SAMSVAE, save_kwargs: dict[str, Any] | None) -> bytes:
    """The bytes of a model's file, in the layout that scvi-tools reads."""
    state = model.module.state_dict()
    _check_finite(state, "The model")
    kinds: dict[tuple[Any, ...], str] = {}
    foreign: list[str] = []
    attributes = {
        name: _plain(value, (name,), kinds, foreign)
        for name, value in vars(model).items()
        if name.endswith("_") and not name.startswith("_")
    }
    if foreign:
        warnings.warn(
            f"{listed(foreign)} cannot be written as plain data: this model file can only be "
            "loaded with trusted=True. Use numbers, text, arrays, lists and dicts of them.",
            UserWarning,
            stacklevel=scvi.settings.warnings_stacklevel,
        )
    content = {
        "model_state_dict": state,
        "var_names": [str(name) for name in model.get_var_names()],
        "attr_dict": attributes,
        _RECORD: {
            "format": FORMAT,
            "versions": {name: version(name) for name in _PACKAGES},
            "seed": scvi.settings.seed,
            "kinds": kinds,
        },
    }
    buffer = BytesIO()
    torch.save(content, buffer, **(save_kwargs or {}))
    return buffer.getvalue()


def _plain(
    value: Any, path: tuple[Any, ...], kinds: dict[tuple[Any, ...], str], foreign: list[str]
) -> Any:
    """Put a value as numbers, text, tensors, lists and dicts; `kinds` keeps what it was."""

    def inside(key: Any, part: Any) -> Any:
        return _plain(part, (*path, key), kinds, foreign)

    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, pd.DataFrame):
        kinds[path] = _FRAME
        columns = {name: value[name].to_numpy() for name in value}
        value = {"name": value.index.name, "index": value.index.to_numpy(), "columns": columns}
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        kinds[path] = value.dtype.str
        if path[0] == "registry_":  # scvi-tools' fields take a list there, but no tensor
            return value.tolist()
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    elif isinstance(value, np.ndarray) and value.ndim == 1:
        kinds[path] = "O"
        value = value.tolist()
    if isinstance(value, Mapping):
        keys = [key.item() if isinstance(key, np.generic) else key for key in value]
        return {key: inside(key, part) for key, part in zip(keys, value.values(), strict=True)}
    if type(value) in (list, tuple):
        return type(value)(inside(number, part) for number, part in enumerate(value))
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is not None and type(value) not in (bool, int, float, str):
        foreign.append(f"{'/'.join(map(str, path))} ({type(value).__name__})")
    return value


def _restored(value: Any, path: tuple[Any, ...], kinds: Mapping[tuple[Any, ...], str]) -> Any:
    """Turn what `_plain` made into what it was."""
    kind = kinds.get(path)
    if isinstance(value, dict):
        value = {key: _restored(part, (*path, key), kinds) for key, part in value.items()}
    elif isinstance(value, list | tuple):
        value = type(value)(
            _restored(part, (*path, number), kinds) for number, part in enumerate(value)
        )
    if kind == _FRAME:
        return pd.DataFrame(value["columns"], index=pd.Index(value["index"], name=value["name"]))
    return value if kind is None else np.asarray(value, dtype=kind)


# -- reading --------------------------------------------------------------------------------------


def read_model_file(
    folder: str | os.PathLike[str],
    prefix: str | None = None,
    trusted: bool = False,
    backup_url: str | None = None,
) -> ModelFile:
    """Read the file of a model, running nothing that is in it unless it is trusted.

    Raises
    ------
    ScreenError
        If there is none, or it is damaged, or holds more than data and is not trusted, or is of
        a newer format.
    """
    folder, name = Path(folder), f"{prefix or ''}model.pt"
    path = folder / name
    download(backup_url, folder, name)
    if not path.is_file():
        others = sorted(other.name for other in folder.glob("*model.pt"))
        mend = "give the folder that `save` wrote."
        if others:
            mend = f"the folder holds {listed(others)}: `prefix` is what comes before 'model.pt'."
        raise ScreenError(f"There is no model at {path}; {mend}")
    content = _content(path, trusted)
    record, parts = _parts(content)
    if record.get("format", 0) > FORMAT:
        raise ScreenError(
            f"{path} was written by scvi-sams {record['versions']['scvi-sams']} in format "
            f"{record['format']}; scvi-sams {version('scvi-sams')} reads formats up to {FORMAT}. "
            "Update it: pip install --upgrade scvi-sams."
        )
    if parts is None:
        raise ScreenError(f"{path} is not the file of a model: give a folder that `save` wrote.")
    state, var_names, attributes = parts
    _check_finite(state, str(path))
    attributes = _restored(attributes, (), record.get("kinds", {}))
    return ModelFile(path, state, np.asarray(var_names, dtype=object), attributes, record)


def _parts(content: Any) -> tuple[dict[str, Any], tuple[Any, Any, Any] | None]:
    """The record of the writer, and weights, genes and attributes, if there are such."""
    content = content if isinstance(content, dict) else {}
    state, attributes = content.get("model_state_dict"), content.get("attr_dict")
    if isinstance(state, dict):
        state.pop("pyro_param_store", None)  # of scvi-tools, for models in Pyro
    record = content.get(_RECORD)
    known = (
        isinstance(state, dict)
        and all(torch.is_tensor(part) for part in state.values())
        and isinstance(attributes, dict)
        and {"registry_", "init_params_"} <= attributes.keys()
        and "var_names" in content
    )
    parts = (state, content["var_names"], attributes) if known else None
    return record if isinstance(record, dict) else {}, parts


def _content(path: Path, trusted: bool) -> Any:
    """What a file holds, once the checksums of its parts are found right."""
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                part = archive.testzip()
        except Exception as error:  # whatever a byte does to the directory of an archive
            raise _damaged(path, error) from error
        if part is not None:
            raise _damaged(path, f"the checksum of its part {part!r} is wrong")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=not trusted)
        except pickle.UnpicklingError as error:
            if trusted:
                raise _damaged(path, error) from error
            raise ScreenError(
                f"{path} holds Python objects, not data alone, as files of scvi-sams 0.1.0 and of "
                "other programs do; reading them runs whatever code is in them. If you know who "
                "made the file, load it with trusted=True and save it again: what this version "
                "saves is data alone."
            ) from error
        except Exception as error:  # torch raises RuntimeError, KeyError, EOFError and others
            raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> ScreenError:
    cause = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    return ScreenError(
        f"{path} is damaged: {cause.rstrip('.')}. Copy it again from where it came from, or save "
        "the model again."
    )


def _check_finite(state: Mapping[str, torch.Tensor], culprit: str) -> None:
    """Refuse weights that nothing but NaN can come of."""
    for name, tensor in state.items():
        n_bad = int((~torch.isfinite(tensor)).sum())
        if n_bad and name not in _INFINITE:
            raise ScreenError(
                f"{culprit} has {n_bad:,} values that are not finite in {name!r}: what it says "
                "would mean nothing. Fit it again, with a smaller learning rate."
            )


# -- from a file to a model -----------------------------------------------------------------------


def load_model(
    cls: type[SAMSVAE],
    file: ModelFile,
    adata: AnnData | Literal[False] | None,
    accelerator: str,
    device: int | str,
    other_classes: Collection[str],
) -> SAMSVAE:
    """Make the model that a file describes, with the cells beside it (None), others or none."""
    registry = file.attributes.pop("registry_")
    found = registry.get("model_name", cls.__name__)
    if found not in {cls.__name__, *other_classes}:
        raise ScreenError(
            f"{file.path} is a model of a different class: use {found}.load, not "
            f"{cls.__name__}.load."
        )
    if adata is None:
        adata = _read_adata(file.path)
    if adata is False:
        adata = None
    # Parameters are drawn only to be replaced, which must not move the stream of random numbers.
    with torch.random.fork_rng(devices=[]), _of_this_version(file, cls):
        if adata is not None:
            _compare_genes(adata, file.var_names)
            cls.setup_anndata(adata, source_registry=registry, **registry["setup_args"])
        arguments = file.attributes.pop("init_params_")
        further = [part for group in arguments["kwargs"].values() for part in group.items()]
        model = cls(adata, registry=registry, **arguments["non_kwargs"], **dict(further))
        for name, value in file.attributes.items():
            setattr(model, name, value)
        model.module.load_state_dict(file.state)
    model.to_device(torch_device(accelerator, device))
    model.module.eval()
    if adata is not None:
        model._validate_anndata(adata)
    return model


@contextmanager
def _of_this_version(file: ModelFile, cls: type[SAMSVAE]) -> Iterator[None]:
    """Say who wrote a file that the class, as it is now, cannot be made from."""
    try:
        yield
    except (TypeError, KeyError, RuntimeError) as error:
        writer = file.record.get("versions", {}).get("scvi-sams")
        raise ScreenError(
            f"{file.path} was written by scvi-sams {writer or '0.1.0 or by another package'}, and "
            f"{cls.__name__} of scvi-sams {version('scvi-sams')} cannot be made from it: {error}"
        ) from error


def _read_adata(model_path: Path) -> AnnData | Literal[False]:
    path = model_path.with_name(f"{model_path.name.removesuffix('model.pt')}adata.h5ad")
    if not path.exists():
        warnings.warn(
            f"There is no {path.name} beside {model_path}: the model is loaded without cells. "
            "Give them as `adata`, or adata=False.",
            UserWarning,
            stacklevel=scvi.settings.warnings_stacklevel,
        )
        return False
    try:
        return anndata.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise whatever the damage leads to
        raise _damaged(path, error) from error


def _compare_genes(adata: AnnData, var_names: np.ndarray) -> None:
    if not np.array_equal(adata.var_names.astype(str), var_names):
        warnings.warn(
            "The var_names of `adata` are not those of the model.",
            UserWarning,
            stacklevel=scvi.settings.warnings_stacklevel,
        )
