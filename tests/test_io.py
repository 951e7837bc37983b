"""Files and other libraries: round trips, foreign and hostile files, PyTorch, sequences for the command line."""

import json
import os
import re
import stat
import struct
import subprocess
import sys
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastlstm
from fastlstm import LSTM, Linear, Sequential
from fastlstm.io.files import replacing
from fastlstm.io.sequences import read_sequence, write_head, write_piece

SETTINGS = [
    {},
    {"bias": False},
    {"num_layers": 3},
    {"bidirectional": True, "num_layers": 2},
    {"proj_size": 2},
    {"proj_size": 4, "bidirectional": True, "num_layers": 2, "bias": False},
    {"batch_first": True, "dropout": 0.5, "num_layers": 2},
]


def name_of(arguments):
    return "-".join(f"{name}={value}" for name, value in arguments.items()) or "plain"


def random(shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes()


def header_of(path):
    data = Path(path).read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def file_of(header, data=b""):
    """A .safetensors file put together by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def file_with(arrays, **metadata):
    import safetensors.numpy

    return safetensors.numpy.save({name: np.asarray(a) for name, a in arrays.items()}, metadata=metadata or None)


# The native format


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("arguments", SETTINGS, ids=name_of)
def test_lstm_round_trip(tmp_path, arguments, dtype):
    lstm = LSTM(3, 5, dtype=dtype, rng=0, **arguments)
    fastlstm.save(lstm, tmp_path / "lstm.safetensors")
    loaded = fastlstm.load(tmp_path / "lstm.safetensors")
    assert type(loaded) is LSTM
    assert repr(loaded) == repr(lstm)
    assert_same_weights(loaded, lstm)
    assert set(header_of(tmp_path / "lstm.safetensors")) - {"__metadata__"} == set(lstm.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_sequential_round_trip(tmp_path, count, dtype):
    layers = [LSTM(3, 5, dtype=dtype, rng=0)]
    layers += [Linear(5, 5, bool(i % 2), dtype=dtype, rng=i) for i in range(1, count)]
    model = Sequential(*layers)
    fastlstm.save(model, str(tmp_path / "model.safetensors"))
    loaded = fastlstm.load(str(tmp_path / "model.safetensors"))
    assert type(loaded) is Sequential
    assert repr(loaded) == repr(model)
    assert_same_weights(loaded, model)


def test_weights_that_are_no_numbers_survive(tmp_path):
    lstm = LSTM(1, 1)
    lstm.bias_ih_l0 = np.array([np.nan, np.inf, -np.inf, -0.0])
    fastlstm.save(lstm, tmp_path / "m.safetensors")
    assert_same_weights(fastlstm.load(tmp_path / "m.safetensors"), lstm)


def test_file_says_what_it_holds(tmp_path):
    path = tmp_path / "model.safetensors"
    fastlstm.save(Sequential(LSTM(3, 5, 2), Linear(5, 1)), path, metadata={"data": "sunspots"})
    metadata = header_of(path)["__metadata__"]
    assert metadata["fastlstm"] == "1"
    assert metadata["data"] == "sunspots"
    lstm, linear = json.loads(metadata["layers"])
    assert lstm == {
        "type": "LSTM",
        "input_size": 3,
        "hidden_size": 5,
        "num_layers": 2,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
        "proj_size": 0,
    }
    assert linear == {"type": "Linear", "in_features": 5, "out_features": 1, "bias": True}


@pytest.mark.parametrize(
    ("model", "metadata", "error", "message"),
    [
        (Linear(1, 1), None, TypeError, "`model` must be an LSTM or a Sequential, got Linear"),
        ({}, None, TypeError, "`model` must be an LSTM or a Sequential, got dict"),
        (LSTM(1, 1), {"a": 1}, TypeError, "`metadata` must map strings to strings"),
        (LSTM(1, 1), ["a"], TypeError, "`metadata` must map strings to strings"),
        (LSTM(1, 1), {"layers": "[]"}, ValueError, "`metadata` must not have the names"),
    ],
)
def test_save_refuses_bad_arguments(tmp_path, model, metadata, error, message):
    with pytest.raises(error, match=message):
        fastlstm.save(model, tmp_path / "m.safetensors", metadata)
    assert list(tmp_path.iterdir()) == []


def test_load_tells_what_cannot_be_opened_as_python_does(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        fastlstm.load(tmp_path / "absent.safetensors")
    assert caught.value.filename == str(tmp_path / "absent.safetensors")
    with pytest.raises(IsADirectoryError):
        fastlstm.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        fastlstm.load(tmp_path / "file" / "m.safetensors")
    with pytest.raises(TypeError):
        fastlstm.load(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in the file system")
def test_load_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        fastlstm.load(tmp_path / "pipe")


# Files from elsewhere


@pytest.mark.parametrize("prefix", ["", "lstm.", "encoder.layers.0."])
@pytest.mark.parametrize("arguments", SETTINGS, ids=name_of)
def test_load_takes_the_weights_of_one_lstm(tmp_path, arguments, prefix):
    lstm = LSTM(3, 5, rng=0, **arguments)
    (tmp_path / "m.safetensors").write_bytes(
        file_with({prefix + name: array for name, array in lstm.state_dict().items()}, format="pt")
    )
    loaded = fastlstm.load(tmp_path / "m.safetensors")
    assert_same_weights(loaded, lstm)
    kept = {name: value for name, value in arguments.items() if name not in ("batch_first", "dropout")}
    assert repr(loaded) == repr(LSTM(3, 5, **kept))


def test_load_casts_float16_exactly(tmp_path):
    half = {name: array.astype(np.float16) for name, array in LSTM(3, 5, rng=0).state_dict().items()}
    (tmp_path / "m.safetensors").write_bytes(file_with(half))
    loaded = fastlstm.load(tmp_path / "m.safetensors")
    assert loaded.dtype == np.float32
    assert all((loaded.state_dict()[name] == half[name]).all() for name in half)


def weights(**arguments):
    return LSTM(3, 5, rng=0, **arguments).state_dict()


def of(layers, arrays=None, **more):
    """A file of ours with this text about its layers."""
    text = layers if isinstance(layers, str) else json.dumps(layers)
    return file_with(weights() if arrays is None else arrays, fastlstm="1", layers=text, **more)


PLAIN = {"type": "LSTM"} | LSTM(3, 5)._config
LINEAR = {"type": "Linear", "in_features": 5, "out_features": 1, "bias": False}
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "empty": b"",
    "short": b"\x01\x02\x03",
    "text": b"this is not a model, it is only text",
    "zip": b"PK\x03\x04" + bytes(100),
    "zeros": bytes(1000),
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2**63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "header no JSON": file_of(b"{'a': 1}"),
    "header not UTF-8": file_of(b'{"\xff": 1}'),
    "header a list": file_of([]),
    "header deep": file_of(b'{"a":' + b"[" * 100_000),
    "no tensors": file_of({}),
    "metadata a list": file_of({"__metadata__": [1]}),
    "metadata of numbers": file_of({"__metadata__": {"fastlstm": 1}}),
    "offsets overlap": file_of({"weight_ih_l0": ONE, "weight_hh_l0": ONE}, bytes(4)),
    "offsets reversed": file_of({"a": ONE | {"data_offsets": [4, 0]}}, bytes(4)),
    "offsets beyond the file": file_of({"a": ONE | {"data_offsets": [0, 400], "shape": [100]}}, bytes(4)),
    "offsets negative": file_of({"a": ONE | {"data_offsets": [-4, 0]}}, bytes(4)),
    "hole": file_of({"a": ONE | {"data_offsets": [4, 8]}}, bytes(8)),
    "bytes left over": file_of({"a": ONE}, bytes(8)),
    "shape too large": file_of({"a": ONE | {"shape": [2]}}, bytes(4)),
    "shape overflows": file_of({"a": ONE | {"shape": [1 << 40, 1 << 40]}}, bytes(4)),
    "shape overflows to nothing": file_of({"weight_ih_l0": ONE | {"shape": [0, 1 << 62], "data_offsets": [0, 0]}}),
    "shape negative": file_of({"a": ONE | {"shape": [-1]}}, bytes(4)),
    "dtype unknown": file_of({"a": ONE | {"dtype": "F31"}}, bytes(4)),
    "dtype BF16": file_of({"weight_ih_l0": ONE | {"dtype": "BF16", "shape": [2]}}, bytes(4)),
    "dtype F8": file_of({"weight_ih_l0": ONE | {"dtype": "F8_E4M3", "shape": [4]}}, bytes(4)),
    "dtype I64": file_with({name: array.astype(np.int64) for name, array in weights().items()}),
    "dtype BOOL": file_with({name: array > 0 for name, array in weights().items()}),
    "no LSTM": file_with({"weight": np.zeros((2, 3))}),
    "two LSTMs": file_with({f"{part}.{name}": a for part in "ab" for name, a in weights().items()}),
    "LSTM and Linear": file_with(weights() | {"linear.weight": np.zeros((1, 5))}),
    "LSTM and GRU": file_with({f"a.{n}": a for n, a in weights().items()} | {"b.weight_ih_l0": np.zeros((15, 3))}),
    "GRU": file_with({"weight_ih_l0": np.zeros((15, 3)), "weight_hh_l0": np.zeros((15, 5))}),
    "RNN": file_with({"weight_ih_l0": np.zeros((5, 3)), "weight_hh_l0": np.zeros((5, 5))}),
    "one tensor alone": file_with({"weight_ih_l0": np.zeros((20, 3))}),
    "a bias missing": file_with({n: a for n, a in weights().items() if n != "bias_hh_l0"}),
    "a layer missing": file_with({n: a for n, a in weights(num_layers=3).items() if not n.endswith("l1")}),
    "a vector for a matrix": file_with(weights() | {"weight_hh_l0": np.zeros(20)}),
    "a scalar": file_with({"weight_ih_l0": np.float32(1), "weight_hh_l0": np.float32(1)}),
    "nothing in it": file_with({"weight_ih_l0": np.zeros((0, 3)), "weight_hh_l0": np.zeros((0, 0))}),
    "no input": file_with({"weight_ih_l0": np.zeros((20, 0)), "weight_hh_l0": np.zeros((20, 5))}),
    "projection too large": file_with(
        {"weight_ih_l0": np.zeros((8, 1)), "weight_hh_l0": np.zeros((8, 3)), "weight_hr_l0": np.zeros((3, 2))}
    ),
    "wrong shapes": file_with(weights() | {"bias_ih_l0": np.zeros(19)}),
    "newer format": file_with(weights(), fastlstm="2", layers="{}"),
    "layers absent": file_with(weights(), fastlstm="1"),
    "layers no JSON": of("[{"),
    "layers deep": of("[" * 100_000),
    "layers a huge number": of("9" * 10_000),
    "layers a string": of('"LSTM"'),
    "layers null": of("null"),
    "layers empty": of([], {}),
    "layers empty, tensors not": of([]),
    "layers an empty object": of({}),
    "layer a number": of([1], {}),
    "type unknown": of(PLAIN | {"type": "GRU"}),
    "type a list": of(PLAIN | {"type": ["LSTM"]}),
    "Linear alone": of(LINEAR, {"weight": np.zeros((1, 5))}),
    "argument missing": of({name: value for name, value in PLAIN.items() if name != "dropout"}),
    "argument unknown": of(PLAIN | {"dtype": "float32"}),
    "size a string": of(PLAIN | {"hidden_size": "5"}),
    "size a float": of(PLAIN | {"hidden_size": 5.0}),
    "size null": of(PLAIN | {"hidden_size": None}),
    "size zero": of(PLAIN | {"hidden_size": 0}),
    "size negative": of(PLAIN | {"input_size": -3}),
    "size absurd": of(PLAIN | {"hidden_size": 10**12}),
    "size beyond int64": of(PLAIN | {"hidden_size": 10**400}),
    "layers absurd": of(PLAIN | {"num_layers": 10**12}),
    "layers true": of(PLAIN | {"num_layers": True}),
    "features absurd": of([LINEAR | {"out_features": 10**15}], {"0.weight": np.zeros((1, 5))}),
    "flag a number": of(PLAIN | {"bidirectional": 0}),
    "dropout NaN": of(json.dumps(PLAIN | {"dropout": float("nan")})),
    "dropout 2": of(PLAIN | {"dropout": 2}),
    "direction too many": of(PLAIN | {"bidirectional": True}),
    "projection not there": of(PLAIN | {"proj_size": 2}),
    "a list where names are plain": of([PLAIN]),
    "an object where names are not": of(PLAIN, {f"0.{name}": array for name, array in weights().items()}),
    "a number with a zero": of([LINEAR], {"00.weight": np.zeros((1, 5))}),
    "a negative number": of([LINEAR], {"-1.weight": np.zeros((1, 5))}),
    "a tensor too many": of(PLAIN, weights() | {"extra": np.zeros(1)}),
    "a layer too many": of([LINEAR], {"0.weight": np.zeros((1, 5)), "1.weight": np.zeros((1, 5))}),
    "layers that do not fit": of([LINEAR, LINEAR], {"0.weight": np.zeros((1, 5)), "1.weight": np.zeros((1, 5))}),
    "two dtypes": of(
        [LINEAR, LINEAR | {"in_features": 1}], {"0.weight": np.zeros((1, 5)), "1.weight": np.zeros((1, 1), np.float32)}
    ),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_load_refuses_what_is_no_model(tmp_path, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .") as caught:
            fastlstm.load(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert type(caught.value) is ValueError
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dtype BF16", "`weight_ih_l0` must be of dtype F64, F32, F16, got BF16"),
        ("two LSTMs", r"more than one LSTM, \['a\.', 'b\.'\]; read it with .*`fastlstm.from_torch` with a `prefix`"),
        ("LSTM and Linear", "more than an LSTM, 'linear.weight' for one; read it with"),
        ("GRU", r"`weight_hh_l0` must have shape \(4H, H\), got \(15, 5\), as a GRU has"),
        ("a bias missing", r"missing \['bias_hh_l0'\]"),
        ("size absurd", "`hidden_size` must be at most 16777216, got 1000000000000"),
        ("layers absurd", "4 tensors cannot be those of 1000000000000 layers"),
        ("newer format", "written in format '2', but this version reads format '1' alone"),
        ("zip", "read a file of PyTorch with `torch.load` and pass its state dict to `fastlstm.from_torch`"),
        ("header beyond the file", "not a .safetensors file, or a damaged one"),
    ],
)
def test_load_tells_the_trouble(tmp_path, name, message):
    (tmp_path / "m.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=message):
        fastlstm.load(tmp_path / "m.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    fastlstm.save(Sequential(LSTM(2, 3, 2, rng=0), Linear(3, 1, rng=1)), folder / "whole.safetensors")
    return folder, (folder / "whole.safetensors").read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_load_survives_damaged_files(saved, data):
    folder, whole = saved
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4), "flips")):
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(whole) - 1), "place")
        damaged[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0129-+.eE"{}[],: \\')), "byte")
    del damaged[data.draw(st.just(len(whole)) | st.integers(0, len(whole)), "length") :]
    path = folder / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        model = fastlstm.load(path)
    except ValueError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either is right, and nothing else
    else:
        assert isinstance(model, Sequential)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["LSTM", "Linear"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*PLAIN, *LINEAR]), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*PLAIN, "more"]), JSON, min_size=1, max_size=3), is_list=st.booleans())
@example(changes={"dropout": 0.25}, is_list=False)
def test_load_survives_any_metadata(saved, changes, is_list):
    layer = PLAIN | changes
    path = saved[0] / "changed.safetensors"
    path.write_bytes(of([layer] if is_list else layer))
    try:
        model = fastlstm.load(path)
    except ValueError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either is right, and nothing else
    else:
        assert {"type": "LSTM"} | model._config == layer


# Writing


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:  # noqa: PT012 - it is raised in the block
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_a_new_file_has_the_usual_permissions_and_a_replaced_one_keeps_its_own(tmp_path):
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "new"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "new").chmod(0o600)
    (tmp_path / "link").symlink_to("new")
    with replacing(tmp_path / "link") as file:
        file.write(b"through the link")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").read_bytes() == b"through the link"


@pytest.mark.skipif(os.name != "posix", reason="devices of POSIX")
def test_what_is_no_file_is_written_to_and_not_replaced():
    before = os.stat(os.devnull)
    fastlstm.save(LSTM(1, 1), os.devnull)
    assert os.stat(os.devnull).st_ino == before.st_ino


def test_save_tells_what_cannot_be_written_as_python_does(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        fastlstm.save(LSTM(1, 1), tmp_path / "absent" / "m.safetensors")
    assert caught.value.filename == str(tmp_path / "absent" / "m.safetensors")
    with pytest.raises(IsADirectoryError) as caught:
        fastlstm.save(LSTM(1, 1), tmp_path)
    assert caught.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


# State dicts and PyTorch


def test_state_dict_needs_no_torch():
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, fastlstm
print(fastlstm.from_torch({"weight_ih_l0": np.zeros((20, 3)), "weight_hh_l0": np.zeros((20, 5))}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "LSTM(3, 5, bias=False, dtype=float64)\n"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("arguments", SETTINGS, ids=name_of)
def test_from_state_dict(arguments, dtype):
    lstm = LSTM(3, 5, dtype=dtype, rng=0, **arguments)
    own = {name: arguments[name] for name in ("batch_first", "dropout") if name in arguments}
    made = fastlstm.from_torch(lstm.state_dict(), **own)
    assert repr(made) == repr(lstm)
    assert_same_weights(made, lstm)
    bigger = {f"encoder.lstm.{name}": array for name, array in lstm.state_dict().items()}
    bigger |= {"encoder.norm.weight": np.zeros(3), "head.bias": np.zeros(1), "steps": np.array(3), 7: None}
    for prefix in ("", "encoder.lstm.", "encoder.lstm", "encoder", "enc"):
        assert_same_weights(fastlstm.from_torch(bigger, prefix=prefix, **own), lstm)


def test_from_state_dict_takes_one_lstm_of_several():
    parts = {"lstm.": LSTM(3, 5, rng=0), "lstm2.": LSTM(3, 5, rng=1), "deep.lstm.": LSTM(3, 5, rng=2)}
    mapping = {prefix + name: a for prefix, lstm in parts.items() for name, a in lstm.state_dict().items()}
    for prefix, lstm in parts.items():
        assert_same_weights(fastlstm.from_torch(mapping, prefix=prefix), lstm)
        assert_same_weights(fastlstm.from_torch(mapping, prefix=prefix[:-1]), lstm)
    for prefix in ("", "ls", "none."):
        with pytest.raises(
            ValueError, match=r"`prefix` must single out one LSTM, one of \['lstm.', 'lstm2.', 'deep.ls"
        ):
            fastlstm.from_torch(mapping, prefix=prefix)


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ({}, ValueError, "holds no LSTM: no name ends in 'weight_ih_l0'"),
        ({"linear.weight": np.zeros((2, 2))}, ValueError, "holds no LSTM"),
        (3, TypeError, "`module_or_state_dict` must be a PyTorch module or a mapping of names to arrays, got int"),
        (None, TypeError, "`module_or_state_dict`"),
        ({"weight_ih_l0": np.zeros((20, 3))}, ValueError, "`weight_hh_l0` is missing"),
        (weights() | {"weight_hh_l0": np.zeros((15, 5))}, ValueError, r"got \(15, 5\), as a GRU has"),
        (weights() | {"weight_hh_l0": np.zeros((5, 5))}, ValueError, r"got \(5, 5\), as an RNN has"),
        (weights() | {"weight_hh_l0": np.zeros((20, 6))}, ValueError, r"must have shape \(4H, H\), got \(20, 6\)$"),
        (weights() | {"weight_hh_l0": np.zeros(20)}, ValueError, "`weight_hh_l0` must have two dimensions"),
        (weights() | {"bias_ih_l0": np.zeros(21)}, ValueError, r"`bias_ih_l0` must have shape \(20,\), got \(21,\)"),
        (weights() | {"weight_hh_l2": np.zeros((20, 5))}, ValueError, r"unexpected \['weight_hh_l2'\]"),
        (weights() | {"weight_ih_l0_reverse": np.zeros((20, 5))}, ValueError, r"missing \['weight_hh_l0_reverse'"),
        (weights() | {"bias_hh_l0": np.zeros(20, int)}, TypeError, "`bias_hh_l0` must be of floating-point numbers"),
        (
            weights() | {"bias_hh_l0": np.zeros(20, complex)},
            TypeError,
            "`bias_hh_l0` must be of floating-point numbers",
        ),
        (weights() | {"bias_hh_l0": "zeros"}, TypeError, "`bias_hh_l0`"),
        (weights() | {"bias_hh_l0": [[1], [2, 3]]}, ValueError, "`bias_hh_l0` cannot be made an array"),
    ],
)
def test_from_torch_refuses_bad_state_dicts(mapping, error, message):
    with pytest.raises(error, match=message):
        fastlstm.from_torch(mapping)


def test_from_torch_refuses_bad_arguments():
    with pytest.raises(TypeError, match="`prefix` must be a string, got int"):
        fastlstm.from_torch(weights(), prefix=1)
    with pytest.raises(TypeError, match="`batch_first` must be True or False"):
        fastlstm.from_torch(weights(), batch_first="yes")
    with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\]"):
        fastlstm.from_torch(weights(), dropout=2.0)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("arguments", SETTINGS, ids=name_of)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_from_module_and_back(torch, arguments, dtype):
    module = torch.nn.LSTM(3, 5, dtype=getattr(torch, dtype), **arguments).eval()
    lstm = fastlstm.from_torch(module)
    assert repr(lstm) == repr(LSTM(3, 5, dtype=dtype, **arguments))
    x = random((7, 4, 3), dtype)
    with torch.no_grad():
        want, (h_n, c_n) = module(torch.from_numpy(x))
    output, state = lstm(x)
    for ours, theirs in zip((output, *state), (want, h_n, c_n), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6 if dtype == "float32" else 1e-14)
    before = torch.random.get_rng_state()
    back = lstm.to_torch().eval()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(back) is torch.nn.LSTM
    assert repr(back) == repr(module)
    assert list(back.state_dict()) == list(module.state_dict())
    with torch.no_grad():
        assert torch.equal(back(torch.from_numpy(x))[0], want)
    assert all(parameter.requires_grad for parameter in back.parameters())
    with torch.no_grad():
        for parameter in [*back.parameters(), *module.parameters()]:
            parameter.zero_()
    assert (lstm(x)[0] == output).all()  # nothing is shared
    assert not back.train()(torch.from_numpy(x))[0].isnan().any()


def test_from_module_finds_the_lstm_in_a_model(torch):
    one, two = torch.nn.LSTM(3, 5, batch_first=True), torch.nn.LSTM(3, 5)
    model = torch.nn.ModuleDict({"encoder": one, "head": torch.nn.Linear(5, 1)})
    assert fastlstm.from_torch(model).batch_first
    model["decoder"] = two
    with pytest.raises(ValueError, match=r"one of \['encoder.', 'decoder.'\]"):
        fastlstm.from_torch(model)
    assert_same_weights(fastlstm.from_torch(model, prefix="decoder"), fastlstm.from_torch(two))
    assert_same_weights(fastlstm.from_torch(model.state_dict(), prefix="decoder."), fastlstm.from_torch(two))


def test_from_module_takes_parametrised_weights(torch):
    module = torch.nn.LSTM(3, 5)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)
        want = module(torch.from_numpy(random((7, 4, 3))))[0]
    np.testing.assert_allclose(fastlstm.from_torch(module)(random((7, 4, 3)))[0], want.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["GRU", "RNN", "LSTMCell", "Linear"])
def test_from_module_refuses_other_modules(torch, kind):
    with pytest.raises(ValueError, match=f"must be or contain a torch.nn.LSTM, got {kind}"):
        fastlstm.from_torch(getattr(torch.nn, kind)(3, 5))
    with pytest.raises(ValueError, match=r"holds no LSTM|as (a GRU|an RNN) has"):
        fastlstm.from_torch(getattr(torch.nn, kind)(3, 5).state_dict())


def test_from_module_refuses_what_contradicts_it(torch):
    with pytest.raises(ValueError, match="`batch_first` is the module's own, False; it cannot be True"):
        fastlstm.from_torch(torch.nn.LSTM(3, 5), batch_first=True)
    with pytest.raises(ValueError, match=r"`dropout` is the module's own, 0\.0; it cannot be 0\.5"):
        fastlstm.from_torch(torch.nn.LSTM(3, 5), dropout=0.5)
    assert fastlstm.from_torch(torch.nn.LSTM(3, 5, batch_first=True), batch_first=True).batch_first


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_from_torch_casts_halves_exactly(torch, dtype):
    module = torch.nn.LSTM(3, 5).to(getattr(torch, dtype))
    for lstm in (fastlstm.from_torch(module), fastlstm.from_torch(module.state_dict())):
        assert lstm.dtype == np.float32
        assert (lstm.weight_hh_l0 == module.weight_hh_l0.detach().float().numpy()).all()


def test_from_torch_takes_parameters_that_require_grad(torch):
    module = torch.nn.LSTM(3, 5)
    lstm = fastlstm.from_torch(dict(module.named_parameters()))
    assert (lstm.weight_hh_l0 == module.weight_hh_l0.detach().numpy()).all()


def test_from_torch_refuses_tensors_without_data(torch):
    with pytest.raises(ValueError, match="`weight_ih_l0` cannot be made an array"):
        fastlstm.from_torch(torch.nn.LSTM(3, 5, device="meta"))


def test_to_torch_tells_that_torch_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        LSTM(3, 5).to_torch()


def test_files_cross_to_torch_and_back(torch, tmp_path):
    from safetensors.torch import load_file, save_file

    module = torch.nn.LSTM(3, 5, 2, bidirectional=True)
    save_file(module.state_dict(), tmp_path / "torch.safetensors")
    lstm = fastlstm.load(tmp_path / "torch.safetensors")
    assert_same_weights(lstm, fastlstm.from_torch(module))
    fastlstm.save(lstm, tmp_path / "own.safetensors")
    module.load_state_dict(load_file(tmp_path / "own.safetensors"))


# Sequences


def decoded(path):
    sequence = read_sequence(path)
    assert sequence.decode(sequence.stored).shape == sequence.shape
    pieces = [sequence.decode(sequence.stored[i : i + 2]) for i in range(0, sequence.shape[0], 2)]
    whole = sequence.decode(sequence.stored)
    if pieces:
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    return whole


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "i2", "?", "f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_read(tmp_path, shape, dtype, order):
    x = np.asarray(10 * random(shape), dtype, order=order)
    np.save(tmp_path / "x.npy", x)
    read = decoded(tmp_path / "x.npy")
    assert read.dtype == x.dtype
    np.testing.assert_array_equal(read, x)


def npy(text):
    text = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04 a zip",
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 3)}") + bytes(35),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-3, -3)}") + bytes(36),
        npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 62}, 4)}}") + bytes(36),
        npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 99}, 0)}}") + bytes(36),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (3, 3)}") + bytes(72),
        npy("{'descr': '<c8', 'fortran_order': False, 'shape': (3, 3)}") + bytes(72),
        npy("{'descr': '<U2', 'fortran_order': False, 'shape': (3, 3)}") + bytes(72),
        npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3, 3)}") + bytes(36),
        npy("{'descr': '<f4', 'fortran_order': False}") + bytes(36),
        npy("{'descr': '<f9', 'fortran_order': False, 'shape': (3, 3)}") + bytes(36),
        npy("((((((((((") + bytes(36),
        npy("__import__('os').getpid()") + bytes(36),
        b"\x93NUMPY\x09\x00" + bytes(100),
    ],
)
def test_npy_that_is_none_is_refused(tmp_path, data):
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "x.npy"))):
        read_sequence(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1,2\n3,4\n", [[1, 2], [3, 4]]),
        ("a,b\n1,2\n3,4", [[1, 2], [3, 4]]),
        ("\ufeffyear,spots\r\n1700, 5.0\r\n\r\n1701,1e1\r\n", [[1700, 5], [1701, 10]]),
        ("\ufeff1\n2\n", [[1], [2]]),
        ("nan\n-inf\n", [[np.nan], [-np.inf]]),
        ("# comment, or heading\n1,2\n", [[1, 2]]),
        ('"1","2"\n', [[1, 2]]),
        ("a,b\n", np.zeros((0, 2))),
    ],
)
def test_csv_is_read(tmp_path, text, want):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    sequence = read_sequence(tmp_path / "x.csv")
    np.testing.assert_array_equal(sequence.decode(sequence.stored), want)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no data"),
        (b"\n\n", "no data"),
        (b"1,2\n3,x\n", "line 2: 'x' is not a number"),
        (b"a,b\n1,2\n\n3,\n", "line 4: '' is not a number"),
        (b"1,b\n1,2\n", "line 1: 'b' is not a number"),
        (b"1,2\n3\n", "line 2: 2 numbers expected as before, got 1"),
        (b"a,b\n1,2,3\n", "line 2: 2 numbers expected as before, got 3"),
        (b"1;2\n3;4\n1;2\n", "line 2: '3;4' is not a number"),
        (b"1,2\n\xff\xfe\n", "not text in UTF-8"),
        (b'1,2\n"3,4\n', "line 2: unexpected end of data"),
        (b"1,2\n" + b"9" * 200_000, "line 2: field larger than field limit"),
    ],
)
def test_csv_that_is_none_is_refused(tmp_path, data, message):
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'x.csv'}: {message}")):
        read_sequence(tmp_path / "x.csv")


def wav(data, kind=1, channels=1, bits=16, extra=b"", size=None, extensible=False):
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, 8000, 8000 * frame, frame, bits)
    if extensible:
        form += struct.pack("<HHIH14x", 22, bits, 0, kind)
    size = len(data) if size is None else size
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + extra + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_is_read_as_the_standard_library_writes_it(tmp_path, width, channels):
    low, high = (0, 255) if width == 1 else (-(1 << (8 * width - 1)), (1 << (8 * width - 1)) - 1)
    samples = np.random.default_rng(0).integers(low, high + 1, (7, channels))
    samples[:2, 0] = low, high
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((channels, width, 8000, 0, "NONE", ""))
        file.writeframes(b"".join(int(s).to_bytes(width, "little", signed=width > 1) for s in samples.ravel()))
    want = (samples - (128 if width == 1 else 0)) / 2.0 ** (8 * width - 1)
    read = decoded(tmp_path / "x.wav")
    np.testing.assert_array_equal(read, want)
    assert read[0, 0] == -1
    assert read.max() < 1


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_wav_of_floats_is_read(tmp_path, dtype, extensible):
    x = random((6, 2), dtype)
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    (tmp_path / "x.wav").write_bytes(
        wav(x.tobytes(), 3, 2, 8 * x.itemsize, odd, 0xFFFFFFFF if extensible else None, extensible)
    )
    np.testing.assert_array_equal(decoded(tmp_path / "x.wav"), x)


def test_wav_of_nothing_is_nothing(tmp_path):
    (tmp_path / "x.wav").write_bytes(wav(b"", channels=2, bits=24))
    assert decoded(tmp_path / "x.wav").shape == (0, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a .wav file"),
        (b"RIFF\0\0\0\0AVI ", "not a .wav file"),
        (wav(bytes(8))[:36], "truncated, or without sound"),
        (wav(bytes(8), size=9), "truncated: 9 bytes of sound expected, 8 found"),
        (wav(bytes(8), kind=6, bits=8), "got format 6, 8 bits, 1 channels"),
        (wav(bytes(8), bits=12), "the sound must be PCM of 8, 16, 24 or 32 bits"),
        (wav(bytes(8), channels=0), "0 channels"),
        (b"RIFF\0\0\0\0WAVEdata" + struct.pack("<I", 4) + bytes(4), "the sound has no format"),
        (b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<I", 0xFFFFFFFF) + bytes(99), "truncated, or without sound"),
    ],
)
def test_wav_that_is_none_is_refused(tmp_path, data, message):
    (tmp_path / "x.wav").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'x.wav'}: ") + ".*" + re.escape(message)):
        read_sequence(tmp_path / "x.wav")


WHOLE = {
    ".npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 3)}") + bytes(36),
    ".wav": wav(bytes(24), channels=2, bits=24),
    ".csv": b"a,b\n1,2\n3,4\n",
}


@settings(max_examples=300, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(list(WHOLE)))
@pytest.mark.filterwarnings("ignore:.*Python 2")
def test_damaged_sequences_are_read_or_refused(tmp_path_factory, data, suffix):
    damaged = bytearray(WHOLE[suffix])
    for _ in range(data.draw(st.integers(1, 4), "flips")):
        damaged[data.draw(st.integers(0, len(damaged) - 1), "place")] = data.draw(st.integers(0, 255), "byte")
    del damaged[data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)), "length") :]
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(damaged)
    try:
        sequence = read_sequence(path)
    except ValueError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either is right, and nothing else
    else:
        assert sequence.decode(sequence.stored).shape == sequence.shape


def test_sequences_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match=r"the input must be a \.npy, \.csv or \.wav file"):
        read_sequence(tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError):
        read_sequence(tmp_path / "x.npy")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".npy", ".csv"])
def test_pieces_make_the_file(tmp_path, suffix, dtype):
    x = random((5, 3), dtype) * dtype(1e-7)
    x[0] = np.nan, np.inf, 0.1
    path = tmp_path / f"x{suffix}"
    with path.open("wb") as file:
        write_head(file, suffix, x.shape, x.dtype)
        write_piece(file, suffix, x[:2])
        write_piece(file, suffix, x[2:])
    read = decoded(path) if suffix == ".npy" else np.loadtxt(path, delimiter=",", dtype=dtype)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, x)
    assert suffix == ".npy" or path.read_text().startswith("nan,inf,0.1\n")
