"""The options of a comparison, shared by ``fastlstm bench`` and ``benchmarks/peers.py``."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import report
from .cases import MODES, REGIMES, Case, LanguageCase, Problem, make_problem, parse_case, problems_of_model, select
from .compare import compare, usable_cpus
from .worker import ENGINES

__all__ = ["add_options", "run"]

MEMORY_CASE = "b512"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a comparison to a parser."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model file whose LSTM layers to run instead of the standard sizes")
    add("-N", "--batch", type=int, metavar="N", help="batch for MODEL (default 1)")
    add("-T", "--steps", type=int, metavar="T", help="steps for MODEL (default 100)")
    add("--threads", default="1,all", help="numbers of threads, `all` for the CPUs there are (default %(default)s)")
    add("--regime", help=f"{', '.join(REGIMES)}, language in mode train, or all (default); with commas")
    add("--cases", default="", metavar="NAMES", help="cases of the standard table by name, with commas")
    add("--shape", action="append", default=[], metavar="I,H,L,D,N,T", help="another size; may be given again")
    add("--dtype", choices=("float32", "float64"), default="float32", help="default %(default)s")
    add("--lengths", choices=("full", "uniform"), default="full", help="uniform draws each row's from 1..T")
    add("--engines", default="", metavar="NAMES", help=f"of {', '.join(ENGINES['infer'])} (default: those installed)")
    add("--rounds", type=int, default=5, help="turns of each engine at each size (default %(default)s)")
    add(
        "--mode", choices=MODES, default="infer", help="train times a forward and a backward pass (default %(default)s)"
    )
    add("--memory", metavar="NAMES", help=f"cases whose memory mode train measures (default {MEMORY_CASE})")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add(
        "--readme",
        type=Path,
        metavar="FILE",
        help="put the tables between the file's bench:start and bench:end marks, or bench-train:... for mode train",
    )
    add("--chart", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    add("--from-json", type=Path, metavar="FILE", help="report on these results; nothing is run")


def run(options: argparse.Namespace, command: str) -> int:
    """Run a comparison, or take one from a file, and report it.

    Parameters
    ----------
    options : argparse.Namespace
        From a parser with `add_options`.
    command : str
        How the comparison was started, for the record.

    Returns
    -------
    int
        Exit status: 0, or 1 if fastlstm itself was left out of a case because it failed or was wrong.

    Raises
    ------
    ValueError
        If an option makes no sense or a file does not hold what it should.
    OSError
        If a file cannot be read or written.
    """
    if options.chart is not None:
        report.require_matplotlib()
    for path in filter(None, (options.json, options.readme, options.chart)):  # before what takes minutes
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    _check_together(options)
    if options.from_json is None:
        result = compare(
            _problems(options),
            threads=[_thread_count(text) for text in _names(options.threads)],
            engines=_names(options.engines) or None,
            rounds=options.rounds,
            memory=_memory_cases(options),
            command=command,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    else:
        result = _read(options.from_json)
    print(report.terminal(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.readme is not None:
        report.write_readme(result, options.readme)
    if options.chart is not None:
        report.write_chart(result, options.chart)
    for failure in result["failures"]:
        print(f"fastlstm FAILED at {failure}", file=sys.stderr)
    return 1 if result["failures"] else 0


def _check_together(options: argparse.Namespace) -> None:
    """Raise if an option is given that another makes meaningless."""
    without_model = {"-N": options.batch, "-T": options.steps}
    with_model = {"--regime": options.regime, "--cases": options.cases, "--shape": options.shape}
    given = next((name for name, value in without_model.items() if value is not None), None)
    if options.model is None and given:
        raise ValueError(f"{given} is for a MODEL")
    given = next((name for name, value in with_model.items() if value), None)
    if options.model is not None and given:
        raise ValueError(f"{given} chooses other sizes than those of MODEL")
    if options.memory is not None and options.mode != "train":
        raise ValueError("--memory is for --mode train")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _thread_count(text: str) -> int:
    if text == "all":
        return usable_cpus()
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"a number of threads is 1 or more, or `all`, got {text!r}")
    return int(text)


def _memory_cases(options: argparse.Namespace) -> list[str]:
    if options.mode != "train":
        return []
    names = _names(MEMORY_CASE if options.memory is None else options.memory)
    return [case.name for case in select(names=names, mode="train")] if names else []


def _problems(options: argparse.Namespace) -> list[Problem]:
    if options.model is not None:
        import fastlstm

        model = fastlstm.load(options.model)
        N = 1 if options.batch is None else options.batch
        T = 100 if options.steps is None else options.steps
        return problems_of_model(model, N, T, options.lengths, options.mode)
    extra = [parse_case(text) for text in options.shape]
    names = _names(options.cases)
    # Sizes given alone are run alone; with cases or regimes they come on top of these.
    table: list[Case] = []
    regime = options.regime or "all"
    if not extra or names or regime != "all":
        table = select(_names(regime), names, options.mode)
    if options.lengths != "full" and not names:
        table = [case for case in table if not isinstance(case, LanguageCase)]  # which have none
    return [make_problem(case, np.dtype(options.dtype), options.lengths, options.mode) for case in (*table, *extra)]


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {"results", "engines", "machine", "versions"} <= result.keys():
            return result
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        pass
    raise ValueError(f"{path} does not hold the results of a comparison")
