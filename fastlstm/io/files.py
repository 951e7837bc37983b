"""Files: one that can be read, and one that is written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

__all__ = ["check_readable", "replacing"]


def check_readable(path: str | os.PathLike[str]) -> None:
    """Raise unless a file can be read: OSError as `open` would, ValueError for a pipe, which would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ValueError(f"{os.fspath(path)}: not a regular file")
    with open(path, "rb"):
        pass


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when the block ends, and is removed if it raises.

    What is no regular file, such as a pipe, is written to directly.

    Parameters
    ----------
    path : str or path-like

    Yields
    ------
    binary file
        To be written to; in the folder of `path`.

    Raises
    ------
    OSError
        As `open` would.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        with open(path, "wb") as file:
            yield file
        return
    temporary = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.tmp")
    try:
        file = open(temporary, "xb")  # noqa: SIM115 - closed below, before it is renamed
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    try:
        with file:
            yield file
        if os.path.exists(target):
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
