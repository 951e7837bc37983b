"""What the tests share: cases and their weights, exact results, comparison by bits, strategies, subprocesses."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

import fastlstm
from fastlstm import LSTM, reference, threads

allows_region = threads.Pace.allows_region
threads.Pace.allows_region = lambda *_: True  # however busy the machine is
SOURCES = Path(fastlstm.__file__).resolve().parents[1]
WIDER = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}
BOTH = [np.float32, np.float64]


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled kernels from session to session, for this process and for those that tests start."""
    if "FASTLSTM_CACHE" not in os.environ and hasattr(config, "cache"):
        os.environ["FASTLSTM_CACHE"] = str(config.cache.mkdir("fastlstm"))


# Cases


@dataclass(frozen=True)
class Case:
    """Sizes and features of one layer and one call."""

    T: int = 5
    N: int = 3
    I: int = 3
    H: int = 5
    L: int = 1
    D: int = 1
    P: int = 0  # 0 is no projection, as `proj_size`
    bias: bool = True
    lengths: bool = False
    reset: bool = False
    state: bool = True
    layout: str = "TNI"  # NTI: batch_first; TI: unbatched
    dtype: Any = np.float32

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{getattr(self, name)}" for name in "TNIHLDP")
        flags = [name for name in ("bias", "lengths", "reset", "state") if getattr(self, name)]
        return "-".join([sizes, *flags, self.layout, np.dtype(self.dtype).name])


@dataclass
class Problem:
    """A layer, and the time-major arguments of a call."""

    case: Case
    layer: LSTM
    x: Any
    state: Any
    lengths: Any
    reset: Any

    def call(self, **changed: Any) -> tuple[Any, Any]:
        """Call the layer in the case's layout, into an output of NaN; return the results time-major and batched."""
        layout, dtype = self.case.layout, self.layer.dtype
        arguments = {"x": self.x, "state": self.state, "lengths": self.lengths, "reset": self.reset} | changed
        x, state, reset = arguments["x"], arguments["state"], arguments["reset"]
        T, N, _ = x.shape
        out = np.full((T, N, self.case.D * (self.case.P or self.case.H)), np.nan, dtype)
        if layout == "NTI":
            x, out = np.ascontiguousarray(x.swapaxes(0, 1)), np.ascontiguousarray(out.swapaxes(0, 1))
            reset = None if reset is None else reset.T
        elif layout == "TI":
            x, out = x[:, 0], out[:, 0]
            state = None if state is None else tuple(part[:, 0] for part in state)
            reset = None if reset is None else reset[:, 0]
        output, (h_n, c_n) = self.layer(x, state, lengths=arguments["lengths"], reset=reset, out=out)
        assert output is out
        assert output.dtype == h_n.dtype == c_n.dtype == dtype
        if layout == "NTI":
            output = output.swapaxes(0, 1)
        elif layout == "TI":
            output, h_n, c_n = output[:, None], h_n[:, None], c_n[:, None]
        return output, (h_n, c_n)

    def exact(self, **changed: Any) -> tuple[Any, Any]:
        """Return what the reference makes of the same numbers in a wider dtype."""
        wide = WIDER[self.layer.dtype]
        arguments = {"x": self.x, "state": self.state, "lengths": self.lengths, "reset": self.reset} | changed
        params = {name: value.astype(wide) for name, value in self.layer.state_dict().items()}
        state = arguments["state"] and tuple(part.astype(wide) for part in arguments["state"])
        return reference.forward(
            params, arguments["x"].astype(wide), state, lengths=arguments["lengths"], reset=arguments["reset"]
        )[:2]

    def row(self, n: int, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """Return the arguments of one row alone, from step `start` to `stop`; the state is that of the whole row."""
        return {
            "x": self.x[start:stop, n : n + 1],
            "state": self.state and tuple(part[:, n : n + 1] for part in self.state),
            "lengths": None,
            "reset": None if self.reset is None else self.reset[start:stop, n : n + 1],
        }


def draw(case: Case, seed: int = 0, scale: float = 1.0) -> Problem:
    """Draw weights and arguments; weights have the size of PyTorch's initial ones, times `scale`."""
    rng = np.random.default_rng([seed, case.T, case.N, case.I, case.H, case.P])
    T, N, I, H, L, D, P = case.T, case.N, case.I, case.H, case.L, case.D, case.P or case.H
    layer = LSTM(
        I, H, L, case.bias, case.layout == "NTI", bidirectional=D == 2, proj_size=case.P, dtype=case.dtype, rng=rng
    )
    if scale != 1:
        layer.load_state_dict({name: scale * value for name, value in layer.state_dict().items()})
    dtype = layer.dtype
    lengths = rng.permutation(np.arange(N) * T // max(N - 1, 1)) if case.lengths else None  # 0 and T are among them
    return Problem(
        case=case,
        layer=layer,
        x=rng.normal(size=(T, N, I)).astype(dtype),
        state=(rng.normal(size=(L * D, N, P)).astype(dtype), rng.normal(size=(L * D, N, H)).astype(dtype))
        if case.state
        else None,
        lengths=lengths,
        reset=rng.random((T, N)) < 0.3 if case.reset else None,
    )


def grid(case: Case, **axes: Any) -> list[Case]:
    """Return every combination of the axes put into a case."""
    return [replace(case, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


# Comparison


@st.composite
def random_cases(draw_from: st.DrawFn, most_steps: int) -> Case:
    """Draw sizes and features, of so many steps at the most."""

    def size(most: int) -> int:
        return draw_from(st.integers(1, most))

    H = size(70)
    P = draw_from(st.sampled_from([0, 0, 1])) and draw_from(st.integers(0, H - 1))
    flags = {name: draw_from(st.booleans()) for name in ("bias", "lengths", "reset", "state")}
    dtype = draw_from(st.sampled_from(BOTH))
    layout = draw_from(st.sampled_from(["TNI", "NTI"]))
    return Case(size(most_steps), size(15), size(20), H, size(3), size(2), P, **flags, layout=layout, dtype=dtype)


def tolerance(case: Case) -> float:
    """Return how far a result may lie from the exact one, relative to the larger of the value and 1.

    An element of z is a sum of K = I + P + 1 terms.  Rounding adds at most half an eps of the partial sum to each,
    which for independent errors makes eps / 2 * sqrt(K) where partial sums are about 1; a state carries the errors of
    the steps before, which the forget gate (about 1/2) doubles.  The worst of some 10^5 elements lies five deviations
    out.  Layers add up: the second reads the first's errors, again through gates that halve them.
    """
    widest = max(case.I, case.D * (case.P or case.H) if case.L > 1 else 0)
    K = widest + (case.P or case.H) + 1
    return float(np.finfo(case.dtype).eps) * 5 * np.sqrt(K) * case.L


def assert_close(actual: tuple[Any, Any], exact: tuple[Any, Any], limit: float) -> None:
    """Compare (output, (h_n, c_n)) with the exact ones; NaN and infinity must be the same."""
    for got, want in zip((actual[0], *actual[1]), (exact[0], *exact[1]), strict=True):
        assert got.shape == want.shape
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite])
        error = np.abs(got[finite] - want[finite]) / np.maximum(1, np.abs(want[finite]))
        assert error.max(initial=0) <= limit


class ByDlpack:
    """An array that only DLPack hands out."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class ByArray:
    """An array behind NumPy's own protocol."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.array


def bits(array: Any) -> Any:
    """Return the bits of an array as integers; any NaN counts as the same."""
    array = np.where(np.isnan(array), np.nan, array).astype(array.dtype)
    return array.view(f"i{array.dtype.itemsize}")


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Compare arrays, or nested tuples of arrays, by their bits."""
    if isinstance(actual, tuple):
        for got, want in zip(actual, expected, strict=True):
            assert_same_bits(got, want)
    else:
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(bits(actual), bits(expected))


# How a call is shared out


@contextmanager
def forced(ranks: int, shares: int, groups: int, hoisted: bool, chunk: int) -> Iterator[None]:
    """Share out every call and stream in one way, in place of what the library would choose; at most N groups."""
    from fastlstm.kernels import network

    forward, choose = network.Network.forward, network.choose_strategy

    def how(N: int) -> network.Strategy:
        return network.Strategy(ranks, shares, min(groups, N), hoisted, chunk)

    def forced_forward(self: Any, x: Any, out: Any, strides: Any, T: int, N: int, *rest: Any) -> None:
        forward(self, x, out, strides, T, N, *rest, how=how(N))

    network.Network.forward = forced_forward
    network.choose_strategy = lambda _, N, *rest: how(N)  # of streams
    try:
        yield
    finally:
        network.Network.forward, network.choose_strategy = forward, choose


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Give the number of threads back after a test."""
    before = fastlstm.get_num_threads()
    yield
    fastlstm.set_num_threads(before)


# Subprocesses


def environment(**changed: str | None) -> dict[str, str]:
    """Return the environment of a subprocess that finds the package; None removes a variable."""
    variables = os.environ | {"PYTHONPATH": str(SOURCES)} | changed
    return {name: value for name, value in variables.items() if value is not None}


def run_python(code: str, *args: str, timeout: float = 300, **variables: str | None) -> str:
    """Run code in a fresh interpreter and return what it printed; any other end than a clean one fails the test."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=SOURCES.anchor,  # not a folder with a package that would come before that of PYTHONPATH
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@cache
def loads(layer: str) -> bool:
    """Return whether a threading layer of Numba loads here."""
    code = (
        "import numba, numpy\n@numba.njit(parallel=True)\ndef f(a):\n"
        "    for i in numba.prange(a.size):\n        a[i] += 1\nf(numpy.ones(9))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment(NUMBA_THREADING_LAYER=layer),
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


@pytest.fixture(params=["omp", "workqueue", "tbb"])
def threading_layer(request: pytest.FixtureRequest) -> str:
    """Return the name of a threading layer that loads."""
    name: str = request.param
    if not loads(name):
        pytest.skip(f"Numba's threading layer {name} does not load here")
    return name
