"""Weight panels: the order in which the tile reads weights, made once for each set of weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastlstm.kernels.tile import GATES, blocking

__all__ = ["Cut", "aligned", "cut_units", "pack_bias", "pack_columns", "pack_gates"]

ALIGNMENT = 64


@dataclass(frozen=True)
class Cut:
    """Hidden units in blocks: `blocks` of `units` each, then a narrow one of `tail_units` (0: none)."""

    blocks: int
    units: int
    tail_units: int

    @property
    def padded(self) -> int:
        """Units with the padding."""
        return self.blocks * self.units + self.tail_units


def cut_units(count: int, dtype: np.dtype) -> Cut:
    """Cut `count` hidden units into blocks with as little padding as the tiles allow."""
    units, tail = blocking(dtype).units, blocking(dtype).tail
    blocks, rest = divmod(count, units)
    if rest > tail:
        return Cut(blocks + 1, units, 0)
    return Cut(blocks, units, tail if rest else 0)


def aligned(count: int, dtype: np.dtype) -> NDArray[np.generic]:
    """Return an uninitialised array that starts on a cache line."""
    dtype = np.dtype(dtype)
    raw = np.empty(count * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count * dtype.itemsize].view(dtype)


def _pack(weight: NDArray[np.floating], cut: Cut, out: NDArray[np.generic]) -> None:
    """Write weight (4, H, K) as panels (block, K, gate, unit) to the flat `out`; padding is zero."""
    K, main = weight.shape[2], cut.blocks * cut.units
    padded = np.zeros((GATES, cut.padded, K), out.dtype) if cut.padded != weight.shape[1] else weight
    if padded is not weight:
        padded[:, : weight.shape[1]] = weight
    blocks = out[: GATES * main * K].reshape(cut.blocks, K, GATES, cut.units)
    blocks[:] = padded[:, :main].reshape(GATES, cut.blocks, cut.units, K).transpose(1, 3, 0, 2)
    out[GATES * main * K :].reshape(K, GATES, cut.tail_units)[:] = padded[:, main:].transpose(2, 0, 1)


def pack_gates(weight: NDArray[np.floating], cut: Cut) -> NDArray[np.generic]:
    """Return panels of a weight (4H, K), gates stacked in the order i, f, g, o."""
    out = aligned(GATES * cut.padded * weight.shape[1], weight.dtype)
    _pack(weight.reshape(GATES, -1, weight.shape[1]), cut, out)
    return out


def pack_bias(bias: NDArray[np.floating], cut: Cut) -> NDArray[np.generic]:
    """Return a bias (4H,) in the order in which a tile holds z."""
    return pack_gates(bias[:, None], cut)


def cut_columns(count: int, dtype: np.dtype) -> Cut:
    """Cut the outputs of a plain product: a block is 4 * units of them."""
    return cut_units(-(-count // GATES), dtype)


def pack_columns(weight: NDArray[np.floating], cut: Cut) -> NDArray[np.generic]:
    """Return panels of a weight (outputs, K) for a plain product: blocks of 4 * units outputs in their own order."""
    outputs, K = weight.shape
    padded = np.zeros((GATES * cut.padded, K), weight.dtype)
    padded[:outputs] = weight
    out = aligned(padded.size, weight.dtype)
    main = GATES * cut.blocks * cut.units
    out[: main * K].reshape(cut.blocks, K, GATES * cut.units)[:] = (
        padded[:main].reshape(cut.blocks, GATES * cut.units, K).transpose(0, 2, 1)
    )
    out[main * K :].reshape(K, GATES * cut.tail_units)[:] = padded[main:].T
    return out
