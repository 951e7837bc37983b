"""Linear and Sequential: agreement with NumPy and with the layers one by one, same bits, streams, bad arguments."""

import copy
import pickle
import threading

import numpy as np
import pytest

import fastlstm
from fastlstm import LSTM, Linear, Sequential, reference

DTYPES = [np.float32, np.float64]


def random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# Linear


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("rows", "features"),
    [((1,), (1, 1)), ((3,), (7, 5)), ((2, 5), (17, 33)), ((), (4, 3)), ((97,), (65, 64)), ((4, 1, 2), (3, 130))],
)
def test_linear_is_a_matrix_product(rows, features, bias, dtype):
    linear = Linear(*features, bias=bias, dtype=dtype, rng=1)
    x = random((*rows, features[0]), dtype)
    weight, offset = linear.weight.astype(np.float64), linear.bias.astype(np.float64) if bias else 0
    y = linear(x)
    assert y.dtype == dtype
    # K products and sums, each rounded once: K eps times the sum of what is added.
    size = np.abs(x).astype(np.float64) @ np.abs(weight.T) + np.abs(offset)
    assert np.all(np.abs(y - (x @ weight.T + offset)) <= features[0] * np.finfo(dtype).eps * size)


@pytest.mark.parametrize("features", [(1, 1), (5, 3), (33, 17), (64, 40), (130, 129)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
def test_linear_gives_a_row_the_same_bits_in_any_company(features, dtype):
    linear = Linear(*features, dtype=dtype, rng=1)
    x = random((400, features[0]), dtype)
    whole = linear(x)
    before = fastlstm.get_num_threads()
    try:
        fastlstm.set_num_threads(1)
        assert same_bits(linear(x), whole)
    finally:
        fastlstm.set_num_threads(before)
    for rows in (1, 2, 7, 13, 96, 97, 193):
        assert same_bits(linear(x[5 : 5 + rows]), whole[5 : 5 + rows])
    assert same_bits(linear(x[::-1]), whole[::-1].copy())


def test_linear_takes_what_numpy_takes():
    linear = Linear(3, 2, rng=0)
    x = random((6, 4, 3))
    want = linear(x)
    read_only = x.copy()
    read_only.flags.writeable = False
    strided = np.repeat(x, 2, axis=0)[::2]
    for other in (read_only, strided, np.asfortranarray(x), x.astype(np.float64), x.astype(">f4"), x.tolist()):
        assert same_bits(linear(other), want)
    ones = np.ones((2, 3))
    assert same_bits(linear(ones.astype(np.int64)), linear(ones))
    assert same_bits(linear(ones.astype(bool)), linear(ones))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            np.zeros((2, 4), np.float32),
            ValueError,
            r"`x` must have shape \(\.\.\., in_features\) with in_features = 3, got \(2, 4\)",
        ),
        (np.float32(1), ValueError, "`x` must have shape"),
        (np.zeros((2, 3), complex), TypeError, "`x` must be of a dtype that casts to float32"),
        ("abc", TypeError, "`x`"),
        ([[1, 2], [3]], ValueError, "`x` cannot be made an array"),
        (None, TypeError, "`x`"),
    ],
)
def test_linear_refuses_bad_input(x, error, message):
    with pytest.raises(error, match=message):
        Linear(3, 2)(x)


def test_linear_writes_to_out():
    linear = Linear(3, 2, rng=0)
    x = random((5, 3))
    out = np.full((5, 2), np.nan, np.float32)
    assert linear(x, out=out) is out
    assert same_bits(out, linear(x))
    square = Linear(3, 3, rng=0)
    memory = random((1000, 3))
    want = square(memory[:-1])
    assert same_bits(square(memory[:-1], out=memory[1:]), want)  # the input is read before it is overwritten


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (np.zeros((5, 3), np.float32), ValueError),
        (np.zeros((5, 2)), TypeError),
        (np.zeros((2, 5), np.float32).T, ValueError),
        ([[0.0]], TypeError),
    ],
    ids=["shape", "dtype", "order", "list"],
)
def test_linear_refuses_bad_out(out, error):
    with pytest.raises(error, match="`out` must"):
        Linear(3, 2)(np.zeros((5, 3)), out=out)


def test_linear_of_nothing_is_nothing():
    assert Linear(3, 2)(np.zeros((0, 4, 3))).shape == (0, 4, 2)


def test_linear_keeps_nan_in_its_row():
    linear = Linear(5, 3, rng=0)
    x = random((20, 5))
    clean = linear(x)
    x[7, 2] = np.nan
    y = linear(x)
    assert np.isnan(y[7]).all()
    assert same_bits(np.delete(y, 7, 0), np.delete(clean, 7, 0))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((0, 1), ValueError), ((1, -1), ValueError), ((1.5, 1), TypeError), ((1, 1, 1), TypeError), (("3", 1), TypeError)],
    ids=str,
)
def test_linear_refuses_bad_arguments(arguments, error):
    with pytest.raises(error, match=r"`(in_features|out_features|bias)` must"):
        Linear(*arguments)


def test_linear_refuses_a_bad_dtype_and_seed():
    with pytest.raises(ValueError, match="`dtype` must be float32 or float64, got float16"):
        Linear(1, 1, dtype="float16")
    with pytest.raises(TypeError, match="`rng`"):
        Linear(1, 1, rng="seed")


def test_linear_initial_weights_are_uniform_and_repeatable():
    linear = Linear(100, 50, rng=3)
    assert same_bits(linear.weight, Linear(100, 50, rng=np.random.default_rng(3)).weight)
    assert 0.09 < np.abs(linear.weight).max() <= 0.1
    assert linear.num_parameters == 5050


def test_linear_weights_change_at_once_or_not_at_all():
    linear = Linear(2, 1, rng=0)
    linear([[0.0, 0.0]])
    linear.weight = [[1, 2]]
    linear.bias = np.array([3.0])
    assert linear([[1.0, 1.0]]) == 6
    linear.load_state_dict({"bias": [4.0]}, strict=False)
    assert linear([[1.0, 1.0]]) == 7
    with pytest.raises(ValueError, match="read-only"):
        linear.weight[0, 0] = 9
    with pytest.raises(ValueError, match=r"`weight` must have shape \(1, 2\), got \(2, 2\)"):
        linear.weight = np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"missing \['bias'\], unexpected \['biass'\]"):
        linear.load_state_dict({"weight": [[0, 0]], "biass": [0]})
    with pytest.raises(AttributeError, match="cannot set `in_features`"):
        linear.in_features = 5
    assert linear([[1.0, 1.0]]) == 7
    copies = linear.state_dict()
    copies["weight"][:] = 0
    assert linear([[1.0, 1.0]]) == 7


def test_weights_are_copied():
    weight, linear = np.ones((1, 2), np.float32), Linear(2, 1, bias=False)
    for load in (lambda: linear.load_state_dict({"weight": weight}), lambda: setattr(linear, "weight", weight)):
        weight[:] = 1
        load()
        weight[:] = 9
        assert linear([[1.0, 1.0]]) == 2


def test_linear_without_bias_has_none():
    linear = Linear(2, 1, bias=False)
    assert linear.bias is None
    assert list(linear.state_dict()) == ["weight"]
    with pytest.raises(AttributeError, match="cannot set `bias`"):
        linear.bias = [1.0]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_copies(duplicate, bias):
    linear = Linear(3, 2, bias, dtype="float64", rng=0)
    x = random((4, 3), np.float64)
    want = linear(x)
    twin = duplicate(linear)
    assert repr(twin) == repr(linear)
    linear.weight = np.zeros((2, 3))
    assert same_bits(twin(x), want)


def test_repr_can_be_evaluated():
    assert repr(Linear(3, 2)) == "Linear(3, 2)"
    assert repr(Linear(3, 2, bias=False, dtype="f8")) == "Linear(3, 2, bias=False, dtype=float64)"
    model = Sequential(LSTM(3, 5, bidirectional=True), Linear(10, 2, False))
    assert repr(model) == "Sequential(LSTM(3, 5, bidirectional=True), Linear(10, 2, bias=False))"
    assert repr(eval(repr(model))) == repr(model)


# Sequential


def make_model(dtype=np.float32, **settings):
    return Sequential(
        Linear(3, 4, dtype=dtype, rng=1),
        LSTM(4, 5, 2, dtype=dtype, rng=2, **settings),
        LSTM(10 if settings.get("bidirectional") else 5, 7, proj_size=6, dtype=dtype, rng=3, **settings),
        Linear(12 if settings.get("bidirectional") else 6, 2, dtype=dtype, rng=4),
    )


def layer_by_layer(model, x, state=None, **options):
    states = []
    for layer, initial in zip(model, state or [None] * len(model), strict=True):
        if isinstance(layer, LSTM):
            x, final = layer(x, initial, **options)
            states.append(final)
        else:
            x = layer(x)
            states.append(None)
    return x, states


def states_equal(a, b):
    return all(
        (x is None and y is None) or all(same_bits(p, q) for p, q in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["D1", "D2"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["T-first", "N-first"])
@pytest.mark.parametrize("shape", [(7, 3), (1, 1), (5,), (0, 3), (4, 0)], ids=str)
def test_sequential_is_its_layers_in_turn(shape, batch_first, bidirectional, dtype):
    model = make_model(dtype, batch_first=batch_first, bidirectional=bidirectional)
    x = random((*shape, 3), dtype)
    reset = np.random.default_rng(1).random(shape) < 0.3
    output, state = model(x, reset=reset)
    want, want_state = layer_by_layer(model, x, reset=reset)
    assert same_bits(output, want)
    assert states_equal(state, want_state)
    again, _ = model(x, state)
    assert same_bits(again, layer_by_layer(model, x, state)[0])
    if x.size:
        assert not same_bits(again, model(x)[0])


def test_sequential_agrees_with_the_reference():
    model = Sequential(LSTM(3, 5, 2, dtype="f8", rng=0), Linear(5, 2, dtype="f8", rng=1))
    x = random((9, 4, 3), np.float64)
    want = reference.forward(model[0].state_dict(), x).output @ model[1].weight.T + model[1].bias
    np.testing.assert_allclose(model(x)[0], want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch_first", [False, True], ids=["T-first", "N-first"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["D1", "D2"])
def test_sequential_pads_with_zeros_after_a_linear(batch_first, bidirectional):
    model = make_model(batch_first=batch_first, bidirectional=bidirectional)
    x, lengths = random((4, 6, 3)), [6, 0, 3, 1]
    arrange = (lambda a: a) if batch_first else (lambda a: a.swapaxes(0, 1))
    for n, length in enumerate(lengths):
        x[n, length:] = np.nan
    out = np.full(arrange(np.empty((4, 6, 2), np.float32)).shape, np.nan, np.float32)
    output, state = model(arrange(x), lengths=lengths, out=out)
    assert output is out
    for n, length in enumerate(lengths):
        alone, alone_state = model(x[n, :length])
        assert same_bits(arrange(output)[n, :length].copy(), alone)
        assert not arrange(output)[n, length:].any()
        if length:
            assert same_bits(state[1][0][:, n].copy(), alone_state[1][0].copy())


def test_sequential_pads_an_unbatched_sequence():
    model = make_model()
    x = random((6, 3))
    output, _ = model(x, lengths=4)
    assert same_bits(output[:4], model(x[:4])[0])
    assert not output[4:].any()


def test_sequential_does_not_change_its_arguments_and_may_write_over_them():
    model = Sequential(LSTM(3, 5, rng=0), Linear(5, 3, rng=1))
    x, state = random((6, 2, 3)), [(random((1, 2, 5), seed=1), random((1, 2, 5), seed=2)), None]
    kept = copy.deepcopy((x, state))
    want, _ = model(x, state)
    np.testing.assert_equal((x, state), kept)
    assert same_bits(model(x, state, out=x)[0], want)
    last = Sequential(Linear(3, 5, rng=0), LSTM(5, 5, rng=1))
    memory = np.zeros((6, 2, 5), np.float32)
    memory[0] = random((2, 5))
    want, _ = last(kept[0], [None, (memory[:1].copy(), memory[1:2].copy())])
    assert same_bits(last(kept[0], [None, (memory[:1], memory[1:2])], out=memory)[0], want)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ((), ValueError, "`layers` must be at least one"),
        ((LSTM(3, 5), Linear(4, 2)), ValueError, "layer 0 gives 5 numbers a step, layer 1 takes 4"),
        ((LSTM(3, 5, bidirectional=True), LSTM(5, 2)), ValueError, "layer 0 gives 10 numbers a step"),
        ((LSTM(3, 5), Linear(5, 2, dtype="f8")), ValueError, "float32 in layer 0 and float64 in layer 1"),
        ((LSTM(3, 5), LSTM(5, 2, batch_first=True)), ValueError, "same `batch_first`"),
        ((LSTM(3, 5), "Linear"), TypeError, "got str as layer 1"),
        (([LSTM(3, 5)],), TypeError, "got list as layer 0"),
    ],
)
def test_sequential_refuses_layers_that_do_not_fit(layers, error, message):
    with pytest.raises(error, match=message):
        Sequential(*layers)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": np.zeros((4, 2, 4))}, ValueError, r"`x` must have shape \(T, N, I\) with I = 3"),
        ({"x": np.zeros(3)}, ValueError, r"or \(T, I\) unbatched"),
        ({"x": np.zeros((4, 2, 3), complex)}, TypeError, "`x`"),
        ({"lengths": [5, 1]}, ValueError, "`lengths` must be from 0 to T = 4, got 5"),
        ({"lengths": [1.0, 2.0]}, TypeError, "`lengths`"),
        ({"reset": np.zeros((2, 4), bool)}, ValueError, "`reset`"),
        ({"state": 3}, TypeError, "`state` must be a list with an entry a layer, got int"),
        ({"state": [None]}, ValueError, "`state` must have an entry a layer, 2 of them, got 1"),
        ({"state": [None, (1, 2)]}, ValueError, "must be None for layer 1, a Linear"),
        ({"state": [(np.zeros((1, 2, 4)), np.zeros((1, 2, 5))), None]}, ValueError, "h_0 must have shape"),
        ({"out": np.zeros((4, 2, 2), np.float32)}, ValueError, r"`out` must have shape \(T, N, O\) = \(4, 2, 1\)"),
        ({"out": np.zeros((4, 2, 1))}, TypeError, "`out` must have dtype float32"),
    ],
)
def test_sequential_refuses_bad_arguments_before_any_work(arguments, error, message):
    model = Sequential(LSTM(3, 5), Linear(5, 1))
    out = np.full((4, 2, 1), 7, np.float32)
    with pytest.raises(error, match=message):
        model(**{"x": np.zeros((4, 2, 3)), "out": out} | arguments)
    assert (out == 7).all()


def test_sequential_is_a_sequence_of_layers():
    lstm, linear = LSTM(3, 5), Linear(5, 1)
    model = Sequential(lstm, linear)
    assert len(model) == 2
    assert list(model) == [lstm, linear]
    assert model[-1] is linear
    assert list(model[:1]) == [lstm]
    assert (model.input_size, model.batch_first, model.bidirectional, model.dtype) == (3, False, False, np.float32)
    assert model.num_parameters == lstm.num_parameters + linear.num_parameters
    with pytest.raises(IndexError):
        model[2]


def test_sequential_loads_all_weights_or_none():
    model, other = (
        Sequential(LSTM(3, 5, rng=0), Linear(5, 1, rng=0)),
        Sequential(LSTM(3, 5, rng=1), Linear(5, 1, rng=1)),
    )
    x = random((4, 2, 3))
    before, after = model(x)[0], other(x)[0]
    good = other.state_dict()
    for bad, message in (
        (good | {"1.weight": np.zeros((2, 5))}, r"`1\.weight` must have shape \(1, 5\), got \(2, 5\)"),
        (good | {"2.weight": 0}, r"unexpected \['2\.weight'\]"),
        ({name: good[name] for name in good if name != "1.bias"}, r"missing \['1\.bias'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(bad)
        assert same_bits(model(x)[0], before)
    with pytest.raises(TypeError, match="`mapping` must map names to arrays"):
        model.load_state_dict([1])
    model.load_state_dict(good)
    assert same_bits(model(x)[0], after)
    model[1].bias = [1.0]
    assert same_bits(model.state_dict()["1.bias"], np.ones(1, np.float32))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_sequential_copies(duplicate):
    model = make_model()
    x = random((4, 2, 3))
    want = model(x)[0]
    twin = duplicate(model)
    model[0].weight = np.zeros((4, 3))
    assert same_bits(twin(x)[0], want)


def test_sequential_serves_many_threads_at_once():
    model = Sequential(LSTM(16, 40, 2, rng=0), Linear(40, 300, rng=1))
    inputs = [random((20, 8, 16), seed=i) for i in range(8)]
    want = [model(x)[0] for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not same_bits(model(inputs[i])[0], want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Streams


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("batch_first", [False, True], ids=["T-first", "N-first"])
def test_stream_gives_the_same_bits_in_any_chunks(N, dtype, batch_first):
    model = make_model(dtype, batch_first=batch_first)
    x = random((12, N, 3), dtype)
    want, final = model(x.swapaxes(0, 1) if batch_first else x)
    want = want.swapaxes(0, 1).copy() if batch_first else want
    by_step, by_chunk = model.stream(N), model.stream(N)
    assert same_bits(np.stack([by_step(x_t) for x_t in x]), want)
    assert same_bits(np.concatenate([by_chunk(x[:5]), by_chunk(x[5:5]), by_chunk(x[5:6]), by_chunk(x[6:])]), want)
    assert states_equal(by_step.state, final)
    assert states_equal(by_chunk.state, final)


def test_stream_starts_from_a_state_and_gives_it_back():
    model = make_model()
    x = random((9, 2, 3))
    _, middle = model(x[:4])
    stream = model.stream(2, middle)
    assert same_bits(stream(x[4:]), model(x)[0][4:])
    stream.state = middle
    assert states_equal(stream.state, middle)
    stream.state[1][0][:] = 9  # a copy
    assert same_bits(stream(x[4:]), model(x)[0][4:])
    stream.state = None
    assert same_bits(stream(x), model(x)[0])


@pytest.mark.parametrize("rows", [None, [1], [True, False, True], np.array([0, 2]), []], ids=str)
def test_stream_resets_rows(rows):
    model = make_model()
    x = random((8, 3, 3))
    stream = model.stream(3)
    stream(x[:4])
    stream.reset(rows)
    cut = np.zeros((8, 3), bool)
    cut[4, slice(None) if rows is None else np.asarray(rows, None if len(rows) else int)] = True
    assert same_bits(stream(x[4:]), model(x, reset=cut)[0][4:])


def test_stream_writes_to_out():
    model = make_model()
    x = random((4, 2, 3))
    want = model(x)[0]
    stream = model.stream(2)
    step = np.full((2, 2), np.nan, np.float32)
    assert stream(x[0], out=step) is step
    assert same_bits(step, want[0])
    chunk = np.full((3, 2, 2), np.nan, np.float32)
    assert stream(x[1:], out=chunk) is chunk
    assert same_bits(chunk, want[1:])


def test_stream_uses_the_weights_of_the_moment():
    model = Sequential(LSTM(3, 5, rng=0), Linear(5, 1, rng=1))
    x = random((6, 1, 3))
    stream = model.stream()
    stream(x[:3])
    state = stream.state
    model.load_state_dict(Sequential(LSTM(3, 5, rng=7), Linear(5, 1, rng=8)).state_dict())
    assert same_bits(stream(x[3:]), model(x[3:], state)[0])


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (
            lambda s: s(np.zeros((3, 3))),
            ValueError,
            r"`x` must have shape \(N, I\) or \(T, N, I\) with N = 2 and I = 3",
        ),
        (lambda s: s(np.zeros(3)), ValueError, "`x` must have shape"),
        (lambda s: s(np.zeros((2, 3), complex)), TypeError, "`x`"),
        (
            lambda s: s(np.zeros((2, 3)), out=np.zeros((2, 3), np.float32)),
            ValueError,
            r"`out` must have shape \(N, O\)",
        ),
        (lambda s: s(np.zeros((1, 2, 3)), out=np.zeros((1, 2, 2))), TypeError, "`out` must have dtype"),
        (lambda s: setattr(s, "state", [None]), ValueError, "`state` must have an entry a layer"),
        (lambda s: s.reset([2]), ValueError, "`rows`"),
        (lambda s: s.reset([True]), ValueError, "`rows`"),
        (lambda s: s.reset([0.5]), TypeError, "`rows`"),
    ],
)
def test_stream_refuses_bad_arguments_and_keeps_its_state(use, error, message):
    stream = make_model().stream(2)
    stream(random((4, 2, 3)))
    before = stream.state
    with pytest.raises(error, match=message):
        use(stream)
    assert states_equal(stream.state, before)


def test_stream_refuses_what_cannot_stream():
    with pytest.raises(ValueError, match="bidirectional"):
        make_model(bidirectional=True).stream()
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        make_model().stream(0)
    with pytest.raises(TypeError, match="`batch_size`"):
        make_model().stream(1.5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_stream_copies(duplicate):
    model = make_model()
    x = random((8, 2, 3))
    stream = model.stream(2)
    stream(x[:4])
    twin = duplicate(stream)
    stream(x)
    assert same_bits(twin(x[4:]), model(x)[0][4:])
    assert repr(twin) == f"{model!r}.stream(2)"
