"""What a recorded call leaves behind: its results, and the way back to the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastlstm.checks import as_array
from fastlstm.kernels.region import Run, run_one, run_together
from fastlstm.kernels.training import EVERY_ROW, Direction, Rows, Steps, Weights
from fastlstm.memory import empty

if TYPE_CHECKING:
    from fastlstm.lstm import LSTM, Call

__all__ = ["Gradients", "Tape"]

Array = NDArray[Any]
Pair = tuple[Array | None, Array | None]


_nothing: Array = np.empty((0, 0, 0))


class Gradients(NamedTuple):
    """Gradients of a scalar with respect to what a recorded call was given."""

    x: Array
    """As `x` was laid out: (T, N, I), (N, T, I) or (T, I); zero past the length of a row."""
    state: Any
    """Of an LSTM `(d_h_0, d_c_0)`, shaped as the state; of a Linear None; of a Sequential a list of these."""
    params: dict[str, Array]
    """A gradient for each weight, named and shaped as in `state_dict`."""


class Tape:
    """A recorded call; made by `record` of an LSTM, a Linear or a Sequential.

    It answers for the weights and the input that the call was made with, whatever becomes of the layer since. The
    output belongs to the tape and is read-only.

    Attributes
    ----------
    output : ndarray
        As the layer itself returns it; with dropout between layers, where the layer has any.
    state : (h_n, c_n) of an LSTM, None of a Linear, a list of these of a Sequential
        As the layer itself returns it.
    """

    def __init__(self, output: Array, state: Any, backward: Callable[[Any, Any], Gradients]) -> None:
        output.setflags(write=False)  # in a third of the time that `flags.writeable` takes
        self.output, self.state = output, state
        self._backward = backward

    def __copy__(self) -> Tape:
        return self

    def __deepcopy__(self, memo: object) -> Tape:  # nothing of it changes
        return self

    def __reduce__(self) -> str:
        raise TypeError("a tape cannot be pickled")

    def backward(self, d_output: ArrayLike | None, d_state: Any = None) -> Gradients:
        """Propagate the gradient of a scalar from the results to all that the call was given.

        Parameters
        ----------
        d_output : array_like, as `output`
            Gradient of the scalar with respect to the output. None is zeros. Not read past the length of a row.
        d_state : optional, as `state`
            Gradients with respect to `h_n` and `c_n`; the pair, or either of the two, may be None, which is zeros.

        Returns
        -------
        Gradients
            `x`, `state` and `params`, of the layer's dtype.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind or has a dtype that does not cast.
        ValueError
            If a shape is wrong.

        Notes
        -----
        Backpropagation through time over all steps; `fastlstm.reference` has the equations. It may be called more than
        once and changes nothing. The gradients have the same bits whatever the number of threads, and whether or not
        `checkpoint_every` was given.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM
        >>> lstm = LSTM(3, 5, rng=0)
        >>> tape = lstm.record(np.ones((4, 2, 3), np.float32))
        >>> gradients = tape.backward(np.ones_like(tape.output))
        >>> gradients.x.shape, gradients.params["weight_hh_l0"].shape
        ((4, 2, 3), (20, 5))
        """
        return self._backward(d_output, d_state)


def _time_major(lstm: LSTM, array: Array, batched: bool) -> Array:
    """Return a view (T, N, ...) of an array that is laid out as the user's."""
    view: Array = array if batched else array[:, None]
    return view.swapaxes(0, 1) if batched and lstm.batch_first else view


class _Recording:
    """A recorded call of an LSTM.

    Layers are computed one by one over all steps, their two directions side by side.  What is kept of a unit and
    step is its output and, but for checkpoints, five numbers more.
    """

    def __init__(
        self, lstm: LSTM, layers: list[list[Weights]], call: Call, rng: Any, every: int | None, owned: bool
    ) -> None:
        self.lstm, self.weights, self.every = lstm, layers, every
        given, self.T, self.N, state, self.order, lengths, reset, self.batched = call
        self.x_shape = given.shape
        L, D, H, P, dtype = lstm.num_layers, lstm._directions, lstm.hidden_size, lstm._output_size, lstm.dtype
        self.lengths = self.reset = None
        if lengths is not None:
            self.lengths = np.empty_like(lengths)
            self.lengths[self.order] = lengths
        if reset is not None:
            self.reset = np.array(reset)
        self.h_n, self.c_n = np.empty((L * D, self.N, P), dtype), np.empty((L * D, self.N, H), dtype)
        self.layers: list[list[list[Steps]]] = []  # of each layer, each direction
        self.between: list[Array] = []  # outputs of all layers but the last
        self.masks: list[Array] = []  # of these
        self.keep = 1 - lstm.dropout
        h_0, c_0 = state
        h_0, c_0 = None if h_0 is None else h_0.copy(), None if c_0 is None else c_0.copy()
        x = self._time_major(given if owned else given.copy())
        for k, layer in enumerate(self.weights):
            last = k == L - 1
            output = empty((*self.x_shape[:-1], D * P) if last else (self.T, self.N, D * P), dtype)
            y = self._time_major(output) if last else output
            passes = []
            self.layers.append([[] for _ in layer])
            for d, weights in enumerate(layer):
                index = k * D + d
                initial = h_0 if h_0 is None else h_0[index], c_0 if c_0 is None else c_0[index]
                final = self.h_n[index], self.c_n[index]
                to = y if D == 1 else y[:, :, d * P : (d + 1) * P]
                passes.append(self._forward(weights, x, to, initial, final, self.layers[k][d]))
            _run_side_by_side(passes)
            if not last:
                x = y
                self.between.append(y)
                if lstm.dropout:
                    self.masks.append(rng.random(y.shape, np.float32) < self.keep)
                    x = self._drop(y, k)
        self.output = output

    def _time_major(self, array: Array) -> Array:
        return _time_major(self.lstm, array, self.batched)

    def _drop(self, y: Array, k: int) -> Array:
        """Return the outputs of layer k, or their gradient, as dropout leaves them."""
        dropped: Array = y * (self.masks[k] * y.dtype.type(1 / self.keep if self.keep else 0))
        return dropped

    def _cuts(self, direction: Direction) -> list[tuple[int, int]]:
        """Return the first and last step of each segment, in the direction's own order."""
        T = self.T
        if self.every is None:
            return [(0, T)]
        chunk = direction.chunk_steps(self.N, self.lengths is None)
        length = -(-self.every // chunk) * chunk  # whole chunks, so that the sums are the same as without checkpoints
        cuts = [(first, min(first + length, T)) for first in range(0, T, length)]
        return [(T - last, T - first) for first, last in cuts] if direction.reverse else cuts

    def _forward(
        self, weights: Weights, x: Array, y: Array, initial: Pair, final: tuple[Array, Array], segments: list[Steps]
    ) -> Iterator[list[Run]]:
        """Run one direction of one layer, segment by segment; they are added to `segments`."""
        direction = weights.direction
        if self.T == 0 or self.N == 0:
            for to, start in zip(final, initial, strict=True):
                to[...] = 0 if start is None else start
            return
        state: Pair = initial
        cuts = self._cuts(direction)
        whole = len(cuts) == 1
        for first, last in cuts:
            x_part, y_part = (x, y) if whole else (x[first:last], y[first:last])
            lengths = cut = part = None
            if self.lengths is not None:
                lengths = np.clip(self.lengths - first, 0, last - first)
            if self.reset is not None:
                part = self.reset[first:last]
                if direction.reverse and last < self.T and state[0] is not None:
                    cut = self.reset[last] if self.lengths is None else self.reset[last] & (last < self.lengths)
                    state[0][cut], state[1][cut] = 0, 0  # type: ignore[index]
            way = direction.way(x_part, y_part, lengths)
            rows = Rows.of(last - first, self.order, lengths, part, way)
            saved = direction.room(self.T, self.N) if whole else None
            steps = Steps(first, last, x_part, y_part, state, rows, way, saved, cut)
            state = final if last == cuts[-1][1] else (np.empty_like(final[0]), np.empty_like(final[1]))
            yield [direction.forward(weights, steps, state)]
            if self.masks:  # the input is that of before with its mask, and will be again
                steps.x = _nothing
            segments.append(steps)

    def backward(self, d_output: object, d_state: object) -> Gradients:
        """Return the gradients; arguments as the user gave them."""
        lstm = self.lstm
        d_out = _check_d_output(lstm, d_output, self.output.shape)
        if d_out is not None:
            d_out = self._time_major(d_out)
        d_h_n, d_c_n = lstm._check_state(d_state, self.N, self.batched, "d_state", ("d_h_n", "d_c_n"))
        D, P = lstm._directions, lstm._output_size
        d_h_0, d_c_0 = np.empty(self.h_n.shape, lstm.dtype), np.empty(self.c_n.shape, lstm.dtype)
        d_w: dict[str, Array] = {}
        for k in reversed(range(lstm.num_layers)):
            shape = (self.T, self.N, self.weights[k][0].direction.I) if k else self.x_shape
            d_x = empty(shape, lstm.dtype)
            to = d_x if k else self._time_major(d_x)
            x = self._drop(self.between[k - 1], k - 1) if k and self.masks else None
            # A d_x for each direction: they run side by side, and what is added must not depend on who is first.
            passes, of_x = [], [to, *(empty(to.shape, to.dtype) for _ in range(1, D))]
            for d, weights in enumerate(self.weights[k]):
                index = k * D + d
                d_w |= (of_w := {name: make() for name, make in weights.direction.makers})
                part = d_out if d_out is None or D == 1 else d_out[:, :, d * P : (d + 1) * P]
                final = None if d_h_n is None else d_h_n[index], None if d_c_n is None else d_c_n[index]
                initial = d_h_0[index], d_c_0[index]
                passes.append(self._backward(weights, self.layers[k][d], x, part, final, initial, of_x[d], of_w))
            _run_side_by_side(passes)
            for other in of_x[1:]:
                to += other
            d_out = to
            if k and lstm.dropout:
                d_out = self._drop(to, k - 1)
        state = (d_h_0, d_c_0) if self.batched else (d_h_0[:, 0], d_c_0[:, 0])
        return Gradients(d_x, state, d_w if len(self.weights) == 1 else {name: d_w[name] for name in lstm._params})

    def _backward(
        self, weights: Weights, segments: list[Steps], x: Array | None, d_out: Array | None,
        d_state: Pair, d_initial: tuple[Array, Array], d_x: Array, d_w: dict[str, Array],
    ) -> Iterator[list[Run]]:  # fmt: skip
        """Take one direction of one layer backward, segment by segment against its own order.

        x : what the steps were given, where they have not kept it.
        """
        direction = weights.direction
        if not segments:
            for array in (*d_w.values(), d_x):
                array[...] = 0
            for to, end in zip(d_initial, d_state, strict=True):
                to[...] = 0 if end is None else end
        second = direction.second() if segments and segments[0].way.halved else None
        for steps in reversed(segments):
            first, last = steps.first, steps.last
            x_part = steps.x if x is None else x[first:last]
            saved = steps.saved
            if saved is None:
                saved, again = direction.forward_again(weights, steps, x_part)
                yield again
            part = None if d_out is None else d_out[first:last]
            add_w = steps is not segments[-1]
            yield direction.backward(
                weights, steps, x_part, saved, part, d_state, d_initial, d_x[first:last], d_w, second, add_w
            )
            del saved  # so that its memory serves the next segment
            if steps.cut is not None:
                d_initial[0][steps.cut], d_initial[1][steps.cut] = 0, 0
            if steps is not segments[0]:
                d_state = d_initial[0].copy(), d_initial[1].copy()
        if second is not None:
            direction.add_second(d_w, second)


def _run_side_by_side(passes: list[Iterator[list[Run]]]) -> None:
    """Take the directions of a layer through their segments."""
    for together in zip(*passes, strict=True):
        run_together([run for runs in together for run in runs])
        for runs in together:
            runs.clear()  # what they hold makes room for the next segment's


def _check_d_output(lstm: LSTM, d_output: object, shape: tuple[int, ...]) -> Array | None:
    """Return the gradient of an output of that shape."""
    if d_output is None:
        return None
    array = as_array("d_output", d_output, lstm.dtype)
    if array.shape != shape:
        symbols = lstm._symbols("D*P", len(shape) == 3)
        raise ValueError(f"`d_output` must have shape {symbols} = {shape}, got {array.shape}")
    return array


def _by_layer(h: Array | None, c: Array | None, L: int) -> list[Any]:
    """Return the pair of each layer of arrays (L, ...), of which either may be None."""
    return [(None if h is None else h[k], None if c is None else c[k]) for k in range(L)]


def _record_alike(lstm: LSTM, layers: list[list[Weights]], call: Call, owned: bool) -> Tape:
    """Record a call of single directions with all rows and steps alike: as `_Recording`, without its loops.

    A training step of a small model is mostly Python; this makes a sixth less of it.
    """
    given, T, N, (h_0, c_0), _, _, _, batched = call
    dtype, P, L = lstm.dtype, lstm._output_size, len(layers)
    if not owned:
        given = given.copy()
    if h_0 is not None and c_0 is not None:
        h_0, c_0 = h_0.copy(), c_0.copy()
    shape = given.shape
    output = empty((*shape[:-1], P), dtype)
    h_n, c_n = np.empty((L, N, P), dtype), np.empty((L, N, lstm.hidden_size), dtype)
    as_it_is = batched and not lstm.batch_first
    x = given if as_it_is else _time_major(lstm, given, batched)
    recorded: list[tuple[Weights, Steps, Any]] = []
    states, finals = ([(h_0, c_0)], [(h_n, c_n)]) if L == 1 else (_by_layer(h_0, c_0, L), _by_layer(h_n, c_n, L))
    for k, (weights,) in enumerate(layers):
        direction = weights.direction
        y = output if as_it_is else _time_major(lstm, output, batched)
        if k < L - 1:
            y = empty((T, N, P), dtype)
        saved = direction.room(T, N)
        steps = Steps(0, T, x, y, states[k], EVERY_ROW, direction.way(x, y, None), saved)
        run_one(direction.forward(weights, steps, finals[k]))
        recorded.append((weights, steps, saved))
        x = y

    def backward(d_output: object, d_state: object) -> Gradients:
        d_out = _check_d_output(lstm, d_output, output.shape)
        if d_out is not None and not as_it_is:
            d_out = _time_major(lstm, d_out, batched)
        d_h_n, d_c_n = lstm._check_state(d_state, N, batched, "d_state", ("d_h_n", "d_c_n"))
        d_h_0, d_c_0, d_x = np.empty(h_n.shape, dtype), np.empty(c_n.shape, dtype), empty(shape, dtype)
        finals, initials = [(d_h_n, d_c_n)], [(d_h_0, d_c_0)]
        if L > 1:
            finals, initials = _by_layer(d_h_n, d_c_n, L), _by_layer(d_h_0, d_c_0, L)
        d_w: dict[str, Array] = {}
        for k in range(L - 1, -1, -1):
            weights, steps, saved = recorded[k]
            direction, x = weights.direction, steps.x
            for name, make in direction.makers:
                d_w[name] = make()
            to = d_x if as_it_is else _time_major(lstm, d_x, batched)
            if k:
                to = empty(x.shape, dtype)
            second = direction.second() if steps.way.halved else None
            run_together(direction.backward(weights, steps, x, saved, d_out, finals[k], initials[k], to, d_w, second))
            if second is not None:
                direction.add_second(d_w, second)
            d_out = to
        state = (d_h_0, d_c_0) if batched else (d_h_0[:, 0], d_c_0[:, 0])
        return Gradients(d_x, state, d_w if L == 1 else {name: d_w[name] for name in lstm._params})

    return Tape(output, (h_n, c_n) if batched else (h_n[:, 0], c_n[:, 0]), backward)


def record_lstm(lstm: LSTM, call: Call, rng: Any, every: int | None, owned: bool) -> Tape:
    """Record a call of an LSTM; `owned`: nobody else writes to `call.x`."""
    weights: list[list[Weights]] = lstm._training_weights()
    alike = every is None and call.order is None and call.reset is None and call.T * call.N > 0
    if alike and not lstm.bidirectional and not (lstm.dropout and lstm.num_layers > 1):
        return _record_alike(lstm, weights, call, owned)
    recording = _Recording(lstm, weights, call, rng, every, owned)
    h_n, c_n = recording.h_n, recording.c_n
    state = (h_n, c_n) if call.batched else (h_n[:, 0], c_n[:, 0])
    return Tape(recording.output, state, recording.backward)
