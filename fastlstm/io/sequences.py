"""Data for the command line: sequences in .npy, .csv and .wav files, read and written piece by piece."""

from __future__ import annotations

import array
import csv
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastlstm.io.files import check_readable

__all__ = ["OUTPUT_SUFFIXES", "StoredSequence", "read_sequence", "write_head", "write_piece"]

Array = NDArray[Any]

OUTPUT_SUFFIXES = (".npy", ".csv")

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_TO_THE_END = 0xFFFFFFFF  # what a program that did not know the size has written for it


class StoredSequence(NamedTuple):
    """A sequence that is decoded piece by piece."""

    stored: Array
    """As it lies in the file, steps first; it may be a map of the file."""
    decode: Callable[[Array], Array]
    """Makes numbers (T, I) or (T, N, I) of a part of it."""
    shape: tuple[int, ...]
    """Of all of it, decoded."""


def read_sequence(path: str | os.PathLike[str]) -> StoredSequence:
    """Open a sequence.

    Parameters
    ----------
    path : str or path-like
        A .npy file; a .csv file in UTF-8 with a step a line, numbers separated by commas, and maybe a line of headings
        first, none of which is a number; or a .wav file (PCM of 8, 16, 24 or 32 bits, or float), whose channels are the
        features and whose PCM samples become numbers from -1 to 1.

    Returns
    -------
    StoredSequence

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it does not hold what its suffix says: with the path, and in a .csv file the line.
    """
    path = Path(path)
    reader = {".npy": _read_npy, ".csv": _read_csv, ".wav": _read_wav}.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: the input must be a .npy, .csv or .wav file")
    check_readable(path)
    try:
        return reader(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_npy(path: Path) -> StoredSequence:
    try:
        stored = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # whatever a damaged header makes NumPy raise
        raise ValueError(f"not a .npy file of numbers, or a damaged one ({' '.join(str(error).split())})") from None
    if stored.dtype.kind not in "biuf":
        raise ValueError(f"holds {stored.dtype}, not real numbers")
    return StoredSequence(stored, np.asarray, stored.shape)


def _read_csv(path: Path) -> StoredSequence:
    numbers = array.array("d")
    columns = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            for fields in filter(None, lines):
                if not columns:
                    columns = len(fields)
                    if not any(map(_is_number, fields)):
                        continue  # headings
                if len(fields) != columns:
                    raise ValueError(f"line {lines.line_num}: {columns} numbers expected as before, got {len(fields)}")
                try:
                    numbers.extend(map(float, fields))
                except ValueError:
                    text = next(field for field in fields if not _is_number(field))
                    raise ValueError(f"line {lines.line_num}: {text[:40]!r} is not a number") from None
        except UnicodeDecodeError:
            raise ValueError("not text in UTF-8") from None
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}") from None
    if not columns:
        raise ValueError("no data")
    stored = np.array(numbers).reshape(-1, columns)
    return StoredSequence(stored, np.asarray, stored.shape)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_wav(path: Path) -> StoredSequence:
    end = path.stat().st_size
    form = b""
    with path.open("rb") as file:
        riff, _, wave = struct.unpack("<4sI4s", file.read(12).ljust(12))
        if (riff, wave) != (b"RIFF", b"WAVE"):
            raise ValueError("not a .wav file")
        name = b""
        while name != b"data":
            header = file.read(8)
            if len(header) < 8:
                raise ValueError("truncated, or without sound")
            name, size = struct.unpack("<4sI", header)
            if name == b"fmt ":
                form = file.read(min(size, 26))
                size -= len(form)
            if name != b"data":
                file.seek(size + size % 2, os.SEEK_CUR)
        start = file.tell()
    if len(form) < 16:
        raise ValueError("the sound has no format")
    kind, channels, _, _, frame, bits = struct.unpack("<HHIIHH", form[:16])
    if kind == _EXTENSIBLE and len(form) == 26:
        kind = struct.unpack("<H", form[24:])[0]
    sample = _SAMPLES.get((kind, bits))
    if sample is None or not channels or frame * 8 != channels * bits:
        raise ValueError(
            f"the sound must be PCM of 8, 16, 24 or 32 bits, or float; "
            f"got format {kind}, {bits} bits, {channels} channels of {frame} bytes together"
        )
    if size == _TO_THE_END:
        size = end - start
    if size > end - start:
        raise ValueError(f"truncated: {size} bytes of sound expected, {end - start} found")
    shape = (size // frame, channels)
    whole = (*shape, *sample.dtype.shape)
    stored: Array = np.empty(whole, sample.dtype.base)
    if stored.size:
        stored = np.memmap(path, sample.dtype.base, "r", start, whole)
    return StoredSequence(stored, sample.decode, shape)


class _Sample(NamedTuple):
    """How a sample of a .wav file is stored, and what number it is."""

    dtype: np.dtype[Any]
    decode: Callable[[Array], Array]


def _from_24_bits(stored: Array) -> Array:
    padded = np.zeros((*stored.shape[:-1], 4), np.uint8)
    padded[..., 1:] = stored
    return padded.view("<i4")[..., 0] / 2.0**31


_SAMPLES = {
    (_PCM, 8): _Sample(np.dtype("u1"), lambda stored: stored / 2.0**7 - 1.0),
    (_PCM, 16): _Sample(np.dtype("<i2"), lambda stored: stored / 2.0**15),
    (_PCM, 24): _Sample(np.dtype("3u1"), _from_24_bits),
    (_PCM, 32): _Sample(np.dtype("<i4"), lambda stored: stored / 2.0**31),
    (_FLOAT, 32): _Sample(np.dtype("<f4"), np.asarray),
    (_FLOAT, 64): _Sample(np.dtype("<f8"), np.asarray),
}


def write_head(file: BinaryIO, suffix: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Write what comes before the numbers.

    Parameters
    ----------
    file : binary file
    suffix : str
        One of `OUTPUT_SUFFIXES`.
    shape : tuple of int
        Of all pieces together; of two axes for .csv.
    dtype : dtype
    """
    if suffix == ".npy":
        descr = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def write_piece(file: BinaryIO, suffix: str, piece: Array) -> None:
    """Write some steps; in .csv with as few digits as tell each number from its neighbours.

    Parameters
    ----------
    file : binary file
    suffix : str
        One of `OUTPUT_SUFFIXES`.
    piece : ndarray, C-contiguous
    """
    if suffix == ".npy":
        file.write(piece.tobytes())
    else:
        file.write("".join(",".join(map(str, row)) + "\n" for row in piece).encode())
