"""What show_config shows, what warmup compiles, what an import takes along."""

import json

import numpy as np
import pytest
from conftest import run_python

import fastlstm
from fastlstm import config


def test_describe_is_complete_and_plain():
    found = config.describe()
    assert list(found) == [
        *("versions", "cpu", "target", "vector_bits", "registers", "fma", "lanes"),
        *("threads", "threading_layer", "cache_folder"),
    ]
    assert found["versions"]["fastlstm"] == fastlstm.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["lanes"] == {"float32": found["vector_bits"] // 32, "float64": found["vector_bits"] // 64}
    assert found["threads"] == fastlstm.get_num_threads()
    assert found["cpu"]
    assert json.loads(json.dumps(found)) == found


def test_show_config_prints_what_describe_says(capsys):
    assert fastlstm.show_config() is None
    shown = capsys.readouterr().out
    found = config.describe()
    for version in found["versions"].values():
        assert version in shown
    for name in ("cpu", "target", "vector_bits", "threads", "threading_layer", "cache_folder"):
        assert str(found[name]) in shown


def test_show_config_starts_no_threads_and_says_so():
    code = "import fastlstm; fastlstm.show_config()"
    assert "not started; will be the first of" in run_python(code, NUMBA_THREADING_LAYER=None)
    assert "not started; will be workqueue" in run_python(code, NUMBA_THREADING_LAYER="workqueue")
    code = "import fastlstm; fastlstm.set_num_threads(2); fastlstm.warmup(); fastlstm.show_config()"
    shown = run_python(code, NUMBA_THREADING_LAYER="workqueue", NUMBA_NUM_THREADS="2")
    assert "threading layer  workqueue\n" in shown


def test_show_config_says_that_there_is_no_cache():
    shown = run_python("import fastlstm; fastlstm.show_config()", FASTLSTM_CACHE="0")
    assert "compile cache    none\n" in shown


def test_nothing_is_left_to_compile_after_warmup(tmp_path):
    code = """
import sys
from pathlib import Path
import numpy as np, numba, fastlstm
fastlstm.set_num_threads(2)
fastlstm.warmup(("float32", "float64"))
assert fastlstm.get_num_threads() == 1 or numba.threading_layer()
compiled = set(Path(sys.argv[1]).rglob("*.*"))
assert compiled
for dtype in ("float32", "float64"):
    model = fastlstm.Sequential(
        fastlstm.LSTM(40, 64, 2, dtype=dtype, bidirectional=True), fastlstm.LSTM(128, 96, dtype=dtype),
        fastlstm.Linear(96, 300, dtype=dtype),
    )
    x = np.ones((20, 64, 40), dtype)
    model(x, lengths=np.arange(64) % 20, reset=np.zeros((20, 64), bool))
    stream = model[1:].stream(16)
    stream(np.ones((16, 128), dtype))
    stream(np.ones((5, 16, 128), dtype))
new = set(Path(sys.argv[1]).rglob("*.*")) - compiled
assert not new, new
"""
    run_python(code, str(tmp_path), FASTLSTM_CACHE=str(tmp_path), NUMBA_NUM_THREADS="2")


def test_nothing_is_left_to_compile_for_training_after_its_warmup(tmp_path):
    code = """
import sys
from pathlib import Path
import numpy as np, fastlstm
fastlstm.set_num_threads(2)
fastlstm.warmup(("float32", "float64"), training=True)
compiled = set(Path(sys.argv[1]).rglob("*.*"))
assert compiled
for dtype in ("float32", "float64"):
    for I, H, P, N, T in ((1, 16, 0, 1, 300), (40, 40, 0, 3, 9), (32, 32, 0, 1, 1), (256, 256, 100, 64, 20)):
        layers = fastlstm.LSTM(I, H, proj_size=P, dtype=dtype), fastlstm.Linear(P or H, 3, dtype=dtype)
        reset = np.zeros((T, N), bool) if N == 3 else None
        tape = fastlstm.Sequential(*layers).record(np.ones((T, N, I), dtype), reset=reset)
        tape.backward(tape.output)
new = set(Path(sys.argv[1]).rglob("*.*")) - compiled
assert not new, new
"""
    run_python(code, str(tmp_path), FASTLSTM_CACHE=str(tmp_path), NUMBA_NUM_THREADS="2")


def test_a_first_call_with_a_warm_cache_loads_nothing_of_the_compiler(tmp_path):
    code = """
import sys
import numpy as np
import fastlstm
fastlstm.LSTM(256, 256)(np.zeros((100, 1, 256)))
import numba
print(numba.threading_layer(), "numba.np.arraymath" in sys.modules)  # which imports SciPy, where there is one
"""
    variables = {"FASTLSTM_CACHE": str(tmp_path), "NUMBA_NUM_THREADS": "2", "FASTLSTM_NUM_THREADS": "2"}
    found = [run_python(code, **variables).split()[1] for _ in range(2)]
    assert found == ["True", "False"]


@pytest.mark.parametrize("dtypes", ["float32", np.float32, np.dtype("float64"), ["f4", "f8"], (), iter(["f4"])])
def test_warmup_takes_dtypes(dtypes):
    assert fastlstm.warmup(dtypes) is None
    assert fastlstm.warmup(training=True) is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtypes": ["float16"]}, ValueError, "`dtype` must be float32 or float64, got float16"),
        ({"dtypes": "float31"}, TypeError, "`dtype` must be float32 or float64, got 'float31'"),
        ({"dtypes": 3}, TypeError, "`dtype` must be float32 or float64, got 3"),
        ({"training": 1}, TypeError, "`training` must be True or False"),
    ],
)
def test_warmup_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fastlstm.warmup(**arguments)


@pytest.mark.parametrize("value", ["0", "-3", "two", "1.5", "9" * 5000])
def test_an_environment_that_makes_no_sense_is_told(value, monkeypatch):
    monkeypatch.setattr(fastlstm.threads, "_threads", None)
    monkeypatch.setenv("FASTLSTM_NUM_THREADS", value)
    with pytest.warns(UserWarning, match="FASTLSTM_NUM_THREADS must be from 1 to 999999999"):
        assert fastlstm.get_num_threads() >= 1


def test_without_numbas_compiler_there_is_one_line():
    code = """
import fastlstm
try:
    fastlstm.LSTM(3, 5)([[[1.0, 2.0, 3.0]]])
except RuntimeError as error:
    print(error)
"""
    assert run_python(code, NUMBA_DISABLE_JIT="1").startswith("NUMBA_DISABLE_JIT turns off the compiler")


def test_import_takes_nothing_heavy_along():
    code = """
import sys, fastlstm
heavy = {"numba", "llvmlite", "torch", "safetensors", "argparse", "matplotlib", "fastlstm.bench", "fastlstm.demo",
         "fastlstm.cli", "fastlstm.kernels", "fastlstm.reference"}
print(sorted(heavy & sys.modules.keys()))
"""
    assert run_python(code) == "[]\n"


def test_the_command_line_starts_without_the_compiler():
    code = "import sys, fastlstm.cli; print(sorted({'numba', 'torch', 'matplotlib'} & sys.modules.keys()))"
    assert run_python(code) == "[]\n"


def test_everything_public_is_there():
    for name in fastlstm.__all__:
        assert getattr(fastlstm, name) is not None
    assert {"LSTM", "Linear", "Sequential", "Stream", "from_torch", "load", "save"} <= set(fastlstm.__all__)
