"""The one table of measured sizes, and the weights and input that go with each.

Everything that measures (the comparison with other libraries, asv, pytest-benchmark) takes its sizes from `CASES`. It
imports NumPy alone: asv loads this very file to measure versions that have another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "CASES",
    "LANGUAGE_CASES",
    "MODES",
    "REGIMES",
    "Case",
    "LanguageCase",
    "LanguageProblem",
    "Lengths",
    "Mode",
    "Problem",
    "make_problem",
    "parse_case",
    "problems_of_model",
    "select",
]

Array = npt.NDArray[Any]
Lengths = Literal["full", "uniform"]
Mode = Literal["infer", "train"]

MODES: tuple[Mode, ...] = ("infer", "train")
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
        """Whether what is timed at inference is one step of a stream, its state carried along (T = 1, D = 1)."""
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


@dataclass(frozen=True)
class LanguageCase(Case):
    """A language model whose whole training step is measured, inside PyTorch.

    An embedding (V, I), the LSTM, and a linear layer (V, H) under softmax and cross entropy.

    Parameters
    ----------
    V : int
        Size of the vocabulary.
    """

    V: int = 10_000

    def flops(self, steps: int | None = None, proj_size: int = 0) -> int:
        """Count the floating-point operations of a forward pass, those of the linear layer among them.

        Examples
        --------
        >>> LANGUAGE_CASES[0].flops() - Case("lstm", "extra", 256, 256, 2, 1, 32, 64).flops() == 2 * 256 * 128 * 2048
        True
        """
        rows = self.N * self.T if steps is None else steps
        return super().flops(steps, proj_size) + 2 * (proj_size or self.H) * self.V * rows


LANGUAGE_CASES: tuple[LanguageCase, ...] = (
    LanguageCase("lm128", "language", 256, 256, 2, 1, 32, 64, V=128),  # characters
    LanguageCase("lm10k", "language", 256, 256, 2, 1, 32, 64, V=10_000),  # the words of the Penn Treebank
)
"""Measured in the mode `train` alone."""


def select(regimes: Sequence[str] = ("all",), names: Sequence[str] = (), mode: Mode = "infer") -> list[Case]:
    """Pick cases from the table, in its order.

    Parameters
    ----------
    regimes : sequence of str
        Regimes to take, or ``all``.
    names : sequence of str
        Cases to take, whatever their regime; where there are any, `regimes` is not looked at.
    mode : {"infer", "train"}
        Training adds the `LANGUAGE_CASES`.

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
    cases = (*CASES, *LANGUAGE_CASES) if mode == "train" else CASES
    if names:
        _refuse_unknown("case", names, [case.name for case in cases])
        return [case for case in cases if case.name in names]
    _refuse_unknown("regime", regimes, [*dict.fromkeys(case.regime for case in cases), "all"])
    return [case for case in cases if "all" in regimes or case.regime in regimes]


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
    """What every engine is given: weights, input and lengths, and for training a state and the gradients to begin with.

    Parameters
    ----------
    case : Case
        The size.
    weights : dict of str to numpy.ndarray
        Named and shaped as in ``torch.nn.LSTM``; without the bias or with the projection where the model is so.
    x : numpy.ndarray
        (T, N, I); for a streamed problem a few steps, of which the first is the one that is timed.
    lengths : numpy.ndarray or None
        (N,) valid steps of each row; None where every step is valid.
    state : pair of numpy.ndarray or None
        `h_0` (L*D, N, P) and `c_0` (L*D, N, H) of a training problem; None is zeros.
    cotangents : three numpy.ndarray or None
        Of a training problem, gradients with respect to `output` (T, N, D*P), `h_n` (L*D, N, P), `c_n` (L*D, N, H).
    """

    case: Case
    weights: dict[str, Array]
    x: Array
    lengths: Array | None = None
    state: tuple[Array, Array] | None = None
    cotangents: tuple[Array, Array, Array] | None = None

    @property
    def mode(self) -> Mode:
        """Whether the outputs are wanted, or all gradients too."""
        return "infer" if self.cotangents is None else "train"

    @property
    def streamed(self) -> bool:
        """Whether what is timed is one step of a stream, its state carried from call to call."""
        return self.case.streamed and self.mode == "infer"

    @property
    def dtype(self) -> str:
        """``float32`` or ``float64``."""
        return str(next(iter(self.weights.values())).dtype)

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
        """Floating-point operations of one timed call: a backward pass has two products for one of the forward pass."""
        steps = None if self.lengths is None else int(self.lengths.sum())
        return self.case.flops(steps, self.proj_size) * (1 if self.mode == "infer" else 3)


@dataclass(frozen=True)
class LanguageProblem(Problem):
    """A training step of a language model: `x` holds tokens (T, N), and the weights are those of all its layers.

    Parameters
    ----------
    targets : numpy.ndarray
        (T, N) the token after each.
    """

    case: LanguageCase
    targets: Array = field(kw_only=True)

    @property
    def mode(self) -> Mode:
        """Training."""
        return "train"


def make_problem(
    case: Case, dtype: npt.DTypeLike = np.float32, lengths: Lengths = "full", mode: Mode = "infer"
) -> Problem:
    """Draw the weights and the input of a case, the same ones every time.

    Parameters
    ----------
    case : Case
        The size; its sizes are also the seed.
    dtype : dtype
        float32 or float64; both get the same numbers up to rounding.
    lengths : {"full", "uniform"}
        ``uniform`` draws the length of each row evenly from 1..T.
    mode : {"infer", "train"}
        Whether gradients are wanted.

    Returns
    -------
    Problem
        Weights drawn evenly from +-1/sqrt(H), as ``torch.nn.LSTM`` does; input, and what training adds to it, from the
        standard normal distribution.

    Raises
    ------
    ValueError
        If a language model is to have lengths.

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
    if not isinstance(case, LanguageCase):
        return _with_input(case, weights, rng, lengths, mode)
    if lengths != "full":
        raise ValueError(f"{case.name} has no lengths: its sequences are full")
    weights = {
        "embedding.weight": rng.standard_normal((case.V, case.I)).astype(dtype),
        **{f"lstm.{name}": array for name, array in weights.items()},
        "linear.weight": rng.uniform(-bound, bound, (case.V, case.H)).astype(dtype),
        "linear.bias": rng.uniform(-bound, bound, case.V).astype(dtype),
    }
    tokens = rng.integers(0, case.V, (case.T + 1, case.N))
    return LanguageProblem(case, weights, tokens[:-1].copy(), targets=tokens[1:].copy())


def _with_input(
    case: Case, weights: Mapping[str, Array], rng: np.random.Generator, lengths: Lengths, mode: Mode
) -> Problem:
    streamed = case.streamed and mode == "infer"
    dtype = weights["weight_ih_l0"].dtype
    x = rng.standard_normal((STREAM_STEPS if streamed else case.T, case.N, case.I)).astype(dtype)
    drawn = rng.integers(1, case.T + 1, case.N) if lengths == "uniform" and not streamed else None
    if mode == "infer":
        return Problem(case, dict(weights), x, drawn)
    P, rows = weights["weight_hh_l0"].shape[1], (case.L * case.D, case.N)
    shapes = [(*rows, P), (*rows, case.H), (case.T, case.N, case.D * P), (*rows, P), (*rows, case.H)]
    h_0, c_0, d_output, d_h_n, d_c_n = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return Problem(case, dict(weights), x, drawn, (h_0, c_0), (d_output, d_h_n, d_c_n))


def problems_of_model(model: Any, N: int, T: int, lengths: Lengths = "full", mode: Mode = "infer") -> list[Problem]:
    """Make a problem of each LSTM layer of a model: its own weights, random input.

    Parameters
    ----------
    model : fastlstm.LSTM or fastlstm.Sequential
        The model, as ``fastlstm.load`` returns it.
    N, T : int
        Batch and steps.
    lengths : {"full", "uniform"}
        As for `make_problem`.
    mode : {"infer", "train"}
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
        problems.append(_with_input(case, weights, np.random.default_rng([N, T]), lengths, mode))
    if not problems:
        raise ValueError("the model has no LSTM layer to compare")
    return problems
