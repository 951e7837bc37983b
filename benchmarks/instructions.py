"""Instructions that a call executes, counted by valgrind: within half a percent the same on a busy machine.

They are those of the code for AVX2, whatever this CPU has: valgrind knows no AVX-512. A register that spills,
an activation that grows, a loop that is no longer vectorised and a heavier Python layer show; caches and memory do not.
Valgrind computes a multiply-add in software, so a case is counted over as many steps as take a second or two there.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from .common import cases

TRAINING = ", training"  # behind the name of a case: a recorded call and its gradients
CASES = ["step32", "short", "audio40", "vad", "vowels", "deepar", "ocr", "rl", "b256"]
CASES += [f"{name}{TRAINING}" for name in ("short", "vowels", "rl")]
VALGRIND = ["valgrind", "--tool=callgrind", "--dump-before=getppid"]  # getppid marks where a count ends
LANES = 8  # float32 in a register of AVX2
LEAST = 1000  # instructions: fewer are those of no call
MOST_FLOPS = 2e7  # of a call, unless a single step has more: 2 s under valgrind

AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+f16c,+fma,+fxsr,+lzcnt,+mmx,+movbe,+popcnt,+sse,+sse2,"
    "+sse3,+sse4.1,+sse4.2,+ssse3,+xsave",
    "FASTLSTM_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}

# Arguments: mode, calls and the sizes of a case; as often as there are cases.
CALLS = """
import os, sys
import numpy, fastlstm
for arguments in sys.argv[1:]:
    mode, *numbers = arguments.split(",")
    calls, I, H, L, D, N, T = map(int, numbers)
    rng = numpy.random.default_rng(0)
    lstm = fastlstm.LSTM(I, H, L, bidirectional=D == 2, rng=0)
    x = rng.standard_normal((T, N, I), numpy.float32)
    d_output = rng.standard_normal((T, N, D * H), numpy.float32)
    if mode == "train" and not hasattr(lstm, "record"):
        calls, call = 0, lambda: None
    elif mode == "train":
        call = lambda: lstm.record(x).backward(d_output)
    elif T * D == 1:
        stream, step = lstm.stream(N), x[0]
        call = lambda: stream(step)
    else:
        call = lambda: lstm(x)
    call()
    os.getppid()
    for _ in range(calls):
        call()
    os.getppid()
"""


def count_instructions(names):
    """Count the instructions of a call for each case, in one process.

    Parameters
    ----------
    names : sequence of str
        Of `CASES`.

    Returns
    -------
    dict of str to float
        Instructions of a call, Python and NumPy included; without the training of a version that has none.

    Raises
    ------
    NotImplementedError
        If valgrind is not installed, or the CPU is not of the kind it counts for.
    """
    if shutil.which("valgrind") is None or platform.machine() not in ("x86_64", "AMD64"):
        raise NotImplementedError("instructions are counted by valgrind, on x86-64 alone")
    chosen = [_cut(name) for name in names]
    repeats = [max(1, min(100, round(MOST_FLOPS / flops(name)))) for name in names]
    modes = ["train" if name.endswith(TRAINING) else "infer" for name in names]
    arguments = [f"{mode},{count},{case.shape}" for mode, count, case in zip(modes, repeats, chosen, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | AVX2 | {"FASTLSTM_CACHE": folder}
        command = [sys.executable, "-c", CALLS, *arguments]
        subprocess.run(command, env=environment, check=True)  # compiles, which under valgrind takes minutes
        out = Path(folder) / "callgrind"
        subprocess.run(
            [*VALGRIND, f"--callgrind-out-file={out}", *command], env=environment, check=True, stderr=subprocess.DEVNULL
        )
        parts = sorted(Path(folder).glob("callgrind.*"), key=lambda path: int(path.suffix[1:]))
        totals = [_total(part) for part in parts]
    # Two marks a case: what lies before the first, between the two, before the first of the next ...
    assert len(totals) >= 2 * len(chosen), f"{len(totals)} counts for {len(chosen)} cases"
    counts = {name: totals[2 * k + 1] / repeats[k] for k, name in enumerate(names)}
    return {name: count for name, count in counts.items() if count >= LEAST}


def _cut(name):
    """Return a case with no more steps than can be counted in seconds."""
    (case,) = cases.select(names=[name.removesuffix(TRAINING)])
    return replace(case, T=max(1, min(case.T, round(MOST_FLOPS * case.T / case.flops() / _products(name)))))


def _products(name):
    """Return how many matrix products a weight takes part in: those of d_x and of d_w are as large as the forward's."""
    return 3 if name.endswith(TRAINING) else 1


def flops(name):
    """Return the floating-point operations of what is counted."""
    return _products(name) * _cut(name).flops()


def _total(path):
    """Return the number of instructions of one dump."""
    (line,) = (line for line in path.read_text().splitlines() if line.startswith("totals:"))
    return int(line.split()[1])


def per_multiply_add(name, instructions):
    """Return the instructions for each multiply-add of a vector register that the case cannot do without."""
    return instructions / (flops(name) / 2 / LANES)


class Instructions:
    """One process counts all cases."""

    version = "1"
    params = [CASES]
    param_names = ["case"]
    unit = "instructions"

    def setup_cache(self):
        try:
            return count_instructions(CASES)
        except NotImplementedError as reason:
            print(reason)
            return {}

    def setup(self, counts, case):
        if case not in counts:
            raise NotImplementedError("not counted on this machine, or no training in this version")

    def track_instructions(self, counts, case):
        return counts[case]
