"""The one table of measured sizes, and the weights and input that go with each.

Everything that measures (the comparison with other libraries, asv, pytest-benchmark) takes its sizes from `CASES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "CASES",
    "REGIMES",
    "Case",
    "Lengths",
    "Problem",
    "make_problem",
    "parse_case",
    "problems_of_model",
    "select",
]

Array = npt.NDArray[Any]
Lengths = Literal["full", "uniform"]

REGIMES = ("latency", "mid", "throughput")

# A streamed case is checked over this many steps, so that an engine that loses the state between steps is found out.
STREAM_STEPS = 8


@dataclass(frozen=True)
class Case:
    """One measured size.

    Parameters
    ----------
    name : str
        What tables and options call it.
    regime : str
        ``latency``, ``mid`` or ``throughput``; anything else for a size that is not in the standard table.
    I, H, L, D, N, T : int
        Input size, hidden size, layers, directions (1 or 2), batch, steps.

    Examples
    --------
    >>> case = Case("tiny", "extra", I=3, H=4, L=2, D=2, N=5, T=7)
    >>> case.shape
    '3,4,2,2,5,7'
    >>> case.flops()
    42560
    """

    name: str
    regime: str
    I: int
    H: int
    L: int
    D: int
    N: int
    T: int

    def __post_init__(self) -> None:
        sizes = (self.I, self.H, self.L, self.D, self.N, self.T)
        if min(sizes) < 1 or self.D > 2:
            raise ValueError(f"a case needs sizes of 1 or more and D of 1 or 2, got I,H,L,D,N,T = {self.shape}")

    @property
    def shape(self) -> str:
        """The six sizes as ``I,H,L,D,N,T``."""
        return f"{self.I},{self.H},{self.L},{self.D},{self.N},{self.T}"

    @property
    def streamed(self) -> bool:
        """Whether what is timed is one step of a stream, its state carried from call to call (T = 1, D = 1)."""
        return self.T == 1 and self.D == 1

    def flops(self, steps: int | None = None, proj_size: int = 0) -> int:
        """Count the floating-point operations of the matrix products of one call, a multiply-add being two.

        Parameters
        ----------
        steps : int, optional
            Valid steps in the whole batch; N*T unless given.
        proj_size : int
            Size of the projection of the hidden state; 0 is none.

        Returns
        -------
        int
        """
        out = proj_size or self.H
        total = 0
        for layer in range(self.L):
            features = self.I if layer == 0 else self.D * out
            total += self.D * 2 * (4 * self.H * (features + out) + proj_size * self.H)
        return total * (self.N * self.T if steps is None else steps)


CASES: tuple[Case, ...] = (
    #    name, regime, I, H, L, D, N, T
    Case("step32", "latency", 32, 32, 1, 1, 1, 1),
    Case("step128", "latency", 128, 128, 1, 1, 1, 1),
    Case("audio16", "latency", 1, 16, 1, 1, 1, 2048),
    Case("audio40", "latency", 1, 40, 1, 1, 1, 2048),
    Case("short", "latency", 8, 32, 1, 1, 1, 100),
    Case("vad", "latency", 128, 128, 1, 1, 1, 512),
    Case("n1h256", "latency", 256, 256, 1, 1, 1, 100),
    Case("n1h512", "latency", 512, 512, 1, 1, 1, 50),
    Case("n1h1024", "latency", 1024, 1024, 1, 1, 1, 50),
    Case("rl", "mid", 64, 256, 1, 1, 8, 128),
    Case("vowels", "mid", 12, 64, 1, 1, 32, 29),
    Case("deepar", "mid", 40, 40, 2, 1, 32, 24),
    Case("ocr", "mid", 48, 96, 1, 2, 8, 200),
    Case("tagger", "mid", 256, 256, 1, 2, 32, 40),
    Case("forecast", "mid", 1, 128, 2, 1, 64, 48),
    Case("b256", "throughput", 256, 256, 1, 1, 64, 100),
    Case("b512", "throughput", 512, 512, 1, 1, 64, 50),
    Case("b1024", "throughput", 1024, 1024, 1, 1, 64, 25),
    Case("wide", "throughput", 40, 40, 2, 1, 3200, 24),
    Case("gnmt", "throughput", 1024, 1024, 1, 1, 128, 30),
)


def select(regimes: Sequence[str] = ("all",), names: Sequence[str] = ()) -> list[Case]:
    """Pick cases from the table, in its order.

    Parameters
    ----------
    regimes : sequence of str
        Regimes to take, or ``all``.
    names : sequence of str
        Cases to take, whatever their regime; where there are any, `regimes` is not looked at.

    Returns
    -------
    list of Case

    Raises
    ------
    ValueError
        If a regime or a name is not in the table.

    Examples
    --------
    >>> [case.name for case in select(names=["vowels", "rl"])]
    ['rl', 'vowels']
    """
    if names:
        _refuse_unknown("case", names, [case.name for case in CASES])
        return [case for case in CASES if case.name in names]
    _refuse_unknown("regime", regimes, [*REGIMES, "all"])
    return [case for case in CASES if "all" in regimes or case.regime in regimes]


def _refuse_unknown(kind: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(known)}")


def parse_case(text: str) -> Case:
    """Read a case from ``I,H,L,D,N,T``; it is named after its sizes and belongs to the regime ``extra``.

    Raises
    ------
    ValueError
        If `text` is not six positive whole numbers, or D is above 2.

    Examples
    --------
    >>> parse_case("8,32,1,1,4,100").name
    'I8-H32-L1-D1-N4-T100'
    """
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 6:
        raise ValueError(f"a shape is six whole numbers I,H,L,D,N,T, got {text!r}")
    name = "-".join(f"{letter}{size}" for letter, size in zip("IHLDNT", sizes, strict=True))
    return Case(name, "extra", *sizes)


@dataclass(frozen=True)
class Problem:
    """What every engine is given: weights, input and lengths.

    Parameters
    ----------
    case : Case
        The size.
    weights : dict of str to numpy.ndarray
        Named and shaped as in ``torch.nn.LSTM``; without the bias or with the projection where the model is so.
    x : numpy.ndarray
        (T, N, I); for a streamed case a few steps, of which the first is the one that is timed.
    lengths : numpy.ndarray or None
        (N,) valid steps of each row; None where every step is valid.
    """

    case: Case
    weights: dict[str, Array]
    x: Array
    lengths: Array | None = None

    @property
    def dtype(self) -> str:
        """``float32`` or ``float64``."""
        return str(self.x.dtype)

    @property
    def bias(self) -> bool:
        """Whether the layers have biases."""
        return "bias_ih_l0" in self.weights

    @property
    def proj_size(self) -> int:
        """Size of the projected hidden state, 0 where there is no projection."""
        return self.weights["weight_hr_l0"].shape[0] if "weight_hr_l0" in self.weights else 0

    @property
    def flops(self) -> int:
        """Floating-point operations of one timed call."""
        steps = None if self.lengths is None else int(self.lengths.sum())
        return self.case.flops(steps, self.proj_size)


def make_problem(case: Case, dtype: npt.DTypeLike = np.float32, lengths: Lengths = "full") -> Problem:
    """Draw the weights and the input of a case, the same ones every time.

    Parameters
    ----------
    case : Case
        The size; its sizes are also the seed.
    dtype : dtype
        float32 or float64; both get the same numbers up to rounding.
    lengths : {"full", "uniform"}
        ``uniform`` draws the length of each row evenly from 1..T.

    Returns
    -------
    Problem
        Weights drawn evenly from +-1/sqrt(H), as ``torch.nn.LSTM`` does; input from the standard normal distribution.

    Examples
    --------
    >>> problem = make_problem(parse_case("3,4,1,2,5,7"), lengths="uniform")
    >>> problem.x.shape, problem.weights["weight_hh_l0_reverse"].shape, problem.lengths.shape
    ((7, 5, 3), (16, 4), (5,))
    """
    rng = np.random.default_rng([case.I, case.H, case.L, case.D, case.N, case.T])
    bound = 1 / np.sqrt(case.H)
    weights = {}
    for layer in range(case.L):
        features = case.I if layer == 0 else case.D * case.H
        for direction in ("", "_reverse")[: case.D]:
            for name, shape in {
                "weight_ih": (4 * case.H, features),
                "weight_hh": (4 * case.H, case.H),
                "bias_ih": (4 * case.H,),
                "bias_hh": (4 * case.H,),
            }.items():
                weights[f"{name}_l{layer}{direction}"] = rng.uniform(-bound, bound, shape).astype(dtype)
    return _with_input(case, weights, rng, lengths)


def _with_input(case: Case, weights: Mapping[str, Array], rng: np.random.Generator, lengths: Lengths) -> Problem:
    steps = STREAM_STEPS if case.streamed else case.T
    dtype = weights["weight_ih_l0"].dtype
    x = rng.standard_normal((steps, case.N, case.I)).astype(dtype)
    drawn = rng.integers(1, case.T + 1, case.N) if lengths == "uniform" and not case.streamed else None
    return Problem(case, dict(weights), x, drawn)


def problems_of_model(model: Any, N: int, T: int, lengths: Lengths = "full") -> list[Problem]:
    """Make a problem of each LSTM layer of a model: its own weights, random input.

    Parameters
    ----------
    model : fastlstm.LSTM or fastlstm.Sequential
        The model, as ``fastlstm.load`` returns it.
    N, T : int
        Batch and steps.
    lengths : {"full", "uniform"}
        As for `make_problem`.

    Returns
    -------
    list of Problem
        One a layer, of the regime ``model``, named by its place in the model.

    Raises
    ------
    ValueError
        If there is no LSTM layer in the model.
    """
    layers: dict[str, dict[str, Array]] = {}
    for name, array in model.state_dict().items():
        prefix, _, parameter = name.rpartition(".")
        layers.setdefault(prefix, {})[parameter] = array
    problems = []
    for prefix, weights in layers.items():
        if "weight_hh_l0" not in weights:
            continue
        case = Case(
            f"layer {prefix}" if prefix else "model",
            "model",
            I=weights["weight_ih_l0"].shape[1],
            H=weights["weight_ih_l0"].shape[0] // 4,
            L=sum(name.startswith("weight_ih") and not name.endswith("_reverse") for name in weights),
            D=2 if "weight_ih_l0_reverse" in weights else 1,
            N=N,
            T=T,
        )
        problems.append(_with_input(case, weights, np.random.default_rng([N, T]), lengths))
    if not problems:
        raise ValueError("the model has no LSTM layer to compare")
    return problems
