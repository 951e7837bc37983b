"""What this installation runs on, and getting it ready."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastlstm.checks import check_flag, float_dtype
from fastlstm.threads import get_num_threads

__all__ = ["describe", "show_config", "warmup"]


def describe() -> dict[str, Any]:
    """Return what `show_config` prints.

    Returns
    -------
    dict
        `versions` (a dict), `cpu`, `target` (what the code generator is told the CPU is), `vector_bits`, `registers`,
        `fma`, `lanes` (of a register, for each dtype), `threads`, `threading_layer`, `cache_folder` (None: no cache).

    Examples
    --------
    >>> from fastlstm import config
    >>> config.describe()["lanes"]["float32"] >= 4
    True
    """
    import llvmlite
    import numba

    import fastlstm
    from fastlstm.kernels.compile import cache_folder
    from fastlstm.kernels.simd import target

    cpu = target()
    folder = cache_folder()
    return {
        "versions": {
            "fastlstm": fastlstm.__version__,
            "numba": numba.__version__,
            "llvmlite": llvmlite.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "cpu": _cpu_model(),
        "target": cpu.cpu,
        "vector_bits": cpu.vector_bits,
        "registers": cpu.registers,
        "fma": cpu.fma,
        "lanes": {name: cpu.lanes(np.dtype(name)) for name in ("float32", "float64")},
        "threads": get_num_threads(),
        "threading_layer": _threading_layer(),
        "cache_folder": None if folder is None else str(folder),
    }


def show_config() -> None:
    """Print versions, CPU features, lanes, threads, threading layer and cache folder.

    Examples
    --------
    >>> import fastlstm
    >>> fastlstm.show_config()  # doctest: +ELLIPSIS
    fastlstm         ...
    """
    found = describe()
    versions = found["versions"]
    others = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "fastlstm")
    lanes = ", ".join(f"{count} {name}" for name, count in found["lanes"].items())
    lines = {
        "fastlstm": f"{versions['fastlstm']} ({others})",
        "CPU": f"{found['cpu']}, {platform.system()} {platform.machine()}",
        "code for": f"{found['target']}, {'with' if found['fma'] else 'without'} fused multiply-add",
        "vectors": f"{found['registers']} registers of {found['vector_bits']} bits: {lanes}",
        "threads": found["threads"],
        "threading layer": found["threading_layer"],
        "compile cache": found["cache_folder"] or "none",
    }
    for name, text in lines.items():
        print(f"{name:<17}{text}")


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _threading_layer() -> str:
    import numba

    try:
        return str(numba.threading_layer())
    except ValueError:  # none has been started
        wanted = numba.config.THREADING_LAYER
        first = f"the first of {', '.join(numba.config.THREADING_LAYER_PRIORITY)} that loads"
        return f"not started; will be {first if wanted == 'default' else wanted}"


def warmup(dtypes: Iterable[DTypeLike] = ("float32",), training: bool = False) -> None:
    """Compile every kernel, or load it from the cache, so that the first request does not wait for it.

    Parameters
    ----------
    dtypes : iterable of dtypes, default ("float32",)
        Of the layers that will be used; one dtype alone will do.
    training : bool, default False
        Whether they will be trained.

    Raises
    ------
    TypeError, ValueError
        If a dtype is neither float32 nor float64.

    Examples
    --------
    >>> import fastlstm
    >>> fastlstm.warmup()
    """
    from fastlstm.kernels.network import load_tiles
    from fastlstm.lstm import LSTM
    from fastlstm.model import Linear

    check_flag("training", training)
    several = isinstance(dtypes, Iterable) and not isinstance(dtypes, (str, type))
    for dtype in list(map(float_dtype, dtypes if several else [dtypes])):
        # Large enough for more than one thread; the layers have a projection, so that its kernel runs too.
        lstm = LSTM(64, 128, num_layers=2, proj_size=64, dtype=dtype, rng=0)
        x = np.zeros((16, 192, 64), dtype)
        linear = Linear(64, 64, dtype=dtype, rng=0)
        load_tiles(x.dtype, training)
        lstm(x)
        linear(x)
        lstm.stream()(x[0, :1])
        if training:
            few, one = LSTM(1, 8, dtype=dtype, rng=0), LSTM(64, 64, dtype=dtype, rng=0)  # have tiles of their own
            for tape in lstm.record(x[:2]), linear.record(x), few.record(x[:, :1, :1]), one.record(x[:1, :1]):
                tape.backward(tape.output)
