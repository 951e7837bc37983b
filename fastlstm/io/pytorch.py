"""LSTMs from and to PyTorch, which is needed only where there is a module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastlstm.checks import to_numpy
from fastlstm.lstm import LSTM

if TYPE_CHECKING:
    import torch

__all__ = ["find_prefixes", "from_torch", "is_lstm_name", "to_torch"]

Array = NDArray[Any]

_FIRST = "weight_ih_l0"
_NAME = re.compile(r"(weight|bias)_(ih|hh|hr)_l\d+(_reverse)?")


def from_torch(
    module_or_state_dict: torch.nn.Module | Mapping[str, object],
    *,
    batch_first: bool = False,
    dropout: float = 0.0,
    prefix: str = "",
) -> LSTM:
    """Make an LSTM with copies of the weights of a PyTorch module or state dict.

    Parameters
    ----------
    module_or_state_dict : torch.nn.LSTM, module that contains one, or mapping of str to array or tensor
        Arrays need no PyTorch. Sizes, layers, directions, bias and projection are read off names and shapes. Tensors
        may be on any device. Weights of 16 bits become float32, exactly.
    batch_first : bool, default False
        For a state dict; a module brings its own.
    dropout : float, default 0.0
        For a state dict; a module brings its own.
    prefix : str, default ""
        Which LSTM, where there are several: what its names begin with, such as `"encoder.lstm."`.

    Returns
    -------
    LSTM
        float64 if a weight is, else float32.

    Raises
    ------
    TypeError
        If the argument is neither a module nor a mapping, or a weight is not of floating-point numbers.
    ValueError
        If there is no LSTM, or more than one that fits `prefix`; if a name is missing or does not belong, or a shape is
        wrong; if `batch_first` or `dropout` contradicts the module.

    Examples
    --------
    >>> import numpy as np
    >>> import fastlstm
    >>> weights = {"encoder.weight_ih_l0": np.zeros((20, 3)), "encoder.weight_hh_l0": np.zeros((20, 5))}
    >>> fastlstm.from_torch(weights, batch_first=True)
    LSTM(3, 5, bias=False, batch_first=True, dtype=float64)
    """
    if not isinstance(prefix, str):
        raise TypeError(f"`prefix` must be a string, got {type(prefix).__name__}")
    if isinstance(module_or_state_dict, Mapping):
        return _from_state_dict(module_or_state_dict, batch_first, dropout, prefix)
    if not hasattr(module_or_state_dict, "named_modules"):
        kind = type(module_or_state_dict).__name__
        raise TypeError(f"`module_or_state_dict` must be a PyTorch module or a mapping of names to arrays, got {kind}")
    return _from_module(module_or_state_dict, batch_first, dropout, prefix)


def _from_module(module: Any, batch_first: bool, dropout: float, prefix: str) -> LSTM:
    import torch

    modules = {f"{name}." if name else "": part for name, part in module.named_modules()}
    lstms = {name: part for name, part in modules.items() if isinstance(part, torch.nn.LSTM)}
    if not lstms:
        others = sorted({type(part).__name__ for part in modules.values() if isinstance(part, torch.nn.RNNBase)})
        kind = f"{type(module).__name__}" + (f" with {' and '.join(others)}" if others else "")
        raise ValueError(f"`module_or_state_dict` must be or contain a torch.nn.LSTM, got {kind}")
    lstm = lstms[_choose(lstms, prefix)]
    for name, given in (("batch_first", batch_first), ("dropout", dropout)):
        if given and given != getattr(lstm, name):
            raise ValueError(f"`{name}` is the module's own, {getattr(lstm, name)}; it cannot be {given}")
    settings = {name: getattr(lstm, name) for name in LSTM._SETTINGS}
    # Not from the state dict: an attribute is also there for a parametrised weight, such as a normalised one.
    return _make({name: _as_floats(name, getattr(lstm, name)) for name in lstm._flat_weights_names}, settings)


def _from_state_dict(mapping: Mapping[str, object], batch_first: bool, dropout: float, prefix: str) -> LSTM:
    found = find_prefixes(mapping)
    if not found:
        raise ValueError(f"`module_or_state_dict` holds no LSTM: no name ends in {_FIRST!r}")
    start = _choose(found, prefix)
    names = [name for name in mapping if isinstance(name, str) and name.startswith(start)]
    weights = {name[len(start) :]: name for name in names if is_lstm_name(name[len(start) :])}
    arrays = {name: _as_floats(full_name, mapping[full_name]) for name, full_name in weights.items()}
    return _make(arrays, _infer(arrays) | {"batch_first": batch_first, "dropout": dropout})


def find_prefixes(names: Iterable[object]) -> list[str]:
    """Return what the names of each recurrent layer begin with."""
    return [
        name.removesuffix(_FIRST)
        for name in names
        if isinstance(name, str) and (name == _FIRST or name.endswith(f".{_FIRST}"))
    ]


def is_lstm_name(name: str) -> bool:
    """Return whether a weight of an LSTM may have this name."""
    return _NAME.fullmatch(name) is not None


def _choose(found: Iterable[str], prefix: str) -> str:
    found = list(found)
    exact = [start for start in found if start in (prefix, f"{prefix}.")]
    fitting = exact[:1] or [start for start in found if start.startswith(prefix)]
    if len(fitting) == 1:
        return fitting[0]
    raise ValueError(f"`prefix` must single out one LSTM, one of {found}; got {prefix!r}")


def _infer(weights: Mapping[str, Array]) -> dict[str, Any]:
    """Return the settings of the LSTM that has these weights."""
    for name in (_FIRST, "weight_hh_l0"):
        if name not in weights:
            raise ValueError(f"`{name}` is missing")
        if weights[name].ndim != 2:
            raise ValueError(f"`{name}` must have two dimensions, got shape {weights[name].shape}")
    rows, proj_size = weights["weight_hh_l0"].shape
    projected = "weight_hr_l0" in weights
    if not projected and rows != 4 * proj_size:
        kind = {1: ", as an RNN has", 3: ", as a GRU has"}.get(rows / max(proj_size, 1), "")
        raise ValueError(f"`weight_hh_l0` must have shape (4H, H), got {(rows, proj_size)}{kind}")
    num_layers = 1
    while f"weight_ih_l{num_layers}" in weights:
        num_layers += 1
    return {
        "input_size": weights[_FIRST].shape[1],
        "hidden_size": rows // 4,
        "num_layers": num_layers,
        "bias": "bias_ih_l0" in weights,
        "bidirectional": f"{_FIRST}_reverse" in weights,
        "proj_size": proj_size if projected else 0,
    }


def _make(weights: Mapping[str, Array], settings: Mapping[str, Any]) -> LSTM:
    dtype = np.float64 if any(array.itemsize > 4 for array in weights.values()) else np.float32
    return LSTM._with_weights(weights, dtype, **settings)


def _as_floats(name: str, value: Any) -> Array:
    """Return an array of floating-point numbers from an array or a tensor on any device."""
    if hasattr(value, "detach"):
        try:
            value = value.detach().cpu()
            if value.is_floating_point() and value.element_size() < 4:  # bfloat16, which NumPy does not have
                value = value.float()
        except Exception as error:  # a tensor without data, or of a device that is gone
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"`{name}` cannot be made an array: {reason}") from None
    array = to_numpy(name, value)
    if array.dtype.kind != "f":
        raise TypeError(f"`{name}` must be of floating-point numbers, got {array.dtype}")
    return array


def to_torch(lstm: LSTM) -> torch.nn.LSTM:
    """Return a `torch.nn.LSTM` with copies of the weights, of the same dtype.

    Parameters
    ----------
    lstm : LSTM

    Returns
    -------
    torch.nn.LSTM

    Raises
    ------
    ImportError
        If PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("`to_torch` needs PyTorch: pip install torch") from error

    module = torch.nn.LSTM(**lstm._config, device="meta", dtype=getattr(torch, str(lstm.dtype)))
    tensors = {name: torch.from_numpy(array) for name, array in lstm.state_dict().items()}
    module.load_state_dict(tensors, assign=True)
    return module
