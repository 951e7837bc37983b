"""Checks of arguments: each raises in the user's terms, before any work."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NoCompilerError",
    "as_array",
    "as_bools",
    "as_generator",
    "as_indices",
    "as_interval",
    "as_number",
    "as_out",
    "as_size",
    "check_flag",
    "check_shape",
    "float_dtype",
]

Array = NDArray[Any]


class NoCompilerError(RuntimeError):
    """Numba's compiler is turned off."""


def as_size(name: str, value: object, least: int = 1, most: int = 1 << 24) -> int:
    """Return an integer argument from `least` to `most`."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be an integer, got {type(value).__name__}")
    try:
        size = operator.index(cast(Any, value))
    except Exception:  # whatever the object's own conversion raises
        raise TypeError(f"`{name}` must be an integer, got {type(value).__name__}") from None
    if not least <= size <= most:
        raise ValueError(f"`{name}` must be {f'at least {least}' if size < least else f'at most {most}'}, got {size}")
    return size


def as_number(name: str, value: object, interval: str = "[0, inf)") -> float:
    """Return a real number that lies in an interval, written as in mathematics."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    low, high = map(float, interval[1:-1].split(","))
    fits = low < number < high or (number == low and interval[0] == "[") or (number == high and interval[-1] == "]")
    if not fits:
        raise ValueError(f"`{name}` must be in {interval}, got {number}")
    return number


def as_interval(name: str, value: object) -> int | None:
    """Return a number of steps, or None."""
    return None if value is None else as_size(name, value, most=1 << 62)


def as_generator(rng: object) -> np.random.Generator:
    """Return a generator of random numbers from itself, a seed or None."""
    if isinstance(rng, np.random.Generator):
        return rng
    try:
        return np.random.default_rng(None if rng is None else as_size("rng", rng, least=0, most=1 << 256))
    except TypeError:
        kind = type(rng).__name__
        raise TypeError(f"`rng` must be an integer or a numpy.random.Generator, got {kind}") from None


def check_flag(name: str, value: object) -> bool:
    """Return a boolean argument."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {type(value).__name__}")
    return bool(value)


def float_dtype(dtype: object) -> np.dtype[Any]:
    """Return float32 or float64 in the machine's byte order."""
    try:
        found = np.dtype(cast(Any, "None" if dtype is None else dtype))  # to NumPy None is float64
    except Exception:  # NumPy parses a string, with a SyntaxError for "01"
        raise TypeError(f"`dtype` must be float32 or float64, got {dtype!r}") from None
    if found not in (np.float32, np.float64):
        raise ValueError(f"`dtype` must be float32 or float64, got {found}")
    canonical: np.dtype[Any] = np.dtype(found.type)  # in the machine's byte order
    return canonical


def to_numpy(name: str, value: object) -> Array:
    """Return what NumPy or DLPack makes of the value."""
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if getattr(value, "requires_grad", False):
        raise TypeError(f"`{name}` is a tensor that requires grad; pass `{name}.detach()`")
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(cast(Any, value))
        except (TypeError, BufferError, RuntimeError, ValueError):
            pass  # an object NumPy may still take by another protocol
    try:
        return np.asarray(value)
    except Exception as error:  # whatever the object's own conversion raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"`{name}` cannot be made an array, got {type(value).__name__}: {reason}") from None


C_CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400  # NumPy's flags
AS_IT_IS = C_CONTIGUOUS | ALIGNED


def is_ready(value: object, dtype: np.dtype[Any]) -> TypeGuard[Array]:
    """Return whether a value is an array that `as_array` returns as it is, in a tenth of a microsecond."""
    return type(value) is np.ndarray and value.dtype == dtype and value.flags.num & AS_IT_IS == AS_IT_IS


def as_array(name: str, value: object, dtype: np.dtype[Any]) -> Array:
    """Return a C-contiguous, aligned array of the dtype; a copy only where the value is not one already."""
    if is_ready(value, dtype):
        return value  # where the rest takes 1.4 us
    array = to_numpy(name, value)
    if array.dtype == np.object_:
        raise TypeError(f"`{name}` must be an array of numbers, got {type(value).__name__}")
    if array.dtype != dtype and not np.can_cast(array.dtype, dtype, "same_kind"):
        raise TypeError(f"`{name}` must be of a dtype that casts to {dtype} ('same_kind'), got {array.dtype}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinity, as everywhere in NumPy
        return np.require(array, dtype, ("C", "A"))


def check_shape(name: str, array: Array, expected: Sequence[int | str], sizes: str = "", remedy: str = "") -> None:
    """Raise unless the shape is the expected one; a string in it stands for any size."""
    fits = len(array.shape) == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, array.shape, strict=True)
    )
    if not fits:
        shape = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise ValueError(f"`{name}` must have shape ({shape}){sizes}, got {array.shape}{remedy}")


def as_out(out: object, shape: tuple[int, ...], dtype: np.dtype[Any], symbols: str) -> Array:
    """Return the user's output array once it is known to be fit to be written."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"`out` must be a NumPy array, got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"`out` must have dtype {dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"`out` must have shape {symbols} = {shape}, got {out.shape}")
    if not out.flags.carray:
        lacking = "writeable" if not out.flags.writeable else "C-contiguous and aligned"
        raise ValueError(f"`out` must be {lacking}")
    return np.asarray(out)


def as_indices(name: str, value: object) -> Array:
    """Return an array of int64 from integers."""
    array = to_numpy(name, value)
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must be integers, got {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"`{name}` has a value beyond int64: {array.max()}")
    return array.astype(np.int64)


def as_bools(name: str, value: object) -> Array:
    """Return an array of booleans."""
    array = to_numpy(name, value)
    if array.dtype != np.bool_:
        raise TypeError(f"`{name}` must be booleans, got {array.dtype}; use `{name}.astype(bool)` if that is meant")
    return array
