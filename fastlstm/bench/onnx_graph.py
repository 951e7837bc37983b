"""Builds the ONNX model of an LSTM, the common input of ONNX Runtime and OpenVINO."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cases import Array, Problem

__all__ = ["build_model"]

OPSET = 17
IR_VERSION = 9  # the one that came with this opset, so that older runtimes read the model too


def build_model(problem: Problem, *, steps: int, carry_state: bool) -> bytes:
    """Write an LSTM as an ONNX model with static shapes and PyTorch's input and output layout.

    A chain of ONNX `LSTM` nodes, one a layer; between layers the directions, which ONNX keeps on an axis of their own,
    are put side by side as PyTorch does.

    Parameters
    ----------
    problem : Problem
        Weights, batch and, where the model is to have an input `lengths` (N,) int32, lengths.
    steps : int
        T of the model.
    carry_state : bool
        Give the model inputs `h_0` and `c_0`, (L*D, N, H); without them it starts from zeros.

    Returns
    -------
    bytes
        The serialised model: inputs `x` (T, N, I) and those above; outputs `output` (T, N, D*H), `h_n` and `c_n`
        (L*D, N, H).

    Raises
    ------
    NotImplementedError
        If the LSTM has a projection, which ONNX's LSTM does not.
    """
    if problem.proj_size:
        raise NotImplementedError("ONNX has no LSTM with a projection")
    import onnx

    make_node, real = onnx.helper.make_node, onnx.TensorProto.FLOAT
    case = problem.case
    D, N, H = case.D, case.N, case.H
    nodes: list[Any] = []
    constants: dict[str, Array] = {}
    inputs = [onnx.helper.make_tensor_value_info("x", real, (steps, N, case.I))]
    states = (case.L * D, N, H)
    if problem.lengths is not None:
        inputs.append(onnx.helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, (N,)))
    if carry_state:
        inputs += [onnx.helper.make_tensor_value_info(name, real, states) for name in ("h_0", "c_0")]
        if case.L > 1:
            nodes += [
                make_node("Split", [name], [f"{name}_l{layer}" for layer in range(case.L)], axis=0)
                for name in ("h_0", "c_0")
            ]

    x = "x"
    for layer in range(case.L):
        constants[f"W_l{layer}"] = _both_directions(problem, "weight_ih", layer)
        constants[f"R_l{layer}"] = _both_directions(problem, "weight_hh", layer)
        if problem.bias:
            biases = [_both_directions(problem, name, layer) for name in ("bias_ih", "bias_hh")]
            constants[f"B_l{layer}"] = np.concatenate(biases, axis=1)
        suffix = f"_l{layer}" if case.L > 1 else ""
        nodes.append(
            make_node(
                "LSTM",
                [
                    x,
                    f"W_l{layer}",
                    f"R_l{layer}",
                    f"B_l{layer}" if problem.bias else "",
                    "lengths" if problem.lengths is not None else "",
                    *((f"h_0{suffix}", f"c_0{suffix}") if carry_state else ()),
                ],
                [f"y_l{layer}", f"h_n{suffix}", f"c_n{suffix}"],
                hidden_size=H,
                direction="bidirectional" if D == 2 else "forward",
            )
        )
        x = "output" if layer == case.L - 1 else f"x_l{layer + 1}"
        if D == 1:
            constants["direction_axis"] = np.array([1], np.int64)
            nodes.append(make_node("Squeeze", [f"y_l{layer}", "direction_axis"], [x]))
        else:
            constants["side_by_side"] = np.array([steps, N, D * H], np.int64)
            nodes.append(make_node("Transpose", [f"y_l{layer}"], [f"t_l{layer}"], perm=(0, 2, 1, 3)))
            nodes.append(make_node("Reshape", [f"t_l{layer}", "side_by_side"], [x]))
    if case.L > 1:
        nodes += [
            make_node("Concat", [f"{name}_l{layer}" for layer in range(case.L)], [name], axis=0)
            for name in ("h_n", "c_n")
        ]

    graph = onnx.helper.make_graph(
        nodes,
        "lstm",
        inputs,
        [
            onnx.helper.make_tensor_value_info("output", real, (steps, N, D * H)),
            *(onnx.helper.make_tensor_value_info(name, real, states) for name in ("h_n", "c_n")),
        ],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="fastlstm")
    onnx.checker.check_model(model, full_check=True)
    serialised: bytes = model.SerializeToString()
    return serialised


def _both_directions(problem: Problem, name: str, layer: int) -> Array:
    """Return a parameter of a layer as (D, ...), its gates reordered from PyTorch's i, f, g, o to ONNX's i, o, f, g."""
    directions = []
    for direction in ("", "_reverse")[: problem.case.D]:
        gate_i, gate_f, gate_g, gate_o = np.split(problem.weights[f"{name}_l{layer}{direction}"], 4)
        directions.append(np.concatenate([gate_i, gate_o, gate_f, gate_g]))
    return np.stack(directions)
