"""Compilation on first use, and an on-disk cache whose key covers all that the machine code depends on.

Numba keys its cache on a function's own file; a kernel here is put together from several files, so the folder's name
holds a digest of every kernel source, of the versions and of the flags.  Nothing is compiled by an import.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import platform
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

from fastlstm.checks import NoCompilerError

__all__ = ["cache_folder", "compiling", "entry", "parallel_region", "unique"]

Description = Callable[..., tuple[Callable[..., Any], Any]]

compiling = threading.RLock()
"""Held while something is compiled, or loaded for a first call; a fork waits for it: a child would keep its locks."""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=compiling.acquire, after_in_parent=compiling.release, after_in_child=compiling.release)


_FLAGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "CPU_NAME", "CPU_FEATURES")


def _find_digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    parts = [path.name.encode() + b"\0" + path.read_bytes() for path in sources]
    parts += [
        version.encode()
        for version in (platform.python_version(), numba.__version__, llvmlite.__version__, np.__version__)
    ]
    parts.append(repr(sorted((name, str(getattr(numba.config, name))) for name in _FLAGS)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


_DIGEST = _find_digest()  # of the sources that this process has imported, whatever becomes of the files later


def cache_folder() -> Path | None:
    """Return the folder of the compile cache; None where it is turned off or there is none and none can be made.

    `FASTLSTM_CACHE` names it (0: off); by default it lies in the user's cache folder. One that another user has filled,
    as in an image, is read even where nothing can be written.
    """
    wanted = os.environ.get("FASTLSTM_CACHE", "")
    if wanted == "0":
        return None
    for base in [Path(wanted)] if wanted else _default_folders():
        folder = base / _DIGEST
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            with suppress(OSError):
                if any(folder.iterdir()):
                    return folder
    return None


def _default_folders() -> list[Path]:
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        home = os.path.expanduser("~/Library/Caches")
    else:
        home = os.environ.get("XDG_CACHE_HOME", "") or os.path.expanduser("~/.cache")
    return [Path(home) / "fastlstm"] if os.path.isabs(home) else []


def _file(name: str) -> Path | None:
    """Return where the machine code of a kernel is cached."""
    folder = cache_folder()
    if folder is None:
        return None
    target = hashlib.sha256(repr(cpu_target.target_context.codegen().magic_tuple()).encode()).hexdigest()[:20]
    return folder / f"{name}-{target}.kernel"


def _seal(content: bytes) -> bytes:
    """Return a content behind its digest."""
    return hashlib.sha256(content).digest() + content


def _unseal(sealed: bytes) -> bytes:
    """Return the content; raise ValueError if it is damaged: LLVM ends the process where it reads a wrong number."""
    content = sealed[hashlib.sha256().digest_size :]
    if _seal(content) != sealed:
        raise ValueError("damaged")
    return content


def _load(path: Path) -> tuple[str, Any] | None:
    """Return a kernel's symbol and library from the cache."""
    try:
        symbol, state = pickle.loads(_unseal(path.read_bytes()))
        context = cpu_target.target_context
        rtsys.initialize(context)  # the symbols of numba's run-time, which a library refers to
        return symbol, context.codegen().unserialize_library(state)
    except Exception:  # absent, damaged or foreign: whatever unpickling and linking raise means compiling again
        return None


def _save(path: Path, symbol: str, library: Any) -> None:
    """Write a kernel to the cache: to a new file and then renamed, so that no process ever reads half of one."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError:  # a disk that has become read-only or full
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_seal(pickle.dumps((symbol, library.serialize_using_object_code()))))
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)


_suffix = os.urandom(8).hex()


def unique(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that is about to be compiled a name that no kernel compiled elsewhere has.

    Numba counts the functions of a process to tell them apart. Two kernels that different processes have compiled and
    cached would bear the same symbols, and loaded side by side one would call the parts of the other.
    """
    function.__qualname__ += f"_{_suffix}"
    return function


def _require_compiler() -> None:
    if numba.config.DISABLE_JIT:
        raise NoCompilerError("NUMBA_DISABLE_JIT turns off the compiler that fastlstm needs; unset it")


@functools.cache
def _entry(describe: Description, dtype: np.dtype[Any] | None, *options: str) -> tuple[int, Any]:
    _require_compiler()
    path = _file("-".join([describe.__name__, str(dtype), *options]))
    cached = None if path is None else _load(path)
    if cached is None:
        global _suffix
        _suffix = os.urandom(8).hex()
        function, signature = describe(dtype, *options)
        compiled = CFunc(unique(function), (signature.args, signature.return_type), {}, {"error_model": "numpy"})
        compiled.compile()
        cached = compiled.native_name, compiled._library
        if path is not None:
            _save(path, *cached)
    symbol, library = cached
    return library.get_pointer_to_function(symbol), library


def entry(describe: Description, dtype: np.dtype[Any] | None = None, *options: str) -> int:
    """Return the address of the compiled kernel whose function and signature `describe(dtype, *options)` gives."""
    with compiling:
        return _entry(describe, dtype, *options)[0]


class _Locator:
    """Where numba's own cache keeps the parallel region."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._py_file = __file__

    def ensure_cache_path(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(self.folder)

    def get_source_stamp(self) -> str:
        return self.folder.name

    def get_disambiguator(self) -> str:
        return self.folder.name


class _RegionFile(IndexDataCacheFile):
    """Numba's files, those of machine code sealed."""

    def _save_data(self, name: str, data: Any) -> None:
        with self._open_for_write(self._data_path(name)) as file:
            file.write(_seal(self._dump(data)))

    def _load_data(self, name: str) -> Any:
        return pickle.loads(_unseal(Path(self._data_path(name)).read_bytes()))


class _RegionCache(FunctionCache):
    """Numba's function cache in our folder; whatever goes wrong with a file means compiling again."""

    def __init__(self, function: Callable[..., Any], folder: Path):
        locator = _Locator(folder)

        class Implementation(FunctionCache._impl_class):
            def __init__(self, function: Callable[..., Any]):
                self._lineno = function.__code__.co_firstlineno
                self._locator = locator
                self._filename_base = function.__name__

        self._impl_class = Implementation
        super().__init__(function)
        self._cache_file = _RegionFile(str(folder), self._impl.filename_base, locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            # Not `load_overload`, which first loads all that Numba knows to compile: 0.1 s, and 0.2 more with SciPy.
            rtsys.initialize(target_context)
            return self._load_overload(sig, target_context)
        except Exception:  # as in `_load`
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)


@functools.cache
def _region(function: Callable[..., Any], signature: Any) -> Any:
    _require_compiler()
    dispatcher = numba.njit(function, nogil=True, parallel=True, error_model="numpy")
    folder = cache_folder()
    if folder is not None:
        dispatcher._cache = _RegionCache(function, folder)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


def parallel_region(function: Callable[..., Any], signature: Any) -> int:
    """Return the address of a compiled function with a parallel region, of Numba's own calling convention.

    It takes where to put a result and an exception before its arguments, and returns 0 if there was none.
    """
    with compiling:
        compiled = _region(function, signature).overloads[signature.args]
        address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        return address
