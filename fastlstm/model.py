"""A model around the layer: `Linear`, and `Sequential` of LSTM and Linear layers."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastlstm.checks import as_array, as_generator, as_interval, as_out, as_size, check_flag
from fastlstm.lstm import LSTM, Call, SequenceModel
from fastlstm.memory import empty
from fastlstm.parameters import Layer, Setting, check_names
from fastlstm.threads import load

if TYPE_CHECKING:
    from fastlstm.kernels.product import Product
    from fastlstm.kernels.training import LinearGradients
    from fastlstm.tape import Gradients, Tape

__all__ = ["Linear", "Sequential", "SequentialStream"]

Array = NDArray[Any]
States = list[tuple[Array, Array] | None]
InitialStates = Sequence[tuple[ArrayLike, ArrayLike] | None]


class Linear(Layer):
    """A linear layer, y = x W^T + b, with the arguments and weights of `torch.nn.Linear`.

    Parameters
    ----------
    in_features : int
        Numbers in.
    out_features : int
        Numbers out.
    bias : bool, default True
        Whether there is a `bias`.
    dtype : dtype, default float32
        float32 or float64; of weights and outputs.
    rng : int or numpy.random.Generator, optional
        Seed of the initial weights, uniform in +-1/sqrt(in_features).

    Raises
    ------
    TypeError, ValueError
        Where an argument is of the wrong kind or out of range.

    Notes
    -----
    A row of the output has the same bits whatever the number of rows, the other rows and the number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm import Linear
    >>> linear = Linear(2, 1)
    >>> linear.load_state_dict({"weight": [[1.0, 2.0]], "bias": [3.0]})
    >>> linear([[1, 1], [2, 3]])
    array([[ 6.],
           [11.]], dtype=float32)
    """

    _SETTINGS: ClassVar[dict[str, Setting]] = {
        "in_features": (as_size, ...),
        "out_features": (as_size, ...),
        "bias": (check_flag, True),
    }

    in_features: int
    out_features: int
    weight: Array
    bias: Array | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
        rng: int | np.random.Generator | None = None,
    ) -> None:
        self._configure(dtype, in_features=in_features, out_features=out_features, bias=bias)
        self._randomise(1 / math.sqrt(self.in_features), rng)

    def _configure(self, dtype: object, **settings: object) -> None:
        super()._configure(dtype, **settings)
        if not self.__dict__.pop("bias"):  # the name is that of a weight
            self.__dict__["bias"] = None

    @property
    def _ends(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        return shapes | {"bias": (self.out_features,)} if self._config["bias"] else shapes

    def _pack(self, params: Mapping[str, Array]) -> Product:
        product: Product = load("fastlstm.kernels.product").Product(params["weight"], params.get("bias"))
        return product

    def __call__(self, x: ArrayLike, *, out: Array | None = None) -> Array:
        """Apply the layer to every row.

        Parameters
        ----------
        x : array_like, (..., in_features)
            Anything `np.asarray` or DLPack takes, cast to the layer's dtype where NumPy's `same_kind` rule allows.
        out : ndarray, (..., out_features), optional
            Written in place and returned; C-contiguous and of the layer's dtype.

        Returns
        -------
        ndarray, (..., out_features)

        Raises
        ------
        TypeError
            If `x` has a dtype that does not cast, or `out` is of the wrong kind.
        ValueError
            If a shape is wrong. Nothing has been computed or written then.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import Linear
        >>> Linear(5, 2, rng=0)(np.zeros((7, 3, 5))).shape
        (7, 3, 2)
        """
        array = as_array("x", x, self.dtype)
        self._check_features(array)
        shape = (*array.shape[:-1], self.out_features)
        if out is None:
            out = empty(shape, self.dtype)
        else:
            out = as_out(out, shape, self.dtype, "(..., out_features)")
            if np.may_share_memory(array, out):
                array = array.copy()
        if array.size:
            product: Product = self._packed_weights()
            product.apply(array.reshape(-1, self.in_features), out.reshape(-1, self.out_features))
        return out

    def _check_features(self, x: Array) -> None:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"`x` must have shape (..., in_features) with in_features = {self.in_features}, got {x.shape}"
            )

    def record(self, x: ArrayLike) -> Tape:
        """Apply the layer to every row and keep what the gradients need.

        Parameters
        ----------
        x : array_like, (..., in_features)
            As for a call of the layer. It is copied: it may change before `backward`.

        Returns
        -------
        Tape
            With `output` and `backward`; its `state` is None.

        Raises
        ------
        TypeError, ValueError
            As a call of the layer does.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import Linear
        >>> gradients = Linear(5, 2, rng=0).record(np.ones((7, 3, 5))).backward(np.ones((7, 3, 2)))
        >>> gradients.x.shape, gradients.params["bias"]
        ((7, 3, 5), array([21., 21.], dtype=float32))
        """
        array = as_array("x", x, self.dtype)
        self._check_features(array)
        return self._record(array.copy())

    def _record(self, x: Array) -> Tape:
        """Record a call on an array that nobody else writes to."""
        results = load("fastlstm.tape")
        weights: LinearGradients = self._training_weights()
        output = empty((*x.shape[:-1], self.out_features), self.dtype)
        shape = (x.size // self.in_features, self.in_features)
        if x.size:
            weights.product.apply(x.reshape(shape), output.reshape(-1, self.out_features))

        def backward(d_output: object, d_state: object) -> Gradients:
            if d_state is not None:
                raise ValueError(f"`d_state` must be None: a Linear has no state, got {type(d_state).__name__}")
            found = {name: np.zeros(shape, self.dtype) for name, shape in self._shapes().items()}
            d_x = np.zeros(shape, self.dtype)
            if d_output is not None:
                d_y = as_array("d_output", d_output, self.dtype)
                if d_y.shape != output.shape:
                    raise ValueError(
                        f"`d_output` must have shape (..., out_features) = {output.shape}, got {d_y.shape}"
                    )
                if d_y.size:
                    d_y = d_y.reshape(-1, self.out_features)
                    d_x, found["weight"] = weights.backward(x.reshape(shape), d_y, found.get("bias"))
            gradients: Gradients = results.Gradients(d_x.reshape(x.shape), None, found)
            return gradients

        tape: Tape = results.Tape(output, None, backward)
        return tape

    def _pack_for_training(self, params: Mapping[str, Array]) -> LinearGradients:
        kernels = load("fastlstm.kernels.training")
        gradients: LinearGradients = kernels.LinearGradients(params["weight"], params.get("bias"))
        return gradients


class Sequential(SequenceModel):
    """LSTM and Linear layers, one after the other: the output of one is the `x` of the next.

    Parameters
    ----------
    *layers : LSTM or Linear
        At least one. Sizes and dtypes fit each other, and `batch_first` is the same in all LSTM layers. The model does
        not copy them: a weight changed in a layer is changed in the model.

    Raises
    ------
    TypeError
        If a layer is something else.
    ValueError
        If there is none, or one does not fit the one before.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm import LSTM, Linear, Sequential
    >>> model = Sequential(LSTM(3, 5, rng=0), Linear(5, 1, rng=1))
    >>> output, state = model(np.zeros((7, 2, 3), np.float32))
    >>> output.shape, len(state), state[1]
    ((7, 2, 1), 2, None)
    """

    def __init__(self, *layers: LSTM | Linear) -> None:
        if not layers:
            raise ValueError("`layers` must be at least one LSTM or Linear layer, got none")
        for i, layer in enumerate(layers):
            if not isinstance(layer, (LSTM, Linear)):
                raise TypeError(f"`layers` must be LSTM and Linear layers, got {type(layer).__name__} as layer {i}")
            if layer.dtype != layers[0].dtype:
                raise ValueError(
                    f"`layers` must have one dtype, got {layers[0].dtype} in layer 0 and {layer.dtype} in layer {i}"
                )
        for i, (before, after) in enumerate(pairwise(layers), 1):
            if before._ends[1] != after._ends[0]:
                raise ValueError(
                    f"`layers` must fit each other: layer {i - 1} gives {before._ends[1]} numbers a step, "
                    f"layer {i} takes {after._ends[0]}"
                )
        orders = {layer.batch_first for layer in layers if isinstance(layer, LSTM)}
        if len(orders) > 1:
            raise ValueError("`layers` must have the same `batch_first`, got both True and False")
        self._layers = layers
        self.input_size = layers[0]._ends[0]
        self.batch_first = orders == {True}
        self.dtype = layers[0].dtype

    @property
    def bidirectional(self) -> bool:
        """Whether there is a bidirectional layer, so that the model cannot stream."""
        return any(layer.bidirectional for layer in self._layers if isinstance(layer, LSTM))

    @property
    def _ends(self) -> tuple[int, int]:
        return self.input_size, self._layers[-1]._ends[1]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[LSTM | Linear]:
        return iter(self._layers)

    @overload
    def __getitem__(self, index: int) -> LSTM | Linear: ...

    @overload
    def __getitem__(self, index: slice) -> Sequential: ...

    def __getitem__(self, index: int | slice) -> LSTM | Linear | Sequential:
        return Sequential(*self._layers[index]) if isinstance(index, slice) else self._layers[index]

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self._layers))})"

    # Weights

    @property
    def num_parameters(self) -> int:
        """Number of weights.

        Examples
        --------
        >>> from fastlstm import LSTM, Linear, Sequential
        >>> Sequential(LSTM(3, 5), Linear(5, 1)).num_parameters
        206
        """
        return sum(layer.num_parameters for layer in self._layers)

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the weights, named as in `torch.nn.Sequential`.

        Returns
        -------
        dict of str to ndarray
            The names of a layer's weights behind its number in the model.

        Examples
        --------
        >>> from fastlstm import LSTM, Linear, Sequential
        >>> list(Sequential(LSTM(3, 5, bias=False), Linear(5, 1)).state_dict())
        ['0.weight_ih_l0', '0.weight_hh_l0', '1.weight', '1.bias']
        """
        return {
            f"{i}.{name}": array for i, layer in enumerate(self._layers) for name, array in layer.state_dict().items()
        }

    def load_state_dict(self, mapping: Mapping[str, object], strict: bool = True) -> None:
        """Replace weights; from the next call on the new ones are used.

        Parameters
        ----------
        mapping : mapping of str to array_like or tensor
            Weights under the names of `state_dict`. Arrays are copied, and cast where NumPy's `same_kind` rule allows.
        strict : bool, default True
            Whether every weight must be there and nothing else. Otherwise the names that the model has are used.

        Raises
        ------
        TypeError
            If `mapping` is not one, or an array has a dtype that does not cast.
        ValueError
            If a name is missing or unknown, or a shape is wrong. The model is unchanged.

        Examples
        --------
        >>> from fastlstm import LSTM, Linear, Sequential
        >>> model = Sequential(LSTM(3, 5), Linear(5, 1))
        >>> model.load_state_dict({"1.bias": [2.0]}, strict=False)
        >>> model[1].bias
        array([2.], dtype=float32)
        """
        shapes = {f"{i}.{name}": shape for i, layer in enumerate(self) for name, shape in layer._shapes().items()}
        check_names(mapping, shapes, strict)
        merged = [layer._merged(mapping, f"{i}.") for i, layer in enumerate(self._layers)]
        for layer, params in zip(self._layers, merged, strict=True):
            layer._set_params(params)

    # Inference

    def __call__(
        self,
        x: ArrayLike,
        state: InitialStates | None = None,
        *,
        lengths: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        out: Array | None = None,
    ) -> tuple[Array, States]:
        """Run the model over a batch of sequences, or over one.

        Parameters
        ----------
        x : array_like, (T, N, I); (N, T, I) if `batch_first`; (T, I) unbatched
            Anything `np.asarray` or DLPack takes, cast to the model's dtype where NumPy's `same_kind` rule allows.
        state : list with an entry a layer, optional
            `(h_0, c_0)` for an LSTM, or None for zeros; None for a Linear. Never modified.
        lengths, reset
            As for `LSTM`. Steps at and past a row's length give zeros, whatever the last layer is.
        out : ndarray, as the output, optional
            Written in place and returned; C-contiguous and of the model's dtype.

        Returns
        -------
        output : ndarray, (T, N, O); (N, T, O) if `batch_first`; (T, O) unbatched
            The last layer's outputs.
        state : list with an entry a layer
            `(h_n, c_n)` of an LSTM; None for a Linear.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind.
        ValueError
            If a shape or a value is wrong. Nothing has been computed or written then.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM, Linear, Sequential
        >>> model = Sequential(LSTM(3, 5, rng=0), Linear(5, 1, rng=1))
        >>> output, state = model(np.ones((4, 2, 3)), lengths=[4, 2])
        >>> bool(output[:2, 1].all()), bool(output[2:, 1].any())
        (True, False)
        """
        call = self._check_call(x, state, lengths, reset)
        if out is not None:
            shape = (*call.x.shape[:-1], self._ends[1])
            out = as_out(out, shape, self.dtype, self._symbols("O", call.batched))
        y = call.x
        states: States = []
        for i, (layer, initial) in enumerate(zip(self._layers, call.state, strict=True)):
            target = out if i == len(self) - 1 else None
            final = None
            if isinstance(layer, LSTM):
                y, final = layer._run(call._replace(x=y, state=initial), target)
            else:
                y = layer(y, out=target)
            states.append(final)
        valid = self._valid(call)
        if isinstance(self._layers[-1], Linear) and valid is not None:
            y[~valid[..., 0]] = 0
        return y, states

    def record(
        self,
        x: ArrayLike,
        state: InitialStates | None = None,
        *,
        lengths: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        rng: int | np.random.Generator | None = None,
        checkpoint_every: int | None = None,
    ) -> Tape:
        """Run the model and keep what the gradients need.

        Parameters
        ----------
        x, state, lengths, reset
            As for a call of the model. `x` is copied: it may change before `backward`.
        rng, checkpoint_every
            As for `LSTM.record`.

        Returns
        -------
        Tape
            With `output`, `state` and `backward`; `state` and its gradients are lists with an entry a layer.

        Raises
        ------
        TypeError, ValueError
            As a call of the model does.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM, Linear, Sequential
        >>> model = Sequential(LSTM(3, 5, rng=0), Linear(5, 1, rng=1))
        >>> tape = model.record(np.ones((4, 2, 3), np.float32))
        >>> list(tape.backward(np.ones((4, 2, 1), np.float32)).params)[-2:]
        ['1.weight', '1.bias']
        """
        results = load("fastlstm.tape")
        call = self._check_call(x, state, lengths, reset)
        random, every = as_generator(rng), as_interval("checkpoint_every", checkpoint_every)
        valid = self._valid(call)
        y, owned, tapes = call.x, False, []
        for layer, initial in zip(self._layers, call.state, strict=True):
            if isinstance(layer, LSTM):
                tapes.append(layer._record(call._replace(x=y, state=initial), random, every, owned))
            elif valid is not None:  # what lies past the lengths may be anything; it must not reach the weights
                tapes.append(layer._record(np.where(valid, y, self.dtype.type(0))))
            else:
                tapes.append(layer._record(y if owned else y.copy()))
            y, owned = tapes[-1].output, True
        last_is_linear = isinstance(self._layers[-1], Linear)
        if last_is_linear and valid is not None:
            y = np.where(valid, y, self.dtype.type(0))
        symbols, states_n = self._symbols("O", call.batched), [tape.state for tape in tapes]
        del call

        def backward(d_output: Any, d_state: Any) -> Gradients:
            d_states = self._check_entries(d_state, "d_state")
            states: list[Any] = [None] * len(self)
            params: list[dict[str, Array]] = [{}] * len(self)
            if d_output is not None:
                d_output = as_array("d_output", d_output, self.dtype)
                if d_output.shape != y.shape:
                    raise ValueError(f"`d_output` must have shape {symbols} = {y.shape}, got {d_output.shape}")
            for i in reversed(range(len(self))):
                if valid is not None and d_output is not None and isinstance(self._layers[i], Linear):
                    d_output = np.where(valid, d_output, self.dtype.type(0))
                d_output, states[i], params[i] = tapes[i].backward(d_output, d_states[i])
            named = {f"{i}.{name}": array for i, found in enumerate(params) for name, array in found.items()}
            gradients: Gradients = results.Gradients(d_output, states, named)
            return gradients

        tape: Tape = results.Tape(y, states_n, backward)
        return tape

    def _valid(self, call: Call) -> Array | None:
        """Return whether each step lies within the length of its row, laid out as the output; None: all do."""
        if call.order is None or call.lengths is None:
            return None
        lengths = np.empty_like(call.lengths)
        lengths[call.order] = call.lengths
        valid = np.arange(call.T)[:, None, None] < lengths[:, None]
        return (valid.swapaxes(0, 1) if self.batch_first else valid) if call.batched else valid[:, 0]

    def _check_entries(self, state: object, argument: str) -> list[Any]:
        """Return the entries of a state, or of its gradient, a layer each; that of a Linear is None."""
        if state is None:
            return [None] * len(self)
        if not isinstance(state, (list, tuple)):
            raise TypeError(f"`{argument}` must be a list with an entry a layer, got {type(state).__name__}")
        if len(state) != len(self):
            raise ValueError(f"`{argument}` must have an entry a layer, {len(self)} of them, got {len(state)}")
        for i, (layer, entry) in enumerate(zip(self._layers, state, strict=True)):
            if isinstance(layer, Linear) and entry is not None:
                raise ValueError(f"`{argument}` must be None for layer {i}, a Linear, got {type(entry).__name__}")
        return list(state)

    def _check_state(self, state: object, N: int, batched: bool = True) -> list[Any]:
        entries = self._check_entries(state, "state")
        return [
            None if isinstance(layer, Linear) else layer._check_state(entry, N, batched)
            for layer, entry in zip(self._layers, entries, strict=True)
        ]

    # Streaming

    def stream(self, batch_size: int = 1, state: InitialStates | None = None) -> SequentialStream:
        """Return a stream: the model with a state that it carries from call to call.

        Parameters
        ----------
        batch_size : int, default 1
            N, rows that run side by side.
        state : list with an entry a layer, optional
            `(h, c)` of an LSTM to start from, or None for zeros; None for a Linear.

        Returns
        -------
        SequentialStream
            Call it with one step or a chunk.

        Raises
        ------
        ValueError
            If a layer is bidirectional, or a state has the wrong shape.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM, Linear, Sequential
        >>> stream = Sequential(LSTM(3, 5, rng=0), Linear(5, 1, rng=1)).stream()
        >>> stream(np.ones((1, 3), np.float32)).shape
        (1, 1)
        """
        return SequentialStream(self, batch_size, state)


class SequentialStream:
    """A model with a state that it carries from call to call; made by `Sequential.stream`.

    Step by step, in chunks or the whole sequence in one call of the model: the bits are the same. A stream computes
    with the model's weights of the moment. Calls on one stream wait for each other.
    """

    def __init__(
        self,
        model: Sequential,
        batch_size: int = 1,
        state: InitialStates | None = None,
    ) -> None:
        self._model = model
        self._batch_size = as_size("batch_size", batch_size)
        self._lock = threading.Lock()
        self._stages = [layer.stream(self._batch_size) if isinstance(layer, LSTM) else layer for layer in model]
        self.state = state

    def __call__(self, x: ArrayLike, *, out: Array | None = None) -> Array:
        """Run one step or a chunk, and keep the state.

        Parameters
        ----------
        x : array_like, (N, I) or (T, N, I)
            One step, or T of them; time first whatever the model's `batch_first`.
        out : ndarray, (N, O) or (T, N, O), optional
            Written in place and returned; C-contiguous and of the model's dtype.

        Returns
        -------
        ndarray, (N, O) or (T, N, O)
            The last layer's outputs.

        Raises
        ------
        TypeError, ValueError
            As the model does. The state is unchanged then.
        """
        y = as_array("x", x, self._model.dtype)
        (I, features), N = self._model._ends, self._batch_size
        if y.ndim not in (2, 3) or y.shape[-2:] != (N, I):
            raise ValueError(f"`x` must have shape (N, I) or (T, N, I) with N = {N} and I = {I}, got {y.shape}")
        if out is not None:
            symbols = "(N, O)" if y.ndim == 2 else "(T, N, O)"
            out = as_out(out, (*y.shape[:-1], features), self._model.dtype, symbols)
        with self._lock:
            for stage in self._stages[:-1]:
                y = stage(y)
            return self._stages[-1](y, out=out)

    @property
    def state(self) -> States:
        """A list with copies of `h` (L, N, P) and `c` (L, N, H) for an LSTM, None for a Linear; settable."""
        with self._lock:
            return [None if isinstance(stage, Linear) else stage.state for stage in self._stages]

    @state.setter
    def state(self, state: InitialStates | None) -> None:
        self._model._check_state(state, self._batch_size)
        with self._lock:
            for stage, entry in zip(self._stages, state or [None] * len(self._stages), strict=True):
                if not isinstance(stage, Linear):
                    stage.state = entry

    def reset(self, rows: ArrayLike | None = None) -> None:
        """Zero the state.

        Parameters
        ----------
        rows : array_like of bool (N,), or of int, optional
            Which rows: a mask, or indices. None is all of them.

        Raises
        ------
        TypeError
            If `rows` is neither booleans nor integers.
        ValueError
            If a mask has another shape than (N,), or an index is out of range.
        """
        with self._lock:
            for stage in self._stages:
                if not isinstance(stage, Linear):
                    stage.reset(rows)

    def __repr__(self) -> str:
        return f"{self._model!r}.stream({self._batch_size})"

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "batch_size": self._batch_size, "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
