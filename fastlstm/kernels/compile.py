"""Compilation on first use, and an on-disk cache whose key covers all that the machine code depends on.

Numba keys its cache on a function's own file; a kernel here is put together from several files, so the folder's name
holds a digest of every kernel source, of the versions and of the flags.  Nothing is compiled by an import.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

__all__ = ["cache_folder", "entry", "launcher"]

_lock = threading.RLock()


@functools.cache
def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    parts = [path.name.encode() + b"\0" + path.read_bytes() for path in sources]
    parts += [
        version.encode()
        for version in (platform.python_version(), numba.__version__, llvmlite.__version__, np.__version__)
    ]
    parts.append(repr(sorted((name, str(getattr(numba.config, name))) for name in _FLAGS)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


_FLAGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "CPU_NAME", "CPU_FEATURES")


def cache_folder() -> Path | None:
    """Return the folder of the compile cache; None where it is turned off or no folder can be written.

    `FASTLSTM_CACHE` names it (0: off); by default it lies in the user's cache folder.
    """
    wanted = os.environ.get("FASTLSTM_CACHE", "")
    if wanted == "0":
        return None
    for base in [Path(wanted)] if wanted else _default_folders():
        folder = base / _digest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


def _default_folders() -> list[Path]:
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        home = os.path.expanduser("~/Library/Caches")
    else:
        home = os.environ.get("XDG_CACHE_HOME", "") or os.path.expanduser("~/.cache")
    return [Path(home) / "fastlstm"] if os.path.isabs(home) else []


class _Locator:
    """Where numba's cache machinery keeps one function."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._py_file = __file__

    def ensure_cache_path(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(self.folder)

    def get_source_stamp(self) -> str:
        return self.name

    def get_disambiguator(self) -> str:
        return self.name


class _Cache(FunctionCache):
    """Numba's function cache in our folder; whatever goes wrong with a file means compiling again."""

    def __init__(self, py_func: Callable[..., Any], folder: Path, name: str):
        locator = _Locator(folder, name)

        class Implementation(FunctionCache._impl_class):  # type: ignore[misc, name-defined]
            def __init__(self, function: Callable[..., Any]):
                self._lineno = function.__code__.co_firstlineno
                self._locator = locator
                self._filename_base = name

        self._impl_class = Implementation
        super().__init__(py_func)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a damaged or foreign file: any error that unpickling and linking can raise
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:  # a full or read-only disk
            return


def _cache(py_func: Callable[..., Any], name: str) -> _Cache | None:
    folder = cache_folder()
    return None if folder is None else _Cache(py_func, folder, name)


@functools.cache
def _entry(make: Callable[[np.dtype], tuple[Any, Any]], dtype: np.dtype) -> CFunc:
    py_func, signature = make(dtype)
    compiled = CFunc(py_func, (signature.args, signature.return_type), {}, {"error_model": "numpy", "nopython": True})
    cache = _cache(py_func, f"{make.__name__}-{dtype}")
    if cache is not None:
        compiled._cache = cache
    compiled.compile()
    return compiled


def entry(make: Callable[[np.dtype], tuple[Any, Any]], dtype: np.dtype) -> int:
    """Return the address of the compiled kernel that `make(dtype)` describes."""
    with _lock:
        return int(_entry(make, dtype).address)


@functools.cache
def _launcher(py_func: Callable[..., Any], signature: Any, parallel: bool) -> Any:
    dispatcher = numba.njit(py_func, nogil=True, parallel=parallel, error_model="numpy")
    name = f"{py_func.__name__}-{'parallel' if parallel else 'serial'}-{signature}"
    cache = _cache(py_func, name.translate({ord(c): "_" for c in " (),:[]"}))
    if cache is not None:
        dispatcher._cache = cache
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


def launcher(py_func: Callable[..., Any], signature: Any, parallel: bool = False) -> Any:
    """Return a compiled function for Python, with the GIL released while it runs."""
    with _lock:
        return _launcher(py_func, signature, parallel)
