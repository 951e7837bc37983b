"""The layer: it checks, allocates, and calls the kernels."""

from __future__ import annotations

import math
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastlstm.checks import (
    as_array,
    as_bools,
    as_generator,
    as_indices,
    as_interval,
    as_number,
    as_out,
    as_size,
    check_flag,
    check_shape,
    is_ready,
    to_numpy,
)
from fastlstm.memory import empty
from fastlstm.parameters import Layer, Setting
from fastlstm.threads import load

if TYPE_CHECKING:
    import torch

    from fastlstm.kernels.network import Network
    from fastlstm.kernels.training import Weights
    from fastlstm.memory import Lent
    from fastlstm.tape import Tape

__all__ = ["LSTM", "Call", "SequenceModel", "Stream"]

Array = NDArray[Any]
State = tuple[Array, Array]


class Call(NamedTuple):
    """The checked arguments of one call: time-major sizes, and arrays as the user laid them out."""

    x: Array
    T: int
    N: int
    state: Any
    order: Array | None  # rows by falling length
    lengths: Array | None  # in that order
    reset: Array | None  # (T, N)
    batched: bool


class SequenceModel(ABC):
    """What is called on a batch of sequences: how the arguments are checked."""

    input_size: int
    batch_first: bool
    dtype: np.dtype[Any]

    @abstractmethod
    def _check_state(self, state: object, N: int, batched: bool = True) -> Any: ...

    def _symbols(self, last: str, batched: bool = True) -> str:
        if not batched:
            return f"(T, {last})"
        return f"(N, T, {last})" if self.batch_first else f"(T, N, {last})"

    def _check_call(self, x: object, state: object, lengths: object, reset: object) -> Call:
        """Check the arguments of a call."""
        array = as_array("x", x, self.dtype)
        shape = array.shape
        batched = len(shape) == 3
        if not (batched or len(shape) == 2) or shape[-1] != self.input_size:
            raise ValueError(
                f"`x` must have shape {self._symbols('I')} with I = {self.input_size}, got {shape}"
                + (", or (T, I) unbatched" if array.ndim not in (2, 3) else "")
            )
        T, N = shape[:2] if batched else (shape[0], 1)
        if self.batch_first and batched:
            T, N = N, T
        order = sorted_lengths = None
        if lengths is not None:
            order, sorted_lengths = _check_lengths(lengths, T, N, batched)
        if reset is not None:
            reset = as_bools("reset", reset)
            symbols = ("(N, T)" if self.batch_first else "(T, N)") if batched else "(T,)"
            if reset.shape != array.shape[:-1]:
                raise ValueError(f"`reset` must have shape {symbols} = {array.shape[:-1]}, got {reset.shape}")
            reset = reset.reshape(T, 1) if not batched else reset.T if self.batch_first else reset
        initial = self._check_state(state, N, batched)
        return Call(array, T, N, initial, order, sorted_lengths, reset, batched)


class LSTM(Layer, SequenceModel):
    """Long short-term memory, one or more layers, with the arguments and weights of `torch.nn.LSTM`.

    Parameters
    ----------
    input_size : int
        I, numbers in a step of the input.
    hidden_size : int
        H, cells in a layer.
    num_layers : int, default 1
        L; each layer reads the output of the one before.
    bias : bool, default True
        Whether there are `bias_ih` and `bias_hh`.
    batch_first : bool, default False
        Whether `x`, `reset` and the output are laid out (N, T, ...) instead of (T, N, ...).
    dropout : float, default 0.0
        Probability of dropping an output between layers. Used in training alone.
    bidirectional : bool, default False
        Whether a second direction runs from the last step to the first: D = 2.
    proj_size : int, default 0
        P, numbers in the output of a layer where it is projected; 0 is no projection, P = H.
    dtype : dtype, default float32
        float32 or float64; of weights, states and outputs.
    rng : int or numpy.random.Generator, optional
        Seed of the initial weights, uniform in +-1/sqrt(H).

    Raises
    ------
    TypeError, ValueError
        Where an argument is of the wrong kind or out of range.

    Notes
    -----
    ::

        z = x W_ih^T + b_ih + h W_hh^T + b_hh          four blocks: z_i z_f z_g z_o
        c' = sigmoid(z_f) * c + sigmoid(z_i) * tanh(z_g)
        h' = sigmoid(z_o) * tanh(c')                   (then h' W_hr^T where there is a projection)

    Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000; projection of Sak et al. 2014. The output of a row
    has the same bits whatever the batch size, its place in the batch, the other rows, the number of threads, and
    whether it is computed at once, in chunks or step by step. Calls from several Python threads at once are safe.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm import LSTM
    >>> lstm = LSTM(3, 5, num_layers=2, rng=0)
    >>> output, (h_n, c_n) = lstm(np.zeros((7, 2, 3), np.float32))
    >>> output.shape, h_n.shape, c_n.shape
    ((7, 2, 5), (2, 2, 5), (2, 2, 5))
    """

    _SETTINGS: ClassVar[dict[str, Setting]] = {
        "input_size": (as_size, ...),
        "hidden_size": (as_size, ...),
        "num_layers": (partial(as_size, most=1 << 12), 1),
        "bias": (check_flag, True),
        "batch_first": (check_flag, False),
        "dropout": (partial(as_number, interval="[0, 1]"), 0.0),
        "bidirectional": (check_flag, False),
        "proj_size": (partial(as_size, least=0), 0),
    }

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    dtype: np.dtype[Any]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        dtype: DTypeLike = np.float32,
        rng: int | np.random.Generator | None = None,
    ) -> None:
        self._configure(
            dtype,
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
        )
        self._randomise(1 / math.sqrt(self.hidden_size), rng)

    def _configure(self, dtype: object, **settings: object) -> None:
        super()._configure(dtype, **settings)
        if self.proj_size >= self.hidden_size:
            raise ValueError(f"`proj_size` must be less than `hidden_size` = {self.hidden_size}, got {self.proj_size}")

    # Weights

    @cached_property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @cached_property
    def _output_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def _ends(self) -> tuple[int, int]:
        return self.input_size, self._directions * self._output_size

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        D, H, P = self._directions, self.hidden_size, self._output_size
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, names in enumerate(self._suffixes()):
            I = self.input_size if layer == 0 else D * P
            for name in names:
                shapes |= {"weight_ih" + name: (4 * H, I), "weight_hh" + name: (4 * H, P)}
                if self.bias:
                    shapes |= {"bias_ih" + name: (4 * H,), "bias_hh" + name: (4 * H,)}
                if self.proj_size:
                    shapes["weight_hr" + name] = (P, H)
        return shapes

    def to_torch(self) -> torch.nn.LSTM:
        """Return a `torch.nn.LSTM` with copies of the weights. Needs PyTorch.

        Raises
        ------
        ImportError
            If PyTorch is not installed.
        """
        from fastlstm.io.pytorch import to_torch

        return to_torch(self)

    # Inference

    def _pack(self, params: Mapping[str, Array]) -> tuple[Network, Lent]:
        """Return how the layer runs forward, and its panels."""
        network = self._made.get("network")
        if network is None:
            kernels = load("fastlstm.kernels.network")
            sizes = kernels.Sizes(
                self.input_size, self.hidden_size, self._output_size, self.num_layers, self._directions
            )
            suffixes = [suffix for layer in self._suffixes() for suffix in layer]
            network = self._made["network"] = kernels.Network(sizes, self.dtype, suffixes)
        return network, network.pack(params)

    def _suffixes(self) -> list[list[str]]:
        """Return what the names of the weights end in, by layer and direction."""
        return [[f"_l{k}{suffix}" for suffix in ("", "_reverse")[: self._directions]] for k in range(self.num_layers)]

    def __call__(
        self,
        x: ArrayLike,
        state: tuple[ArrayLike, ArrayLike] | None = None,
        *,
        lengths: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        out: Array | None = None,
    ) -> tuple[Array, State]:
        """Run the layer over a batch of sequences, or over one.

        Parameters
        ----------
        x : array_like, (T, N, I); (N, T, I) if `batch_first`; (T, I) unbatched
            Anything `np.asarray` or DLPack takes, cast to the layer's dtype where NumPy's `same_kind` rule allows.
        state : pair of array_like, optional
            `h_0` (L*D, N, P) and `c_0` (L*D, N, H); without the N if unbatched. None is zeros. Never modified.
        lengths : array_like of int, (N,), optional
            Valid steps of each row, 0 to T in any order. Steps at and past it cost nothing and give zeros; the reverse
            direction starts at the last valid step.
        reset : array_like of bool, (T, N), laid out as `x`, optional
            True cuts the row between steps t-1 and t, in both directions: no state crosses.
        out : ndarray, as the output, optional
            Written in place and returned; C-contiguous and of the layer's dtype.

        Returns
        -------
        output : ndarray, (T, N, D*P); (N, T, D*P) if `batch_first`; (T, D*P) unbatched
            The last layer's outputs, both directions side by side.
        (h_n, c_n) : ndarray, (L*D, N, P) and (L*D, N, H); without the N if unbatched
            State of each row after its last valid step.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind: a dtype that does not cast, lengths that are not integers.
        ValueError
            If a shape or a value is wrong. Nothing has been computed or written then.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM
        >>> lstm = LSTM(3, 5, rng=0)
        >>> x = np.ones((4, 2, 3), np.float32)
        >>> output, (h_n, c_n) = lstm(x, lengths=[4, 2])
        >>> output[2:, 1].any(), bool((h_n[0, 1] == output[1, 1]).all())
        (np.False_, True)
        """
        return self._run(self._check_call(x, state, lengths, reset), out)

    def _run(self, call: Call, out: object) -> tuple[Array, State]:
        """Run the layer on checked arguments."""
        L, D, H, P = self.num_layers, self._directions, self.hidden_size, self._output_size
        T, N = call.T, call.N
        shape = (*call.x.shape[:-1], D * P)
        if out is None:
            output = empty(shape, self.dtype)
        else:
            output = as_out(out, shape, self.dtype, self._symbols("D*P", call.batched))
            call = _separate(call, output)
        h_n, c_n = np.empty((L * D, N, P), self.dtype), np.empty((L * D, N, H), self.dtype)
        if T == 0 or N == 0:
            for final, initial in zip((h_n, c_n), call.state, strict=True):
                final[...] = 0 if initial is None else initial
        else:
            i, o = self.input_size * self.dtype.itemsize, D * P * self.dtype.itemsize
            rows_apart = self.batch_first and call.batched
            strides = (i, T * i, o, T * o) if rows_apart else (N * i, i, N * o, o)
            network, panels = self._packed_weights()
            network.forward(
                panels, call.x, output, strides, T, N, call.state, (h_n, c_n), call.order, call.lengths, call.reset
            )
        return output, (h_n, c_n) if call.batched else (h_n[:, 0], c_n[:, 0])

    def record(
        self,
        x: ArrayLike,
        state: tuple[ArrayLike, ArrayLike] | None = None,
        *,
        lengths: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        rng: int | np.random.Generator | None = None,
        checkpoint_every: int | None = None,
    ) -> Tape:
        """Run the layer and keep what the gradients need.

        Parameters
        ----------
        x, state, lengths, reset
            As for a call of the layer. `x` is copied: it may change before `backward`.
        rng : int or numpy.random.Generator, optional
            Seed of the dropout between layers.
        checkpoint_every : int, optional
            Keep states every so many steps only (rounded up to a multiple that depends on the sizes) and compute the
            rest again in `backward`: a third more time, a sixth of the memory, the same bits. None keeps all: 6 numbers
            for each hidden unit and step, the output included.

        Returns
        -------
        Tape
            With `output`, `state` and `backward`.

        Raises
        ------
        TypeError, ValueError
            As a call of the layer does.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM
        >>> lstm = LSTM(3, 5, num_layers=2, dropout=0.1, rng=0)
        >>> tape = lstm.record(np.ones((4, 2, 3), np.float32), rng=1)
        >>> tape.output.shape
        (4, 2, 5)
        """
        if lengths is None and reset is None and rng is None and checkpoint_every is None:
            again: Tape | None = load("fastlstm.tape").record_again(self, x, state)
            if again is not None:
                return again
        return self._record(self._check_call(x, state, lengths, reset), rng, checkpoint_every)

    def _record(self, call: Call, rng: object, checkpoint_every: object, owned: bool = False) -> Tape:
        """Record a checked call; `owned`: nobody else writes to its `x`."""
        every = as_interval("checkpoint_every", checkpoint_every)
        random = as_generator(rng) if self.dropout or rng is not None else None
        tape: Tape = load("fastlstm.tape").record_lstm(self, call, random, every, owned)
        return tape

    def _pack_for_training(self, params: Mapping[str, Array]) -> list[Weights]:
        """Return the weights of each direction of each layer as training needs them."""
        kernels, directions = load("fastlstm.kernels.training"), self._made.get("directions")
        if directions is None:
            directions = self._made["directions"] = [
                kernels.Direction(params, suffix, d > 0, self._fixed, len(layer))
                for layer in self._suffixes()
                for d, suffix in enumerate(layer)
            ]
        return [kernels.Weights(one, params) for one in directions]

    def _check_state(
        self,
        state: object,
        N: int,
        batched: bool = True,
        argument: str = "state",
        names: tuple[str, str] = ("h_0", "c_0"),
    ) -> tuple[Array | None, Array | None]:
        """Return the two arrays of a state, or of its gradient, of which either may be None."""
        if state is None:
            return None, None
        if not isinstance(state, (tuple, list)):
            raise TypeError(f"`{argument}` must be a pair ({', '.join(names)}), got {type(state).__name__}")
        if len(state) != 2:
            raise ValueError(f"`{argument}` must be a pair ({', '.join(names)}), got {len(state)} arrays")
        count, P, H, dtype = self.num_layers * self._directions, self._output_size, self.hidden_size, self.dtype
        h, c = state
        ready = batched and is_ready(h, dtype) and is_ready(c, dtype)
        if ready and h.shape == (count, N, P) and c.shape == (count, N, H):  # in a third of the time
            return h, c
        checked: list[Array | None] = []
        for name, value, last, size in zip(names, state, "PH", (P, H), strict=True):
            if value is None and argument == "d_state":
                checked.append(None)
                continue
            array = as_array(f"{argument}: {name}", value, dtype)
            shape = (count, N, size) if batched else (count, size)
            if array.shape != shape:
                symbols = f"(L*D, N, {last})" if batched else f"(L*D, {last})"
                raise ValueError(f"`{argument}`: {name} must have shape {symbols} = {shape}, got {array.shape}")
            checked.append(array if batched else array.reshape(count, N, size))
        return checked[0], checked[1]

    # Streaming

    def stream(self, batch_size: int = 1, state: tuple[ArrayLike, ArrayLike] | None = None) -> Stream:
        """Return a stream: the layer with a state that it carries from call to call.

        Parameters
        ----------
        batch_size : int, default 1
            N, rows that run side by side.
        state : pair of array_like, optional
            `h` (L, N, P) and `c` (L, N, H) to start from. None is zeros.

        Returns
        -------
        Stream
            Call it with one step or a chunk.

        Raises
        ------
        ValueError
            If the layer is bidirectional, or the state has the wrong shape.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM
        >>> stream = LSTM(3, 5, rng=0).stream()
        >>> stream(np.ones((1, 3), np.float32)).shape
        (1, 5)
        """
        return Stream(self, batch_size, state)


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


def _after_fork() -> None:
    """Free the streams that other threads were using, which the child does not have."""
    for stream in _streams:
        stream._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Stream:
    """A layer with a state that it carries from call to call; made by `LSTM.stream`.

    Step by step, in chunks or the whole sequence in one call of the layer: the bits are the same. A stream computes
    with the layer's weights of the moment. Calls on one stream wait for each other.
    """

    def __init__(self, lstm: LSTM, batch_size: int = 1, state: tuple[ArrayLike, ArrayLike] | None = None) -> None:
        if lstm.bidirectional:
            raise ValueError("a bidirectional layer cannot stream: its reverse direction starts at the last step")
        self._lstm = lstm
        self._batch_size = as_size("batch_size", batch_size)
        self._lock = threading.Lock()
        _streams.add(self)
        self._start(*lstm._check_state(state, self._batch_size))

    def _start(self, h: Array | None, c: Array | None) -> None:
        """Begin with the layer's weights of the moment; an error leaves the stream as it was."""
        lstm, N = self._lstm, self._batch_size
        params = lstm._params
        network, panels = lstm._packed_weights()
        runner = network.stream(panels, N)
        runner.set_state(h, c)
        step: Callable[[Array, Array], Array] = runner.stepper()
        self._x_shape, self._y_shape, self._dtype = (N, lstm.input_size), (N, lstm._output_size), lstm.dtype
        self._runner, self._step, self._params = runner, step, params

    def __call__(self, x: ArrayLike, *, out: Array | None = None) -> Array:
        """Run one step or a chunk, and keep the state.

        Parameters
        ----------
        x : array_like, (N, I) or (T, N, I)
            One step, or T of them; time first whatever the layer's `batch_first`.
        out : ndarray, (N, P) or (T, N, P), optional
            Written in place and returned; C-contiguous and of the layer's dtype.

        Returns
        -------
        ndarray, (N, P) or (T, N, P)
            The last layer's outputs.

        Raises
        ------
        TypeError, ValueError
            As the layer does. The state is unchanged then.
        """
        with self._lock:
            if self._params is not self._lstm._params:
                self._start(*self._runner.state())
            if (
                out is None
                and type(x) is np.ndarray
                and x.shape == self._x_shape
                and x.dtype == self._dtype
                and x.flags.carray
            ):
                return self._step(x, np.empty(self._y_shape, self._dtype))
            return self._run(x, out)

    def _run(self, x: object, out: Array | None) -> Array:
        array = as_array("x", x, self._dtype)
        N, I = self._x_shape
        if array.ndim not in (2, 3) or array.shape[-2:] != (N, I):
            raise ValueError(f"`x` must have shape (N, I) or (T, N, I) with N = {N} and I = {I}, got {array.shape}")
        shape = (*array.shape[:-1], self._y_shape[1])
        if out is None:
            out = empty(shape, self._dtype)
        else:
            out = as_out(out, shape, self._dtype, "(N, P)" if array.ndim == 2 else "(T, N, P)")
            if np.may_share_memory(array, out):
                array = array.copy()
        if array.ndim == 2:
            return self._step(array, out)
        return self._runner.chunk(array, out, len(array)) if len(array) else out

    @property
    def state(self) -> State:
        """Copies of `h` (L, N, P) and `c` (L, N, H); settable."""
        with self._lock:
            h, c = self._runner.state()
        return h, c

    @state.setter
    def state(self, state: tuple[ArrayLike, ArrayLike] | None) -> None:
        checked = self._lstm._check_state(state, self._batch_size)
        with self._lock:
            self._runner.set_state(*checked)

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
        chosen: Any = slice(None)
        if rows is not None:
            array = to_numpy("rows", rows)
            if array.dtype == np.bool_:
                check_shape("rows", array, (self._batch_size,))
                chosen = array
            else:
                chosen = as_indices("rows", rows).reshape(-1)
                if chosen.size and not (-self._batch_size <= chosen.min() and chosen.max() < self._batch_size):
                    raise ValueError(f"`rows` must be from -N to N - 1 = {self._batch_size - 1}, got {rows}")
        with self._lock:
            h, c = self._runner.state()
            h[:, chosen] = 0
            c[:, chosen] = 0
            self._runner.set_state(h, c)

    def __repr__(self) -> str:
        return f"{self._lstm!r}.stream({self._batch_size})"

    def __getstate__(self) -> dict[str, Any]:
        return {"lstm": self._lstm, "batch_size": self._batch_size, "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _check_lengths(lengths: object, T: int, N: int, batched: bool) -> tuple[Array, Array]:
    """Return the rows by falling length, and those lengths."""
    array = as_indices("lengths", lengths)
    if not batched:
        array = array.reshape(-1) if array.ndim == 0 else array
    if array.shape != (N,):
        raise ValueError(f"`lengths` must have shape (N,) = ({N},), got {array.shape}")
    if N and not (array.min() >= 0 and array.max() <= T):
        wrong = array[(array < 0) | (array > T)][0]
        raise ValueError(f"`lengths` must be from 0 to T = {T}, got {wrong}")
    order = np.argsort(-array, kind="stable")
    return order, array[order]


def _separate(call: Call, out: Array) -> Call:
    """Return the call with copies of what shares memory with the output."""
    x = call.x.copy() if np.may_share_memory(call.x, out) else call.x
    h_0, c_0 = (a.copy() if a is not None and np.may_share_memory(a, out) else a for a in call.state)
    reset = call.reset.copy() if call.reset is not None and np.may_share_memory(call.reset, out) else call.reset
    return call._replace(x=x, state=(h_0, c_0), reset=reset)
