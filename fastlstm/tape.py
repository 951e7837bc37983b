"""What a recorded call leaves behind: its results, and the way back to the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastlstm import threads
from fastlstm.checks import AS_IT_IS, as_array, is_ready
from fastlstm.kernels.region import Run, run_one, run_together
from fastlstm.kernels.training import EVERY_ROW, Direction, Rows, Way, Weights
from fastlstm.memory import Lent, Own, empty, keep, maker

if TYPE_CHECKING:
    from fastlstm.lstm import LSTM, Call

__all__ = ["Gradients", "Tape"]

Array = NDArray[Any]
Pair = tuple[Array | None, Array | None]


KEPT_CALLS = 8  # their shapes and numbers of threads
_nothing: Array = np.empty((0, 0, 0))  # in place of an input that is made again


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

    __slots__ = "__weakref__", "_backward", "output", "state"

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


@dataclass(slots=True, eq=False)
class _Steps:
    """Consecutive steps of one direction: what they were given and gave, for the backward."""

    first: int
    last: int  # the one behind them
    x: Array  # (T, N, I)
    out: Array  # (T, N, P)
    state: Pair  # (N, P), (N, H), before them in the direction's own order
    rows: Rows
    way: Way
    room: Lent | Own | None  # for what is saved; None: to be computed again
    cut: Array | None  # (N,) bool, where the state does not cross to these steps from those before


class _Recording:
    """A recorded call of an LSTM.

    Layers are computed one by one over all steps, their two directions side by side.  What is kept of a unit and
    step is its output and, but for checkpoints, five numbers more.
    """

    def __init__(
        self, lstm: LSTM, weights: list[Weights], call: Call, rng: Any, every: int | None, owned: bool
    ) -> None:
        self.lstm, self.every = lstm, every
        given, self.T, self.N, state, self.order, lengths, reset, self.batched = call
        self.x_shape = given.shape
        L, D, H, P, dtype = lstm.num_layers, lstm._directions, lstm.hidden_size, lstm._output_size, lstm.dtype
        self.weights = [weights[first : first + D] for first in range(0, L * D, D)]  # of each layer
        self.lengths = self.reset = None
        if lengths is not None:
            self.lengths = np.empty_like(lengths)
            self.lengths[self.order] = lengths
        if reset is not None:
            self.reset = np.array(reset)
        self.h_n, self.c_n = np.empty((L * D, self.N, P), dtype), np.empty((L * D, self.N, H), dtype)
        self.layers: list[list[list[_Steps]]] = []  # of each layer, each direction
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
            for d, one in enumerate(layer):
                index = k * D + d
                initial = h_0 if h_0 is None else h_0[index], c_0 if c_0 is None else c_0[index]
                final = self.h_n[index], self.c_n[index]
                to = y if D == 1 else y[:, :, d * P : (d + 1) * P]
                passes.append(self._forward(one, x, to, initial, final, self.layers[k][d]))
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
        self, weights: Weights, x: Array, y: Array, initial: Pair, final: tuple[Array, Array], segments: list[_Steps]
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
            way = direction.way(x_part, y_part, lengths, threads.get_num_threads())
            rows = Rows.of(last - first, self.order, lengths, part, way)
            room = direction.room(self.T, self.N) if whole else None
            steps = _Steps(first, last, x_part, y_part, state, rows, way, room, cut)
            after = final if last == cuts[-1][1] else (np.empty_like(final[0]), np.empty_like(final[1]))
            saved = None if room is None else room.array
            yield [direction.forward(weights, way, rows, x_part, y_part, state, after, saved)]
            state = after
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
            # A d_x for each direction: they run side by side, and what is added must not depend on who is first.
            each = [empty(shape, lstm.dtype) for _ in range(D)]
            of_x = each if k else [self._time_major(d_x) for d_x in each]
            x = self._drop(self.between[k - 1], k - 1) if k and self.masks else None
            passes = []
            for d, weights in enumerate(self.weights[k]):
                index = k * D + d
                d_w |= (of_w := {name: make() for name, make in weights.direction.makers})
                part = d_out if d_out is None or D == 1 else d_out[:, :, d * P : (d + 1) * P]
                final = None if d_h_n is None else d_h_n[index], None if d_c_n is None else d_c_n[index]
                initial = d_h_0[index], d_c_0[index]
                passes.append(self._backward(weights, self.layers[k][d], x, part, final, initial, of_x[d], of_w))
            _run_side_by_side(passes)
            d_x, d_out = each[0], of_x[0]
            for other in of_x[1:]:
                d_out += other
            if k and lstm.dropout:
                d_out = self._drop(d_out, k - 1)
        state = (d_h_0, d_c_0) if self.batched else (d_h_0[:, 0], d_c_0[:, 0])
        return Gradients(d_x, state, d_w if len(self.weights) == 1 else {name: d_w[name] for name in lstm._params})

    def _backward(
        self, weights: Weights, segments: list[_Steps], x: Array | None, d_out: Array | None,
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
            room = steps.room
            if room is None:
                room, again = direction.forward_again(weights, steps.way, steps.rows, x_part, steps.out, steps.state)
                yield again
            part = None if d_out is None else d_out[first:last]
            add_w = steps is not segments[-1]
            yield [
                direction.backward(
                    weights, steps.way, steps.rows, x_part, steps.out, steps.state, room.array,
                    part, d_state, d_initial, d_x[first:last], d_w, second, add_w, half,
                )
                for half in range(1 + steps.way.halved)
            ]  # fmt: skip
            del room  # so that its memory serves the next segment
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


class _Alike:
    """How calls of one size are recorded where directions are single, and all rows and steps are alike.

    A training step of a small model is mostly Python: what does not change from call to call is found once.
    """

    def __init__(self, lstm: LSTM, directions: list[Direction], call: Call, count: int) -> None:
        """`count`: threads."""
        given, self.T, self.N, *_, batched = call
        dtype, P, self.L = lstm.dtype, lstm._output_size, len(directions)
        rows = (self.N,) if batched else ()
        self.x_shape, self.output_shape = given.shape, (*given.shape[:-1], P)
        self.h_shape, self.c_shape = (self.L, *rows, P), (self.L, *rows, lstm.hidden_size)
        self.dtype, self.batched = dtype, batched
        self.new_x, self.new_output = maker(self.x_shape, dtype), maker(self.output_shape, dtype)
        self.new_h, self.new_c = maker(self.h_shape, dtype), maker(self.c_shape, dtype)
        self.new_y = maker((self.T, self.N, P), dtype)  # between layers
        x, self.ways = _time_major(lstm, given, batched), []
        for k, direction in enumerate(directions):
            out = _time_major(lstm, self.new_output(), batched) if k == self.L - 1 else self.new_y()
            self.ways.append((direction, direction.way(x, out, None, count)))
            x = out

    def fits(self, pair: object) -> TypeGuard[tuple[Array, Array]]:
        """Return whether this is a state, or a gradient of one, that needs no look at its parts."""
        if type(pair) is not tuple or len(pair) != 2:
            return False
        h, c = pair
        dtype = self.dtype
        return (
            type(h) is np.ndarray
            and type(c) is np.ndarray
            and h.shape == self.h_shape
            and c.shape == self.c_shape
            and h.dtype == dtype
            and c.dtype == dtype
            and h.flags.num & c.flags.num & AS_IT_IS == AS_IT_IS
        )

    def record(self, lstm: LSTM, x: Array, h_0: Array | None, c_0: Array | None, owned: bool) -> Tape:
        """Record a call with arrays as the user laid them out; `owned`: nobody else writes to x."""
        layers, L = lstm._training_weights(), self.L
        if not owned:
            x = x.copy()
        if h_0 is not None and c_0 is not None:
            h_0, c_0 = h_0.copy(), c_0.copy()
        output, h_n, c_n = self.new_output(), self.new_h(), self.new_c()
        states, finals = [(h_0, c_0)], [(h_n, c_n)]
        if L > 1:
            states, finals = _by_layer(h_0, c_0, L), _by_layer(h_n, c_n, L)
        y, recorded = x, []
        for k, (direction, way) in enumerate(self.ways):
            weights, room = layers[k], direction.room(self.T, self.N)
            given, y = y, output if k == L - 1 else self.new_y()
            run_one(direction.forward(weights, way, EVERY_ROW, given, y, states[k], finals[k], room.array))
            recorded.append((weights, given, y, room))

        def backward(d_output: object, d_state: object) -> Gradients:
            d_y = _check_d_output(lstm, d_output, self.output_shape)
            d_final = d_state
            if not self.fits(d_final):
                d_final = lstm._check_state(d_state, self.N, self.batched, "d_state", ("d_h_n", "d_c_n"))
            d_h_0, d_c_0 = d_initial = self.new_h(), self.new_c()
            d_finals, d_initials = [d_final], [d_initial]
            if L > 1:
                d_finals, d_initials = _by_layer(*d_final, L), _by_layer(d_h_0, d_c_0, L)
            d_w: dict[str, Array] = {}
            for k in range(L - 1, -1, -1):
                (weights, given, y, room), (direction, way) = recorded[k], self.ways[k]
                for name, make in direction.makers:
                    d_w[name] = make()
                d_x = self.new_y() if k else self.new_x()
                second = direction.second() if way.halved else None
                arguments = (
                    weights, way, EVERY_ROW, given, y, states[k], room.array,
                    d_y, d_finals[k], d_initials[k], d_x, d_w, second,
                )  # fmt: skip
                if second is None:
                    run_one(direction.backward(*arguments))
                else:
                    run_together([direction.backward(*arguments, half=half) for half in range(2)])
                    direction.add_second(d_w, second)
                d_y = d_x
            return Gradients(d_x, d_initial, d_w if L == 1 else {name: d_w[name] for name in lstm._params})

        return Tape(output, (h_n, c_n), backward)


def _by_layer(h: Array | None, c: Array | None, L: int) -> list[Any]:
    """Return the pair of each layer of arrays (L, ...), of which either may be None."""
    return [(None if h is None else h[k], None if c is None else c[k]) for k in range(L)]


def record_again(lstm: LSTM, x: object, state: object, owned: bool = False) -> Tape | None:
    """Record a call that is like one before it; None if it is not, or has to be looked at more closely."""
    calls = lstm._made.get("alike")
    if calls is None or type(x) is not np.ndarray:
        return None
    alike: _Alike | None = calls.get((x.shape, threads.get_num_threads()))
    if alike is None or not is_ready(x, alike.dtype):
        return None
    h_0 = c_0 = None
    if state is not None:
        if not alike.fits(state):
            return None
        h_0, c_0 = state
    return alike.record(lstm, x, h_0, c_0, owned)


def record_lstm(lstm: LSTM, call: Call, rng: Any, every: int | None, owned: bool) -> Tape:
    """Record a call of an LSTM; `owned`: nobody else writes to `call.x`."""
    weights: list[Weights] = lstm._training_weights()
    alike = every is None and call.order is None and call.reset is None and call.T * call.N > 0
    if alike and not lstm.bidirectional and not (lstm.dropout and lstm.num_layers > 1):
        calls = lstm._made.setdefault("alike", {})  # none where directions are two, or outputs dropped between layers
        key = call.x.shape, (count := threads.get_num_threads())
        found: _Alike | None = calls.get(key)
        if found is None:
            found = _Alike(lstm, [one.direction for one in weights], call, count)
            keep(calls, key, found, KEPT_CALLS)
        h_0, c_0 = call.state
        return found.record(lstm, call.x, h_0, c_0, owned)
    recording = _Recording(lstm, weights, call, rng, every, owned)
    h_n, c_n = recording.h_n, recording.c_n
    state = (h_n, c_n) if call.batched else (h_n[:, 0], c_n[:, 0])
    return Tape(recording.output, state, recording.backward)
