"""Any argument at all: what is wrong raises TypeError or ValueError that names it, what is right is computed."""

from __future__ import annotations

import datetime
import decimal
import fractions
import re
from typing import Any

import numpy as np
import pytest
from conftest import Case, assert_close, assert_same_bits, draw, run_python, tolerance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastlstm
from fastlstm import LSTM

CASE = Case(T=4, N=3, I=2, H=5, L=2, D=2, P=3)
PLAIN = Case(T=4, N=3, I=2, H=5, L=2)
many = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


# What somebody may pass

DTYPES = st.one_of(
    hnp.floating_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.boolean_dtypes(),
    hnp.complex_number_dtypes(), hnp.datetime64_dtypes(), hnp.timedelta64_dtypes(), hnp.byte_string_dtypes(max_len=3),
    hnp.unicode_string_dtypes(max_len=3), hnp.void_dtypes() if hasattr(hnp, "void_dtypes") else st.just(np.dtype("V3")),
    st.just(np.dtype("O")), st.just(np.dtype([("a", "f4")])), st.just(np.dtype([("a", "f4"), ("b", "i8")])),
    st.just(np.dtype(np.longdouble)),
)  # fmt: skip


class Odd(np.ndarray):
    """A subclass that counts as an array."""


class Hostile:
    """An object whose every conversion raises."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("no array\nof mine")

    def __index__(self) -> int:
        raise TypeError("no index")

    def __float__(self) -> float:
        raise ValueError("no float")

    def __len__(self) -> int:
        raise KeyError("no length")


class NotQuiteDlpack:
    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("no buffer")

    def __dlpack_device__(self) -> Any:
        return (2, 0)


@st.composite
def arrays(draw_from: st.DrawFn, shapes: Any) -> Any:
    """Draw an array of any dtype in one of the shapes, laid out in any way."""
    dtype, shape = draw_from(DTYPES), draw_from(shapes)
    with np.errstate(all="ignore"):
        array = np.zeros(shape, dtype)
    if dtype.kind in "fiu":
        array += draw_from(st.sampled_from([0, 1, 3]))
    return relaid(array, draw_from(LAYOUTS))


LAYOUTS = st.sampled_from(
    [
        "as is",
        "Fortran",
        "reversed",
        "strided",
        "unaligned",
        "read-only",
        "swapped",
        "masked",
        "subclass",
        "broadcast",
        "memory",
    ]
)


def relaid(array: Any, layout: str) -> Any:
    """Return an array of the same values that lies otherwise in memory, or in another class."""
    if layout == "Fortran":
        return np.asfortranarray(array)
    if layout == "reversed":
        return np.ascontiguousarray(array[(slice(None, None, -1),) * array.ndim])[(slice(None, None, -1),) * array.ndim]
    if layout == "strided":
        wide = np.repeat(np.repeat(array, 2, axis=0), 3, axis=-1) if array.ndim else array
        return (
            wide[(slice(None, None, 2), *[slice(None)] * (array.ndim - 2), slice(None, None, 3))]
            if array.ndim > 1
            else array
        )
    if layout == "unaligned" and not array.dtype.hasobject:
        memory = np.zeros(array.nbytes + 1, np.uint8)
        moved = memory[1:].view(array.dtype).reshape(array.shape) if array.nbytes else array
        moved[...] = array
        return moved
    if layout == "read-only":
        array = array.copy()
        array.flags.writeable = False
        return array
    if layout == "swapped":
        return array.astype(array.dtype.newbyteorder())
    if layout == "masked":
        return np.ma.masked_array(array)
    if layout == "subclass":
        return array.view(Odd)
    if layout == "memory" and array.dtype.kind in "fiub" and array.ndim:
        return memoryview(array)
    return array


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(max_size=5),
    st.binary(max_size=9), st.lists(st.floats(), max_size=3),
    st.lists(st.one_of(st.integers(), st.lists(st.integers(), max_size=2)), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2), st.tuples(), st.sets(st.integers(), max_size=2),
    st.sampled_from(
        [
            Hostile(), NotQuiteDlpack(), object(), ..., NotImplemented, int, np.float32, np.add, range(3), iter([1]),
            len, decimal.Decimal(1), fractions.Fraction(1, 2), datetime.date(2000, 1, 1), 2**63, -(2**63) - 1, 2**200,
            10**400, np.float32(np.nan), np.datetime64("NaT", "s"), np.ma.masked, np.rec.array([(1, 2.0)]),
            memoryview(b"abc"), bytearray(4), slice(3), Exception("x"), [None], [[None]], [[[]]], [Hostile()],
            [[1, 2], [3]], {"a": 1}.keys(), "é\0",
        ]
    ),
)  # fmt: skip


SIZE_JUNK = JUNK.filter(lambda value: not isinstance(value, int) or value < 10)  # what is too large comes below


def shapes_near(*shape: int) -> Any:
    """Draw the shape, or one that differs in an axis, the order or the number of axes."""
    sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7])
    swapped = st.permutations(shape).map(tuple)
    changed = st.tuples(*[st.one_of(st.just(size), sizes) for size in shape])
    return st.one_of(
        st.just(shape), swapped, changed, st.just(shape[1:]), st.just((*shape, 1)), st.just(()), st.just((0,))
    )


def odd_arguments(h_0: Any, c_0: Any) -> dict[str, Any]:
    """Return what is given, for each argument, to a layer of the sizes of `CASE` whose states these are."""
    return {
        "x": st.one_of(JUNK, arrays(shapes_near(4, 3, 2))),
        "state": st.one_of(
            JUNK,
            st.tuples(arrays(shapes_near(4, 3, 3)), arrays(shapes_near(4, 3, 5))),
            st.tuples(st.just(h_0), JUNK), st.tuples(JUNK, st.just(c_0)), st.lists(st.just(h_0), max_size=3),
        ),
        "lengths": st.one_of(JUNK, arrays(shapes_near(3)), st.lists(st.integers(-1, 5), min_size=3, max_size=3)),
        "reset": st.one_of(JUNK, arrays(shapes_near(4, 3))),
    }  # fmt: skip


def refused_or(call: Any, names: str) -> Any:
    """Return what the call gives, or None where it raises as it should: naming one of the arguments."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        message = str(error)
    assert re.search(rf"`(state: )?({names})\b", message), message
    assert "numba" not in message.lower()
    return None


# A call


@given(data=st.data())
@many
def test_any_argument_of_a_call(data: st.DataObject) -> None:
    problem = draw(CASE)
    layer, (h_0, c_0) = problem.layer, problem.state
    before = layer.state_dict()
    valid = {
        "x": problem.x, "state": problem.state, "lengths": np.array([4, 0, 2]), "reset": np.zeros((4, 3), bool),
        "out": np.full((4, 3, 6), np.nan, np.float32),
    }  # fmt: skip
    odd = odd_arguments(h_0, c_0) | {"out": st.one_of(JUNK, arrays(shapes_near(4, 3, 6)))}
    names = data.draw(st.lists(st.sampled_from(list(odd)), min_size=1, max_size=2, unique=True))
    arguments = valid | {name: data.draw(odd[name], name) for name in names}
    out = valid["out"]
    result = refused_or(lambda: layer(**arguments), "|".join([*valid, "h_0", "c_0"]))
    if result is None:
        assert np.isnan(out).all()
    else:
        assert result[0].dtype == np.float32
        if arguments["out"] is not None:
            np.testing.assert_array_equal(result[0], arguments["out"])
    np.testing.assert_equal(layer.state_dict(), before)


@given(data=st.data())
@many
def test_valid_arguments_however_they_lie_in_memory(data: st.DataObject) -> None:
    layouts = {name: data.draw(LAYOUTS, name) for name in ("x", "h_0", "c_0", "lengths", "reset")}
    dtypes = {
        name: data.draw(st.sampled_from(["f2", "f4", "f8", "i1", "u4", "i8", "?"]), name)
        for name in ("x", "h_0", "c_0")
    }
    length_dtype = data.draw(st.sampled_from(["i1", "u2", "i4", "u8", "i8"]))
    out_dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    case = Case(
        T=5, N=4, I=3, H=7, D=2, P=data.draw(st.sampled_from([0, 4])), lengths=True, reset=True, dtype=out_dtype
    )
    problem = draw(case)
    # Small integers, so that every dtype holds them.
    values = {"x": problem.x, "h_0": problem.state[0], "c_0": problem.state[1]}
    values = {name: np.clip(np.round(2 * value), 0, 9).astype(dtypes[name]) for name, value in values.items()}
    problem.x = values["x"].astype(out_dtype)
    problem.state = values["h_0"].astype(out_dtype), values["c_0"].astype(out_dtype)
    values |= {"lengths": problem.lengths.astype(length_dtype), "reset": problem.reset}
    given_ = {name: relaid(value, layouts[name]) for name, value in values.items()}
    kept = {name: np.array(value) for name, value in given_.items()}
    state = given_["h_0"], given_["c_0"]
    result = problem.layer(given_["x"], state, lengths=given_["lengths"], reset=given_["reset"])
    assert_same_bits(result, problem.call())
    assert_close(result, problem.exact(), tolerance(case))
    for name, value in given_.items():
        np.testing.assert_array_equal(np.asarray(value), kept[name])


# A stream


@given(data=st.data())
@many
def test_any_argument_of_a_stream(data: st.DataObject) -> None:
    problem = draw(PLAIN)
    stream = problem.layer.stream(3, problem.state)
    before = stream.state
    action = data.draw(st.sampled_from(["step", "out", "state", "reset", "batch_size", "stream state"]))
    if action == "step":
        x = data.draw(st.one_of(JUNK, arrays(shapes_near(3, 2)), arrays(shapes_near(4, 3, 2))))
        result = refused_or(lambda: stream(x), "x")
        if result is not None:
            return
    elif action == "out":
        out = data.draw(st.one_of(JUNK, arrays(shapes_near(3, 5))))
        if refused_or(lambda: stream(problem.x[0], out=out), "out") is not None:
            return
    elif action == "state":
        state = data.draw(st.one_of(JUNK, st.tuples(arrays(shapes_near(2, 3, 5)), arrays(shapes_near(2, 3, 5)))))
        if refused_or(lambda: setattr(stream, "state", state) or True, "state|h_0|c_0"):
            return
    elif action == "reset":
        rows = data.draw(st.one_of(JUNK, arrays(shapes_near(3)), st.lists(st.integers(-5, 5), max_size=3)))
        if refused_or(lambda: stream.reset(rows) or True, "rows"):
            return
    elif action == "batch_size":
        size = data.draw(st.one_of(SIZE_JUNK, st.integers(-5, 5)))
        made = refused_or(lambda: problem.layer.stream(size), "batch_size")
        assert made is None or made.state[0].shape == (2, int(size), 5)
    else:
        state = data.draw(st.one_of(JUNK, st.tuples(arrays(shapes_near(2, 3, 5)), arrays(shapes_near(2, 3, 5)))))
        refused_or(lambda: problem.layer.stream(3, state), "state|h_0|c_0")
    assert_same_bits(stream.state, before)
    assert_same_bits(stream(problem.x), problem.call()[0])


# Layers


@given(data=st.data())
@many
def test_any_argument_of_a_layer(data: st.DataObject) -> None:
    valid = {
        "input_size": 3, "hidden_size": 5, "num_layers": 2, "bias": True, "batch_first": False, "dropout": 0.5,
        "bidirectional": True, "proj_size": 2, "dtype": "f8", "rng": 3,
    }  # fmt: skip
    names = data.draw(st.lists(st.sampled_from(list(valid)), min_size=1, max_size=2, unique=True))
    odd_dtypes = [float, "f", ">f4", "<f8", "float", "nope", "01", "0:", [("a", 1)], (3,), {"names": 3}, "(2,)f4"]
    any_dtype = st.one_of(DTYPES, st.sampled_from(odd_dtypes))
    odd = {
        name: st.one_of(JUNK, any_dtype)
        if name == "dtype"
        else st.one_of(SIZE_JUNK, st.integers(-2, 9), st.floats(-1, 2))
        for name in names
    }
    arguments = valid | {name: data.draw(strategy, name) for name, strategy in odd.items()}
    layer = refused_or(lambda: LSTM(**arguments), "|".join([*names, "hidden_size"]))
    if layer is not None:
        output, _ = layer(np.ones((2, 1, int(arguments["input_size"])), np.float32))
        assert output.dtype == layer.dtype
        assert output.dtype in (np.float32, np.float64)
        assert output.shape[2] == (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)


@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers", "proj_size", "batch_size"])
@pytest.mark.parametrize("size", [2**62, 2**200])
def test_sizes_that_no_machine_can_hold(name: str, size: int) -> None:
    """In a process that may take 4 GB and 20 s: what is not refused at once would end it, or the machine."""
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from fastlstm import LSTM
name, size = sys.argv[1], int(sys.argv[2])
try:
    if name == "batch_size":
        LSTM(2, 3).stream(size)
    else:
        LSTM(**({"input_size": 2, "hidden_size": 3} | {name: size}))
except ValueError as error:
    print(error)
"""
    pytest.importorskip("resource")
    assert f"`{name}`" in run_python(code, name, str(size), timeout=20)


@given(data=st.data())
@many
def test_any_state_dict(data: st.DataObject) -> None:
    layer, other = LSTM(2, 3, rng=0), LSTM(2, 3, rng=1)
    before, mapping = layer.state_dict(), dict(other.state_dict())
    name = data.draw(st.sampled_from(list(mapping)))
    change = data.draw(st.sampled_from(["value", "missing", "extra", "mapping", "strict"]))
    strict: Any = True
    if change == "value":
        mapping[name] = data.draw(st.one_of(JUNK, arrays(shapes_near(*mapping[name].shape))))
    elif change == "missing":
        del mapping[name]
    elif change == "extra":
        mapping[data.draw(st.one_of(st.text(), st.integers(), st.none()))] = mapping[name]
    elif change == "mapping":
        mapping = data.draw(JUNK)
    else:
        strict = data.draw(JUNK)
    loaded = refused_or(lambda: layer.load_state_dict(mapping, strict) or True, f"mapping|strict|{name}")
    if loaded:
        for key, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, np.asarray(mapping[key]).astype(np.float32))
    else:
        np.testing.assert_equal(layer.state_dict(), before)


@given(n=st.one_of(JUNK, st.integers(-3, 9)))
@many
@pytest.mark.usefixtures("restore_threads")
def test_any_number_of_threads(n: Any) -> None:
    before = fastlstm.get_num_threads()
    if refused_or(lambda: fastlstm.set_num_threads(n) or True, "n") is None:
        assert fastlstm.get_num_threads() == before
    else:
        assert 1 <= fastlstm.get_num_threads() <= n
