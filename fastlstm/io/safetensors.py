"""The native format: a .safetensors file with the layers' settings in its metadata.

Two entries of the metadata make a file one of ours: `fastlstm`, the version of this format, and `layers`, JSON. That is
an object for an LSTM alone, whose weights have PyTorch's plain names, and a list of objects for a Sequential, whose
weights are named as in `torch.nn.Sequential`, `0.weight_ih_l0`. An object holds the `type` and the layer's arguments.
The dtype is that of the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from fastlstm.io.files import check_readable, replacing
from fastlstm.io.pytorch import find_prefixes, from_torch, is_lstm_name
from fastlstm.lstm import LSTM
from fastlstm.model import Linear, Sequential
from fastlstm.parameters import compare_names

__all__ = ["load", "save"]

Array = NDArray[Any]

_FORMAT = "1"
_DTYPES = ("F64", "F32", "F16")
_PYTORCH_REMEDY = "; read a file of PyTorch with `torch.load` and pass its state dict to `fastlstm.from_torch`"
_REMEDY = "; read it with `safetensors.numpy.load_file` and pass that to `fastlstm.from_torch` with a `prefix`"
_LAYERS: dict[str, type[LSTM] | type[Linear]] = {"LSTM": LSTM, "Linear": Linear}


def load(path: str | os.PathLike[str]) -> LSTM | Sequential:
    """Read a model from a .safetensors file.

    Parameters
    ----------
    path : str or path-like
        A file that `save` wrote, or any .safetensors file with the weights of one LSTM under PyTorch's names, with or
        without a prefix that they all have, and nothing else.

    Returns
    -------
    LSTM or Sequential
        Of float64 if a weight is, else of float32; float16 becomes float32, exactly.

    Raises
    ------
    OSError
        If there is no such file (FileNotFoundError), it is a folder (IsADirectoryError), or it cannot be read.
    ValueError
        If the file is damaged, or holds something else: with the path and the trouble.

    Examples
    --------
    >>> import fastlstm, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> fastlstm.save(fastlstm.LSTM(3, 5), path)
    >>> fastlstm.load(path)
    LSTM(3, 5)
    """
    path = os.fsdecode(path)
    check_readable(path)
    try:
        metadata, tensors = _read(path)
        if "fastlstm" in metadata:
            return _from_metadata(metadata, tensors)
        return _from_names(tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def save(model: LSTM | Sequential, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a model to a .safetensors file: whole, or not at all.

    Parameters
    ----------
    model : LSTM or Sequential
    path : str or path-like
        A file there is replaced when the new one is complete.
    metadata : mapping of str to str, optional
        What else the file shall hold, for `safetensors.safe_open(path, "numpy").metadata()`.

    Raises
    ------
    TypeError
        If `model` or `metadata` is something else.
    ValueError
        If `metadata` has the name `fastlstm` or `layers`, which the format uses.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import fastlstm, os, tempfile
    >>> model = fastlstm.Sequential(fastlstm.LSTM(3, 5), fastlstm.Linear(5, 1))
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> fastlstm.save(model, path, metadata={"trained on": "sunspots"})
    >>> fastlstm.load(path)
    Sequential(LSTM(3, 5), Linear(5, 1))
    """
    import safetensors.numpy

    if isinstance(model, LSTM):
        layers: object = _describe(model)
    elif isinstance(model, Sequential):
        layers = [_describe(layer) for layer in model]
    else:
        raise TypeError(f"`model` must be an LSTM or a Sequential, got {type(model).__name__}")
    extra = {} if metadata is None else metadata
    if not isinstance(extra, Mapping) or not all(isinstance(text, str) for item in extra.items() for text in item):
        raise TypeError("`metadata` must map strings to strings")
    own = {"fastlstm": _FORMAT, "layers": json.dumps(layers)}
    if own.keys() & extra.keys():
        raise ValueError(f"`metadata` must not have the names {list(own)}, which the format uses")
    contents = safetensors.numpy.save(model.state_dict(), metadata=own | dict(extra))
    with replacing(path) as file:
        file.write(contents)


def _describe(layer: LSTM | Linear) -> dict[str, Any]:
    return {"type": type(layer).__name__} | layer._config


def _read(path: str) -> tuple[dict[str, str], dict[str, Array]]:
    """Return the metadata and the tensors of a file."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise ValueError(f"`{name}` must be of dtype {', '.join(_DTYPES)}, got {dtype}")
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        with open(path, "rb") as other:
            remedy = _PYTORCH_REMEDY if other.read(4) == b"PK\x03\x04" else ""
        raise ValueError(f"not a .safetensors file, or a damaged one ({error}){remedy}") from None


def _from_metadata(metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> LSTM | Sequential:
    if metadata["fastlstm"] != _FORMAT:
        raise ValueError(f"written in format {metadata['fastlstm']!r}, but this version reads format {_FORMAT!r} alone")
    try:
        layers = json.loads(metadata.get("layers", ""))
    except (ValueError, RecursionError):
        raise ValueError("the metadata `layers` is not JSON") from None
    if isinstance(layers, dict):
        layer = _make_layer(layers, tensors)
        if isinstance(layer, LSTM):
            return layer
        raise ValueError("the metadata `layers` must be a list where there is a Linear")
    if not isinstance(layers, list):
        raise ValueError(f"the metadata `layers` must be an object or a list of them, got {metadata['layers']}")
    parts: list[dict[str, Array]] = [{} for _ in layers]
    for name, array in tensors.items():
        number, _, weight = name.partition(".")
        if number not in map(str, range(len(layers))):
            raise ValueError(f"the tensor {name!r} belongs to no layer")
        parts[int(number)][weight] = array
    return Sequential(*map(_make_layer, layers, parts))


def _make_layer(settings: object, weights: Mapping[str, Array]) -> LSTM | Linear:
    if not isinstance(settings, dict):
        raise ValueError(f"the metadata `layers` must hold objects, got {settings!r}")
    kind = _LAYERS.get(str(settings.get("type")))
    if kind is None:
        raise ValueError(f"the metadata `layers` must be of type {' or '.join(_LAYERS)}, got {settings.get('type')!r}")
    arguments = {name: value for name, value in settings.items() if name != "type"}
    trouble = compare_names(arguments, kind._SETTINGS)
    if trouble:
        raise ValueError(f"the metadata `layers` has not the arguments of {kind.__name__}: {trouble}")
    layers = arguments.get("num_layers", 1)
    if isinstance(layers, int) and layers > len(weights):
        raise ValueError(f"{len(weights)} tensors cannot be those of {layers} layers")
    dtypes = {array.dtype.itemsize for array in weights.values()}
    return kind._with_weights(weights, "float64" if 8 in dtypes else "float32", **arguments)


def _from_names(tensors: Mapping[str, Array]) -> LSTM:
    found = find_prefixes(tensors)
    if len(found) != 1:
        held = f"more than one LSTM, {found}" if found else "no LSTM: no name ends in 'weight_ih_l0'"
        raise ValueError(f"holds {held}" + _REMEDY * bool(found))
    others = [name for name in tensors if not (name.startswith(found[0]) and is_lstm_name(name[len(found[0]) :]))]
    if others:
        raise ValueError(f"holds more than an LSTM, {others[0]!r} for one{_REMEDY}")
    return from_torch(tensors)
