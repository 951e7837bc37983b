"""The command line: ``fastlstm demo``, ``run``, ``bench``, ``info``, ``warmup``.

Exit status: 0; 2 after one line on stderr about a mistake in what was asked for; 130 after Ctrl-C. `bench` also has 1,
where fastlstm itself failed.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

import fastlstm
from fastlstm.bench import command as bench_command
from fastlstm.checks import NoCompilerError
from fastlstm.io.files import replacing
from fastlstm.io.sequences import OUTPUT_SUFFIXES, read_sequence, write_head, write_piece

if TYPE_CHECKING:
    from fastlstm.demo import DemoResult

__all__ = ["main"]

Array = NDArray[Any]

PIECE = 1 << 20  # numbers, in or out, that `run` holds at a time
PATIENCE = 2.0  # seconds before a progress bar is shown
TIMED_SECONDS = 0.5
ASCII = str.maketrans("▁▂▃▄▅▆▇█●│┤─┬└×σ–", "....####o||-+`xs-")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process unless given.

    Returns
    -------
    int
        Exit status.
    """
    if sys.stdout is None:  # closed by whoever started the process
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        options = _parser().parse_args(argv)
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, ValueError, TypeError, ImportError, MemoryError, NoCompilerError) as error:
        print(f"fastlstm: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastlstm", description="LSTM networks on CPUs.")
    parser.add_argument("--version", action="version", version=f"fastlstm {fastlstm.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    demo = add("demo", _demo, "run the packaged model on real data: its forecast, its errors, its speed beside NumPy")
    plot = demo.add_mutually_exclusive_group()
    plot.add_argument("--plot", metavar="FILE.png", help="draw the forecast there (needs matplotlib)")
    plot.add_argument("--no-plot", action="store_true", help="draw nothing")

    run = add("run", _run, "run a model over a sequence")
    run.add_argument("model", metavar="MODEL", help="a .safetensors file")
    run.add_argument("input", metavar="INPUT", type=Path, help="a .npy, .csv or .wav file: (T, I), or .npy (T, N, I)")
    run.add_argument("-o", "--output", required=True, type=Path, help="the .npy or .csv file to write")

    bench_command.add_options(add("bench", _bench, "compare with the LSTM libraries that are installed"))
    add("info", _info, "show versions, CPU features, threads and the compile cache")
    warmup = add("warmup", _warmup, "fill the compile cache for inference")
    warmup.add_argument("--dtype", action="append", choices=("float32", "float64"), help="default float32; repeatable")
    warmup.add_argument("--training", action="store_true", help="for training too")
    return parser


def _info(options: argparse.Namespace) -> int:
    fastlstm.show_config()
    return 0


def _warmup(options: argparse.Namespace) -> int:
    from fastlstm.kernels.compile import cache_folder

    start = time.perf_counter()
    fastlstm.warmup(options.dtype or ("float32",), options.training)
    print(f"ready after {time.perf_counter() - start:.1f} s, compile cache: {cache_folder() or 'none'}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    return bench_command.run(options, shlex.join(["fastlstm", *sys.argv[1:]]))


# run


def _run(options: argparse.Namespace) -> int:
    suffix = options.output.suffix.lower()
    if suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"{options.output}: the output must be a {' or '.join(OUTPUT_SUFFIXES)} file")
    model = fastlstm.load(options.model)
    sequence = read_sequence(options.input)
    shape, (I, features) = sequence.shape, model._ends
    if len(shape) not in (2, 3) or shape[-1] != I:
        wanted = f"{model._symbols('I')} or (T, I)"
        raise ValueError(f"{options.input}: the model takes shape {wanted} with I = {I}, got {shape}")
    if suffix == ".csv" and len(shape) == 3:
        raise ValueError(f"{options.output}: a .csv file holds (T, I), and {options.input} has shape {shape}; use .npy")
    start = time.perf_counter()
    with replacing(options.output) as file:
        write_head(file, suffix, (*shape[:-1], features), model.dtype)
        if model.bidirectional or 0 in shape or (model.batch_first and len(shape) == 3):
            write_piece(file, suffix, model(sequence.decode(sequence.stored))[0])
        else:
            T, N = shape[0], shape[1] if len(shape) == 3 else 1
            stream, progress = model.stream(N), _Progress(T)
            steps = max(1, PIECE // (N * max(I, features)))
            for first in range(0, T, steps):
                x = sequence.decode(sequence.stored[first : first + steps])
                y = stream(x.reshape(-1, N, I))
                write_piece(file, suffix, y.reshape(*x.shape[:-1], features))
                progress.show(first + len(x))
            progress.clear()
    print(f"{options.output}: {(*shape[:-1], features)} {model.dtype} after {time.perf_counter() - start:.1f} s")
    return 0


class _Progress:
    """A bar on a terminal, for what takes long."""

    def __init__(self, total: int) -> None:
        self._total, self._start = total, time.monotonic()
        self._next = self._start + PATIENCE
        self._wanted, self._shown = sys.stderr.isatty(), False

    def show(self, done: int) -> None:
        now = time.monotonic()
        if not self._wanted or now < self._next:
            return
        self._next, self._shown = now + 0.1, True
        share = done / self._total
        left = (now - self._start) * (1 - share) / share
        bar = ("#" * round(30 * share)).ljust(30, ".")
        print(f"\r[{bar}] {share:4.0%}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


# demo


def _demo(options: argparse.Namespace) -> int:
    from fastlstm import demo

    result = demo.run_demo(options.plot)
    first, last = result.years[[0, -1]]
    _show(f"Yearly sunspot numbers of {first}-{last}, which the model has not seen, and its forecasts beyond\n")
    if options.plot:
        _show(f"drawn in {options.plot}\n")
    elif not options.no_plot:
        columns, rows = shutil.get_terminal_size()
        _show(demo.plot_text(result, max(columns, 50), min(max(rows - 4, 8), 20)) + "\n")
    future = zip(result.future_years.tolist(), result.future.tolist(), strict=True)
    _show("Forecast: " + ", ".join(f"{year}: {number:.0f}" for year, number in future) + "\n")
    _show(f"Errors on {first}-{last}, in sunspot numbers\n{demo.errors_text(result)}\n")
    _show(_speed_text(result))
    return 0


def _show(text: str) -> None:
    """Print text, in ASCII where the terminal has nothing else."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.translate(ASCII).encode("ascii", "replace").decode()
    print(text)


def _speed_text(result: DemoResult) -> str:
    """Time the model beside NumPy: the whole series in one call, and one year in a stream."""
    from fastlstm import reference
    from fastlstm.bench.engines import time_calls

    model = result.forecaster.model
    stream = model.stream()
    weights = [layer.state_dict() for layer in model]

    def numpy_model(x: Array) -> Array:
        for params in weights:
            x = x @ params["weight"].T + params["bias"] if "weight" in params else reference.forward(params, x).output
        return x

    difference = float(np.abs(model(result.x)[0] - numpy_model(result.x)).max())
    lines = ["Median time of a call          fastlstm         NumPy"]
    for name, own, x in (
        (f"all {len(result.x)} years", model, result.x),
        ("one year, in a stream", stream, result.x[0]),
    ):
        mine = time_calls(partial(own, x), TIMED_SECONDS).median
        other = time_calls(partial(numpy_model, x.reshape(-1, 1, 1)), TIMED_SECONDS).median
        lines.append(f"{name:<24}{mine * 1e6:>12.1f} us{other * 1e6:>11.1f} us, {other / mine:.0f} times as long")
    return "\n".join([*lines, f"NumPy runs fastlstm.reference; the two outputs differ by {difference:.0e} at most."])
