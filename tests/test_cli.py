"""The command line: what it writes, what it prints, and one line for each mistake."""

import io
import json
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import environment

import fastlstm
from fastlstm import LSTM, Linear, Sequential, cli

on_posix = pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")


def random(shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with models and sequences of three numbers a step."""
    monkeypatch.chdir(tmp_path)
    fastlstm.save(Sequential(LSTM(3, 5, rng=0), Linear(5, 2, rng=1)), "model.safetensors")
    fastlstm.save(LSTM(3, 5, bidirectional=True, rng=0), "both.safetensors")
    fastlstm.save(LSTM(3, 5, batch_first=True, dtype="f8", rng=0), "rows.safetensors")
    fastlstm.save(LSTM(1, 2, rng=0), "mono.safetensors")
    np.save("x.npy", random((50, 3)))
    return tmp_path


def fails(capsys, *arguments):
    """Run a command that must fail, and return the one line that it says."""
    try:
        status = cli.main(arguments)
    except SystemExit as stop:  # as argparse does
        status = stop.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("fastlstm")
    return said.err


# run


@pytest.mark.parametrize("piece", [1 << 20, 40, 1], ids=["at once", "pieces", "steps"])
@pytest.mark.parametrize("model", ["model", "both", "rows"])
@pytest.mark.parametrize("shape", [(50, 3), (20, 4, 3), (0, 3), (5, 0, 3)], ids=str)
def test_run_gives_the_bits_of_the_model(folder, capsys, monkeypatch, model, shape, piece):
    monkeypatch.setattr(cli, "PIECE", piece)
    x = random(shape)
    np.save("x.npy", x)
    assert cli.main(["run", f"{model}.safetensors", "x.npy", "-o", "y.npy"]) == 0
    want, _ = fastlstm.load(f"{model}.safetensors")(x)
    written = np.load("y.npy")
    assert (written.shape, written.dtype) == (want.shape, want.dtype)
    assert written.tobytes() == want.tobytes()
    assert capsys.readouterr().out.startswith(f"y.npy: {want.shape} {want.dtype} after ")


def test_run_reads_and_writes_csv(folder):
    x = random((7, 3), np.float64)
    np.savetxt("x.csv", x, delimiter=",", header="a,b,c", comments="", fmt="%.17g")
    assert cli.main(["run", "model.safetensors", "x.csv", "--output", "y.csv"]) == 0
    want, _ = fastlstm.load("model.safetensors")(x)
    np.testing.assert_array_equal(np.loadtxt("y.csv", delimiter=",", dtype=np.float32), want)


def test_run_reads_wav(folder):
    samples = np.array([0, 16384, -32768, 32767], "<i2")
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16)
    data = struct.pack("<4sI", b"data", samples.nbytes) + samples.tobytes()
    with open("x.wav", "wb") as file:
        file.write(struct.pack("<4sI4s", b"RIFF", 4 + len(form) + len(data), b"WAVE") + form + data)
    assert cli.main(["run", "mono.safetensors", "x.wav", "-o", "y.npy"]) == 0
    want, _ = fastlstm.load("mono.safetensors")(samples[:, None] / 32768)
    np.testing.assert_array_equal(np.load("y.npy"), want)


def test_run_may_write_over_its_input(folder):
    want, _ = fastlstm.load("model.safetensors")(np.load("x.npy"))
    assert cli.main(["run", "model.safetensors", "x.npy", "-o", "x.npy"]) == 0
    np.testing.assert_array_equal(np.load("x.npy"), want)


def test_run_shows_progress_on_a_terminal_when_it_takes_long(folder, monkeypatch, capsys):
    monkeypatch.setattr(cli, "PIECE", 60)
    assert cli.main(["run", "model.safetensors", "x.npy", "-o", "y.npy"]) == 0
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["run", "model.safetensors", "x.npy", "-o", "y.npy"]) == 0
    assert terminal.getvalue() == ""  # it took no time
    monkeypatch.setattr(cli, "PATIENCE", 0.0)
    assert cli.main(["run", "model.safetensors", "x.npy", "-o", "y.npy"]) == 0
    first, *_, last = terminal.getvalue().split("\r")[1:]
    assert re.fullmatch(r"\[#{12}\.{18}\]  40%, \d+ s left ", first)
    assert last == ""


MISTAKES = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["walk"], "invalid choice: 'walk'"),
    "unknown option": (["info", "--all"], "unrecognized arguments: --all"),
    "no output": (["run", "model.safetensors", "x.npy"], "required: -o/--output"),
    "absent model": (["run", "absent.safetensors", "x.npy", "-o", "y.npy"], "absent.safetensors: No such file or"),
    "model a folder": (["run", ".", "x.npy", "-o", "y.npy"], ".: Is a directory"),
    "no model": (["run", "x.npy", "x.npy", "-o", "y.npy"], "x.npy: not a .safetensors file, or a damaged one"),
    "absent input": (
        ["run", "model.safetensors", "absent.npy", "-o", "y.npy"],
        "absent.npy: No such file or directory",
    ),
    "input a folder": (["run", "model.safetensors", "folder.npy", "-o", "y.npy"], "folder.npy: Is a directory"),
    "input unknown": (
        ["run", "model.safetensors", "model.safetensors", "-o", "y.npy"],
        "the input must be a .npy, .csv",
    ),
    "input damaged": (["run", "model.safetensors", "cut.npy", "-o", "y.npy"], "cut.npy: not a .npy file of numbers"),
    "input complex": (
        ["run", "model.safetensors", "z.npy", "-o", "y.npy"],
        "z.npy: holds complex128, not real numbers",
    ),
    "input ragged": (
        ["run", "model.safetensors", "ragged.csv", "-o", "y.npy"],
        "ragged.csv: line 3: 3 numbers expected",
    ),
    "input text": (["run", "model.safetensors", "text.csv", "-o", "y.npy"], "text.csv: line 2: 'x' is not a number"),
    "input empty": (["run", "model.safetensors", "empty.csv", "-o", "y.npy"], "empty.csv: no data"),
    "wrong columns": (
        ["run", "mono.safetensors", "x.npy", "-o", "y.npy"],
        "x.npy: the model takes shape (T, N, I) or (T, I) with I = 1, got (50, 3)",
    ),
    "wrong rank": (
        ["run", "rows.safetensors", "flat.npy", "-o", "y.npy"],
        "takes shape (N, T, I) or (T, I) with I = 3",
    ),
    "output unknown": (
        ["run", "model.safetensors", "x.npy", "-o", "y.txt"],
        "y.txt: the output must be a .npy or .csv",
    ),
    "output absent": (["run", "model.safetensors", "x.npy", "-o", "no/y.npy"], "no/y.npy: No such file or directory"),
    "output a folder": (["run", "model.safetensors", "x.npy", "-o", "folder.npy"], "folder.npy: Is a directory"),
    "output flat": (["run", "model.safetensors", "batch.npy", "-o", "y.csv"], "y.csv: a .csv file holds (T, I)"),
    "warmup": (["warmup", "--dtype", "float16"], "invalid choice: 'float16'"),
    "demo": (["demo", "--plot", "no/plot.png"], "no/plot.png: No such file or directory"),
    "demo format": (["demo", "--plot", "plot.xyz"], "Format 'xyz' is not supported"),
    "demo twice": (["demo", "--plot", "a.png", "--no-plot"], "not allowed with argument"),
    "bench model": (["bench", "absent.safetensors"], "absent.safetensors: No such file or directory"),
    "bench regime": (["bench", "--regime", "fast"], "no regime 'fast'"),
    "bench threads": (["bench", "--threads", "many"], "1 or more, or `all`, got 'many'"),
    "bench batch alone": (["bench", "-N", "2"], "-N is for a MODEL"),
    "bench steps alone": (["bench", "-T", "2"], "-T is for a MODEL"),
    "bench model and cases": (["bench", "model.safetensors", "--cases", "vad"], "--cases chooses other sizes than"),
    "bench memory": (["bench", "--memory", "b512"], "--memory is for --mode train"),
    "run a pipe": (["run", "model.safetensors", "pipe.npy", "-o", "y.npy"], "pipe.npy: not a regular file"),
    "bench batch": (["bench", "model.safetensors", "-N", "0"], "a case needs sizes of 1 or more"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line(folder, capsys, name):
    if name in ("demo", "demo format"):
        pytest.importorskip("matplotlib")
    if name == "run a pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no pipes with a name")
        os.mkfifo("pipe.npy")
    os.mkdir("folder.npy")
    np.save("z.npy", random((4, 3), complex))
    np.save("flat.npy", random(12))
    np.save("batch.npy", random((4, 2, 3)))
    with open("x.npy", "rb") as whole, open("cut.npy", "wb") as cut:
        cut.write(whole.read()[:-1])
    for text, content in {"ragged": "a,b,c\n1,2,3\n4,5\n", "text": "1,2,3\n4,x,5\n", "empty": ""}.items():
        with open(f"{text}.csv", "w") as file:
            file.write(content)
    before = sorted(os.listdir())
    arguments, message = MISTAKES[name]
    assert message in fails(capsys, *arguments)
    assert sorted(os.listdir()) == before


def test_a_failing_run_leaves_the_old_output(folder, capsys, monkeypatch):
    with open("y.npy", "wb") as file:
        file.write(b"old")

    def fill_the_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "write_piece", fill_the_disk)
    assert "No space left on device" in fails(capsys, "run", "model.safetensors", "x.npy", "-o", "y.npy")
    with open("y.npy", "rb") as file:
        assert file.read() == b"old"
    assert not [name for name in os.listdir() if name.endswith(".tmp")]


def start(*arguments, **options):
    variables = environment(**options.pop("variables", {}))
    return subprocess.Popen([sys.executable, "-m", "fastlstm", *arguments], env=variables, **options)


def test_interrupt_ends_a_run_quietly(folder, capsys, monkeypatch):
    before = sorted(os.listdir())

    def interrupt(*_):  # as the interpreter does; a signal itself is for subprocesses: other libraries handle it too
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "write_piece", interrupt)
    assert cli.main(["run", "model.safetensors", "x.npy", "-o", "y.npy"]) == 130
    assert capsys.readouterr() == ("", "")
    assert sorted(os.listdir()) == before


@on_posix
def test_broken_pipe_is_quiet():
    process = start("info", stdout=-1, stderr=-1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_a_mistake_ends_the_process_with_2(folder):
    process = start("run", "absent.safetensors", "x.npy", "-o", "y.npy", stdout=-1, stderr=-1)
    assert process.communicate(timeout=60) == (
        b"",
        f"fastlstm: absent.safetensors: {os.strerror(2)}{os.linesep}".encode(),
    )
    assert process.returncode == 2


# demo, info, warmup, bench


def test_demo_shows_forecast_errors_and_speed(capsys, monkeypatch):
    monkeypatch.setattr(cli, "TIMED_SECONDS", 0.001)
    assert cli.main(["demo"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "● forecast" in shown.out
    assert re.search(r"Forecast: 2009: \d+, 2010: \d+", shown.out)
    assert re.search(r"LSTM +13\.7 +11\.0", shown.out)
    assert re.search(r"seasonal naive +37\.2", shown.out)
    assert re.search(r"all 309 years +\d+\.\d us +\d+\.\d us, \d+ times as long", shown.out)
    difference = float(re.search(r"differ by (\S+) at most", shown.out)[1])
    assert difference < 1e-5
    assert cli.main(["demo", "--no-plot"]) == 0
    assert "● forecast" not in capsys.readouterr().out


def test_demo_draws_a_png(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli, "TIMED_SECONDS", 0.001)
    assert cli.main(["demo", "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert f"drawn in {tmp_path / 'plot.png'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["forecast", "forecast.svg", "."])
def test_a_plot_is_written_where_it_says(tmp_path, capsys, monkeypatch, name):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "TIMED_SECONDS", 0.001)
    status = cli.main(["demo", "--plot", name])
    if name == ".":
        assert status == 2
        assert capsys.readouterr().err == "fastlstm: .: Is a directory\n"
        assert not list(tmp_path.iterdir())
    else:
        assert status == 0
        assert f"drawn in {name}\n" in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_bytes()[:5] == (b"<?xml" if name.endswith("svg") else b"\x89PNG\r")


@on_posix
def test_without_a_standard_output():
    command = f"exec {sys.executable} -m fastlstm info >&-"
    done = subprocess.run(["sh", "-c", command], stderr=-1, check=False, env=environment())
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("option", ["--json", "--readme", "--chart"])
def test_bench_looks_first_where_it_will_write(option, capsys):
    if option == "--chart":
        pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--cases", "step32", option, "absent/file.png"]) == 2
    assert capsys.readouterr().err == "fastlstm: absent/file.png: No such file or directory\n"


@pytest.mark.parametrize("size", [(1, 1), (300, 100)], ids=str)
def test_demo_fits_any_terminal_and_encoding(size):
    variables = {"COLUMNS": str(size[0]), "LINES": str(size[1]), "PYTHONIOENCODING": "ascii"}
    process = start("demo", stdout=-1, stderr=-1, variables=variables)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
    assert "o forecast" in out.decode("ascii")
    assert b"?" not in out


def test_info_is_show_config(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    fastlstm.show_config()
    assert shown == capsys.readouterr().out


def test_warmup_fills_the_cache(tmp_path):
    process = start("warmup", stdout=-1, variables={"FASTLSTM_CACHE": str(tmp_path)})
    out = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0
    assert re.match(rf"ready after \d+\.\d s, compile cache: {re.escape(str(tmp_path))}", out)
    assert list(tmp_path.rglob("*.*"))


def test_bench_compares_the_layers_of_a_model(folder, capfd):
    options = ["--engines", "fastlstm,numpy", "--threads", "1", "--rounds", "1", "--json", "bench.json"]
    assert cli.main(["bench", "model.safetensors", "-N", "2", "-T", "7", *options]) == 0
    with open("bench.json") as file:
        result = json.load(file)
    assert [(entry["case"]["N"], entry["case"]["T"]) for entry in result["results"]] == [(2, 7)]
    assert result["results"][0]["engines"]["fastlstm"]["median"] > 0
    assert "layer 0" in capfd.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["bench", "--help"], ["--version"]])
def test_help_and_version(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(("usage: fastlstm", f"fastlstm {fastlstm.__version__}\n"))
