"""The right answer to a problem: what the reference makes of it in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import reference
from ..losses import softmax_cross_entropy
from .cases import Array, LanguageProblem, Problem

__all__ = ["Results", "exact", "run_reference"]

Results = dict[str, Array]
"""What a call leaves: `output`, `h_n`, `c_n`; of a training call also `d_x`, `d_h_0`, `d_c_0` and `d_<weight>` for each
weight; of a language model `loss` and `d_<weight>` for each weight."""


def exact(problem: Problem) -> Results:
    """Return what a call must leave.

    Parameters
    ----------
    problem : Problem

    Returns
    -------
    dict of str to numpy.ndarray
        As `Results`, in float64.
    """
    weights = {name: array.astype(np.float64) for name, array in problem.weights.items()}
    if isinstance(problem, LanguageProblem):
        return _run_language_model(problem, weights)
    return run_reference(problem, weights, problem.x.astype(np.float64))


def run_reference(problem: Problem, weights: Mapping[str, Array], x: Array, state: Any = None) -> Results:
    """Run ``fastlstm.reference`` on a problem, with other weights, input or state in place of its own.

    Parameters
    ----------
    problem : Problem
    weights : mapping of str to numpy.ndarray
    x : numpy.ndarray, (T, N, I)
    state : pair of numpy.ndarray, optional
        The problem's unless given.

    Returns
    -------
    dict of str to numpy.ndarray
        As `Results`.
    """
    output, (h_n, c_n), saved = reference.forward(weights, x, state or problem.state, lengths=problem.lengths)
    results = {"output": output, "h_n": h_n, "c_n": c_n}
    if problem.cotangents is None:
        return results
    d_output, d_h_n, d_c_n = problem.cotangents
    d_x, (d_h_0, d_c_0), d_weights = reference.backward(saved, d_output, (d_h_n, d_c_n))
    return results | {"d_x": d_x, "d_h_0": d_h_0, "d_c_0": d_c_0} | {f"d_{name}": d_weights[name] for name in weights}


def _run_language_model(problem: LanguageProblem, weights: dict[str, Array]) -> Results:
    lstm = {name.removeprefix("lstm."): array for name, array in weights.items() if name.startswith("lstm.")}
    embedding, weight, bias = (weights[name] for name in ("embedding.weight", "linear.weight", "linear.bias"))
    output, _, saved = reference.forward(lstm, embedding[problem.x])
    loss, d_logits = softmax_cross_entropy(output @ weight.T + bias, problem.targets)
    d_x, _, d_lstm = reference.backward(saved, d_logits @ weight)
    d_embedding = np.zeros_like(embedding)
    np.add.at(d_embedding, problem.x, d_x)
    gradients = {
        "d_embedding.weight": d_embedding,
        **{f"d_lstm.{name}": array for name, array in d_lstm.items()},
        "d_linear.weight": d_logits.reshape(-1, len(weight)).T @ output.reshape(-1, weight.shape[1]),
        "d_linear.bias": d_logits.sum(axis=(0, 1)),
    }
    return {"loss": np.asarray(loss), **gradients}
