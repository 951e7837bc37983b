"""A good guest in the host's process: threads, forks, caches, memory, start. Each test starts its own interpreters."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SOURCES, environment, loads, run_python

import fastlstm

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")

COUNT_REGIONS = """
regions = []  # who entered a parallel region, and was it granted

def count_regions():
    fastlstm.threads.Pace.allows_region = lambda *_: True  # however busy the machine is
    run_region = region.run_region
    def counted(*args):
        done = run_region(*args)
        regions.append((os.getpid(), done))
        return done
    region.run_region = counted
"""
# A layer, its input, and its output by the serial kernel; `parallel` shares every later call out among 2 threads.
START = (
    COUNT_REGIONS
    + """
import contextlib, os, sys, threading, warnings
import numpy as np
import fastlstm
from functools import partialmethod
from fastlstm.kernels import network, region

lstm = fastlstm.LSTM(3, 40, num_layers=2, rng=0)
x = np.random.default_rng(0).normal(size=(50, 8, 3)).astype(np.float32)
with contextlib.ExitStack() as stack:
    stack.enter_context(fastlstm.threads.region)  # taken: this call runs the serial kernel
    expected = lstm(x)[0].tobytes()

def parallel(ranks=2, shares=2, groups=1, hoisted=True, chunk=16):
    how = network.Strategy(ranks, shares, groups, hoisted, chunk)
    count_regions()
    network.Network.forward = partialmethod(network.Network.forward, how=how)
    network.choose_strategy = lambda *_: how

def same():
    return lstm(x)[0].tobytes() == expected
"""
)


def run(code: str, *args: str, **variables: str | None) -> str:
    return run_python(START + code, *args, **variables)


# Threads


def test_the_forced_strategy_does_enter_parallel_regions(threading_layer: str) -> None:
    """What the other tests of this file stand on."""
    output = run(
        "parallel(); assert same(); assert regions == [(os.getpid(), True)]\n"
        "import numba; print(numba.threading_layer())",
        NUMBA_THREADING_LAYER=threading_layer,
    )
    assert output.split() == [threading_layer]


@pytest.mark.parametrize("shares", ["1", "2"], ids=["rows", "units"])
def test_eight_threads_call_one_layer_at_once(threading_layer: str, shares: str) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
parallel(shares=int(sys.argv[1]), groups=3)
barrier = threading.Barrier(8)
def work(_):
    barrier.wait()
    return all([same() for _ in range(50)])
with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(work, range(8)))
assert len(regions) == 400 and any(done for _, done in regions)
"""
    run(code, shares, NUMBA_THREADING_LAYER=threading_layer)


USERS_OWN = """
import numba
@numba.njit(parallel=True, nogil=True)
def add_up(a):
    total = 0.0
    for i in numba.prange(a.size):
        total += a[i]
    return total
ones = np.ones(100_000)
"""


def test_beside_a_parallel_function_of_the_user(threading_layer: str) -> None:
    """The user's thread enters its own parallel regions while another calls the layer."""
    code = (
        USERS_OWN
        + """
add_up(ones)
parallel()
stop = threading.Event()
sums = []
def user():
    while not stop.is_set():
        sums.append(add_up(ones))
thread = threading.Thread(target=user)
thread.start()
try:
    assert all([same() for _ in range(300)])
finally:
    stop.set()
    thread.join()
assert set(sums) == {1e5}
"""
    )
    run(code, NUMBA_THREADING_LAYER=threading_layer)


def test_inside_a_thread_pool_of_the_user(threading_layer: str) -> None:
    """Each task calls the layer and the user's function, one task at a time in a parallel region of the user's."""
    code = (
        USERS_OWN
        + """
from concurrent.futures import ThreadPoolExecutor
add_up(ones)
parallel()
lock = threading.Lock()
def task(_):
    ok = same()
    with lock:
        return ok and add_up(ones) == 1e5
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(task, range(200)))
"""
    )
    run(code, NUMBA_THREADING_LAYER=threading_layer)


def test_the_hosts_settings_are_left_alone(threading_layer: str) -> None:
    code = """
import numba
np.seterr(all="raise", under="ignore")
numba.set_num_threads(1)
def settings():
    options = {name: getattr(numba.config, name) for name in dir(numba.config) if name.isupper()}
    return options, numba.get_num_threads(), np.geterr(), list(warnings.filters), dict(os.environ)
before = settings()
parallel()
big = x * np.float32(1e30)
for _ in range(3):
    assert same()
    lstm(big, lengths=[0, 1, 2, 3, 4, 5, 6, 50])
    lstm.stream(8)(x)
lstm(x.astype(np.float64) * 1e300)
fastlstm.set_num_threads(2)
fastlstm.set_num_threads(1)
assert same()
assert settings() == before
"""
    run(code, NUMBA_THREADING_LAYER=threading_layer, NUMBA_NUM_THREADS="2")


def test_a_call_at_the_interpreters_exit(threading_layer: str) -> None:
    code = """
import atexit
parallel()
assert same()
atexit.register(lambda: print(same()))
"""
    assert run(code, NUMBA_THREADING_LAYER=threading_layer).split() == ["True"]


def test_a_mask_of_the_users_cannot_hang_a_call(threading_layer: str) -> None:
    """With one thread where two were asked for, that one does the shares of both."""
    code = """
import numba
numba.set_num_threads(1)
for how in [(2, 2, 1), (4, 4, 1), (3, 1, 8)]:
    parallel(*how)
    assert same()
assert all(done for _, done in regions)
"""
    run(code, NUMBA_THREADING_LAYER=threading_layer)


@pytest.mark.parametrize(
    ("value", "expected"), [("1", "1"), ("2", "2"), ("1000", "4"), ("", None), ("0", None), ("-3", None), ("two", None)]
)
def test_environment_sets_the_number_of_threads(value: str, expected: str | None) -> None:
    default = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    output = run_python(
        "import fastlstm; print(fastlstm.get_num_threads())", FASTLSTM_NUM_THREADS=value, NUMBA_NUM_THREADS="4"
    )
    if expected:
        assert output.split() == [expected]
    else:
        assert 1 <= int(output) <= (default or 1)


# A pool with one thread, which is slow, and no way to start another.
SLOW_POOL = """
import time
from concurrent.futures import ThreadPoolExecutor
ended, entered = [False], []  # is the call over; was it, as each thread entered the kernel
kernel_type = region._KERNEL
def slow_kernel(address):
    kernel = kernel_type(address)
    def run(plan, rank):
        if rank:
            time.sleep(0.2)
        entered.append(ended[0])
        if not ended[0]:
            kernel(plan, rank)
    return run
region._KERNEL = slow_kernel
region._pool = ThreadPoolExecutor(3)
start = threading.Thread.start
def start_one(self):
    threading.Thread.start = refuse
    start(self)
def refuse(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start_one
"""


def test_a_call_ends_with_no_thread_inside() -> None:
    code = (
        SLOW_POOL
        + "parallel(ranks=3); assert same(); ended[0] = True; time.sleep(0.5); assert not any(entered), entered"
    )
    run(code, NUMBA_THREADING_LAYER="workqueue", NUMBA_NUM_THREADS="4")


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers here")
def test_a_stream_that_is_interrupted_has_a_state(threads: str) -> None:
    """That from before the chunk, or that from behind it: the kernel runs to its end, and the interrupt comes then."""
    code = """
import signal
lstm = fastlstm.LSTM(8, 128, rng=0)
x = np.random.default_rng(0).normal(size=(30_001, 1, 8)).astype(np.float32)
stream = lstm.stream()
stream(x)
after = stream.state
stream.reset()
before = stream.state
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.01)
try:
    stream(x)
except KeyboardInterrupt:
    pass
signal.setitimer(signal.ITIMER_REAL, 0)
print(int(all((part == whole).all() for part, whole in zip(stream.state, after))))
assert any(all((part == whole).all() for part, whole in zip(stream.state, state)) for state in (before, after))
"""
    run(code, FASTLSTM_NUM_THREADS=threads)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers here")
def test_an_interrupted_call_ends(threading_layer: str) -> None:
    code = """
import signal
import numba
lstm, x = fastlstm.LSTM(64, 128, rng=0), np.ones((600, 64, 64), np.float32)
fastlstm.set_num_threads(2)
expected = lstm(x)[0].tobytes()
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
interrupted = 0
for delay in (0.005, 0.01, 0.02, 0.03):
    signal.setitimer(signal.ITIMER_REAL, delay)
    try:
        while True:
            lstm(x)
    except KeyboardInterrupt:
        interrupted += 1
assert interrupted == 4
assert lstm(x)[0].tobytes() == expected
print(numba.threading_layer())
"""
    assert run(code, NUMBA_THREADING_LAYER=threading_layer, NUMBA_NUM_THREADS="2").split() == [threading_layer]


# Fork and spawn

CHILD = """
def fork(work):
    pid = os.fork()
    if pid == 0:
        import signal
        signal.alarm(20)  # a child that hangs is killed
        os._exit(0 if work() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of a fork beside threads
"""


@can_fork
def test_fork_after_use(threading_layer: str) -> None:
    code = (
        CHILD
        + """
parallel()
stream = lstm.stream(8)
first = stream(x[:20])
def child():
    lstm2 = fastlstm.LSTM(3, 40, num_layers=2, rng=0)  # packs anew
    return all([same() for _ in range(5)]) and lstm2(x)[0].tobytes() == expected and fork(same) == 0 and (
        np.concatenate([first, stream(x[20:])]).tobytes() == expected)
assert same()
for _ in range(3):
    assert fork(child) == 0
    assert same()
assert np.concatenate([first, stream(x[20:])]).tobytes() == expected
assert regions[-1] == (os.getpid(), True)
"""
    )
    run(code, NUMBA_THREADING_LAYER=threading_layer)


@can_fork
def test_fork_before_use(threading_layer: str) -> None:
    code = (
        CHILD
        + """
parallel()
assert fork(same) == 0
assert same()
assert fork(same) == 0
"""
    )
    run(code, NUMBA_THREADING_LAYER=threading_layer)


@can_fork
def test_fork_while_other_threads_are_in_calls(threading_layer: str) -> None:
    code = (
        CHILD
        + """
parallel()
stop = threading.Event()
def work():
    while not stop.is_set():
        assert same()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
def child():
    return same() and fastlstm.LSTM(3, 40, num_layers=2, rng=0)(x)[0].tobytes() == expected
try:
    results = [fork(child) for _ in range(12)]
finally:
    stop.set()
    for thread in threads:
        thread.join()
assert results == [0] * 12, results
assert same()
"""
    )
    run(code, NUMBA_THREADING_LAYER=threading_layer)


@can_fork
def test_no_fork_while_a_first_parallel_region_imports(threading_layer: str) -> None:
    """A child forked meanwhile would wait for ever for a module that only its parent's other thread was to finish."""
    code = """
import sys, threading, time
import numpy as np
import fastlstm

layer, x = fastlstm.LSTM(128, 128), np.zeros((64, 32, 128), np.float32)
fastlstm.set_num_threads(1)
layer(x)
from fastlstm.kernels.compile import compiling

class Witness:
    guarded = {}
    def find_spec(self, name, path=None, target=None):
        self.guarded[name] = compiling._is_owned()

sys.meta_path.insert(0, Witness())
fastlstm.set_num_threads(2)
layer(x)
import numba
assert numba.threading_layer() == sys.argv[1]
assert "multiprocessing" in Witness.guarded and all(Witness.guarded.values()), Witness.guarded

import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of a fork beside threads
inside, done = threading.Event(), []
def first_call():
    with compiling:
        inside.set()
        time.sleep(0.3)
        done.append(True)
thread = threading.Thread(target=first_call)
thread.start()
inside.wait()
pid = os.fork()
if pid == 0:
    os._exit(0 if done else 1)
assert os.waitpid(pid, 0)[1] == 0
thread.join()
"""
    run_python(code, threading_layer, timeout=60, NUMBA_THREADING_LAYER=threading_layer, NUMBA_NUM_THREADS="2")


MULTIPROCESSING = """
import multiprocessing, sys
import numpy as np
import helper

if __name__ == "__main__":
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    import fastlstm
    method = sys.argv[1]
    lstm = fastlstm.LSTM(3, 40, num_layers=2, rng=0)
    x = np.random.default_rng(0).normal(size=(50, 8, 3)).astype(np.float32)
    helper.parallel()
    expected = lstm(x)[0].tobytes()
    stream = lstm.stream(8)
    first = stream(x[:20])
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.map(helper.compute, [(lstm, x)] * 6)
        rest = pool.apply_async(helper.step, (stream, x[20:])).get(120)
    assert all(result == expected for result in results)
    assert np.concatenate([first, rest]).tobytes() == expected
    assert lstm(x)[0].tobytes() == expected
"""
HELPER = """
from functools import partialmethod
from fastlstm.kernels import network

def parallel():
    how = network.Strategy(2, 2, 1, True, 16)
    network.Network.forward = partialmethod(network.Network.forward, how=how)

def compute(arguments):
    parallel()
    lstm, x = arguments
    return lstm(x)[0].tobytes()

def step(stream, x):
    return stream(x)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(threading_layer: str, method: str, tmp_path: Path) -> None:
    import multiprocessing

    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"there is no {method} here")
    (tmp_path / "main.py").write_text(MULTIPROCESSING)
    (tmp_path / "helper.py").write_text(HELPER)
    done = subprocess.run(
        [sys.executable, "main.py", method], cwd=tmp_path, env=environment(NUMBA_THREADING_LAYER=threading_layer),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# The compile cache; without optimisation, as compiling is what takes the time here

COMPILES = """
import numba.core.compiler as compiler
compile_extra = compiler.CompilerBase.compile_extra
compiled = []
def counted(self, func):
    compiled.append(func.__name__)
    return compile_extra(self, func)
compiler.CompilerBase.compile_extra = counted
"""
QUICK = {"NUMBA_OPT": "0"}
WORK = """
import numpy as np, fastlstm
x = np.random.default_rng(0).normal(size=(6, 3, 3)).astype(np.float32)
lstm = fastlstm.LSTM(3, 21, num_layers=2, rng=0)
print(lstm(x)[0].tobytes().hex())
lstm.stream(3)(x[0])
"""


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a cache that 8 processes filled at once, and what each of them printed."""
    folder = tmp_path_factory.mktemp("cache")
    variables = environment(FASTLSTM_CACHE=str(folder), **QUICK)
    command = [sys.executable, "-c", COMPILES + WORK + "print(len(compiled))"]
    running = [
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    results = [(process.communicate(timeout=600), process.returncode) for process in running]
    for (_, errors), status in results:
        assert status == 0, errors
    outputs = [output.split() for (output, _), _ in results]
    assert all(int(count) > 0 for _, count in outputs)
    assert len({values for values, _ in outputs}) == 1
    return folder, outputs[0][0]


def test_a_cold_cache_filled_by_eight_processes_serves_the_ninth(filled: tuple[Path, str]) -> None:
    folder, expected = filled
    before = {path: path.stat().st_mtime_ns for path in files(folder)}
    assert before
    output = run_python(COMPILES + WORK + "print(*compiled)", FASTLSTM_CACHE=str(folder), **QUICK)
    assert output.split() == [expected]
    assert {path: path.stat().st_mtime_ns for path in files(folder)} == before


def damage(kind: str, content: bytes) -> bytes:
    rng = np.random.default_rng(0)
    if kind == "empty":
        return b""
    if kind == "cut":
        return content[: len(content) * 2 // 3]
    if kind == "noise":
        return rng.bytes(len(content))
    if kind == "zeros":
        return bytes(len(content))
    changed = np.frombuffer(content, np.uint8).copy()
    if kind == "machine":  # of the object file: LLVM ends the process where it does not know it
        changed[content.find(b"\x7fELF") + 18] ^= 255
    else:
        changed[rng.integers(0, changed.size, 50)] ^= 255
    return changed.tobytes()


@pytest.mark.parametrize("kind", ["empty", "cut", "noise", "zeros", "flipped", "machine"])
def test_damaged_cache_files_are_compiled_again(filled: tuple[Path, str], kind: str, tmp_path: Path) -> None:
    folder, expected = filled
    shutil.copytree(folder, tmp_path / "cache")
    for path in files(tmp_path / "cache"):
        path.write_bytes(damage(kind, path.read_bytes()))
    variables = QUICK | {"FASTLSTM_CACHE": str(tmp_path / "cache")}
    assert run_python(WORK, **variables).split() == [expected]
    assert run_python(COMPILES + WORK + "print(*compiled)", **variables).split() == [
        expected
    ]  # they have been replaced


def test_an_edited_kernel_is_not_answered_from_a_stale_cache(filled: tuple[Path, str], tmp_path: Path) -> None:
    """The constant is in a file of its own, that the kernels which use it are not in."""
    folder, expected = filled
    shutil.copytree(SOURCES / "fastlstm", tmp_path / "fastlstm", ignore=shutil.ignore_patterns("__pycache__"))
    variables = QUICK | {"FASTLSTM_CACHE": str(folder), "PYTHONPATH": str(tmp_path)}
    assert run_python(COMPILES + WORK + "print(*compiled)", **variables).split() == [expected]  # the same sources
    path = tmp_path / "fastlstm" / "kernels" / "activations.py"
    source = path.read_text()
    edited = re.sub(r"tanh_range=-\d+\.0", "tanh_range=-0.125", source)
    assert edited != source
    path.write_text(edited)
    assert run_python(WORK, **variables).split() != [expected]
    path.write_text(source)
    assert run_python(COMPILES + WORK + "print(*compiled)", **variables).split() == [expected]


@pytest.mark.parametrize("flag", ["NUMBA_OPT", "NUMBA_CPU_NAME", "NUMBA_BOUNDSCHECK"])
def test_another_flag_is_another_entry(filled: tuple[Path, str], flag: str) -> None:
    folder, _ = filled
    before = files(folder)
    variables = {**QUICK, "FASTLSTM_CACHE": str(folder), flag: "generic" if flag == "NUMBA_CPU_NAME" else "1"}
    run_python(WORK, **variables)
    assert len(files(folder)) > len(before)


@pytest.mark.parametrize("where", ["off", "file", "absent", "read-only"])
def test_without_a_cache_it_still_works(filled: tuple[Path, str], where: str, tmp_path: Path) -> None:
    """Turned off; a home that is a file; one that cannot be made; one that cannot be written."""
    home = tmp_path / "home"
    variables: dict[str, str | None] = {"HOME": str(home), "XDG_CACHE_HOME": None, "FASTLSTM_CACHE": None}
    if where == "off":
        home.mkdir()
        variables["FASTLSTM_CACHE"] = "0"
    elif where == "file":
        home.write_text("")
    elif where == "absent":
        variables["HOME"] = "/proc/none"
    elif os.getuid() == 0:
        pytest.skip("root can write everywhere")
    else:
        home.mkdir(mode=0o500)
    assert run_python(WORK, **QUICK, **variables).split() == [filled[1]]
    assert not home.is_dir() or not files(home)


def test_a_cache_that_cannot_be_written_is_read(filled: tuple[Path, str], tmp_path: Path) -> None:
    """As in an image that was built by another user; one with nothing in it is none."""
    deny = """
import tempfile
def refuse(*arguments, **options):
    raise PermissionError("read-only")
tempfile.TemporaryFile = tempfile.mkstemp = refuse
"""
    folder, expected = filled
    variables = QUICK | {"FASTLSTM_CACHE": str(folder)}
    assert run_python(deny + COMPILES + WORK + "print(*compiled)", **variables).split() == [expected]
    code = deny + "from fastlstm.kernels.compile import cache_folder; print(cache_folder())"
    assert run_python(code, **variables | {"FASTLSTM_CACHE": str(tmp_path)}).split() == ["None"]


def test_the_cache_lies_in_the_users_cache_folder(filled: tuple[Path, str], tmp_path: Path) -> None:
    code = "from fastlstm.kernels.compile import cache_folder; print(cache_folder())"
    variables = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": None, "FASTLSTM_CACHE": None}
    if sys.platform == "linux":
        assert run_python(code, **variables).startswith(str(tmp_path / "home" / ".cache" / "fastlstm"))
        assert run_python(code, **variables | {"XDG_CACHE_HOME": str(tmp_path / "xdg")}).startswith(
            str(tmp_path / "xdg")
        )
        # A user without an entry in the user database: `~` stays as it is.
        nobody = "import os; os.path.expanduser = lambda path: path\n"
        assert run_python(nobody + code, **variables | {"HOME": None}).split() == ["None"]
    assert run_python(code, **variables | {"FASTLSTM_CACHE": str(tmp_path / "c")}).startswith(str(tmp_path / "c"))
    assert run_python(code, **variables | {"FASTLSTM_CACHE": "0"}).split() == ["None"]


# Other instruction sets


@pytest.mark.parametrize("cpu", ["haswell", "generic"])
def test_other_instruction_sets_are_correct(cpu: str) -> None:
    """Agreement with the reference and the invariants in short; the tolerance has room for sums that are not fused."""
    code = """
import numpy as np
import fastlstm
from fastlstm import reference
from fastlstm.kernels.simd import target
for dtype, wide in ((np.float32, np.float64), (np.float64, np.longdouble)):
    pairs = [(1, 0), (3, 2), (4, 0), (7, 0), (8, 5), (13, 12), (16, 0), (17, 0), (24, 9), (33, 0), (64, 0), (65, 31)]
    for H, P in pairs:
        rng = np.random.default_rng(H)
        lstm = fastlstm.LSTM(5, H, 2, bidirectional=True, proj_size=P, dtype=dtype, rng=rng)
        x = rng.normal(size=(9, 7, 5)).astype(dtype)
        options = {"lengths": rng.integers(0, 10, 7), "reset": rng.random((9, 7)) < 0.2}
        output, (h_n, c_n) = lstm(x, **options)
        exact = reference.forward({k: v.astype(wide) for k, v in lstm.state_dict().items()}, x.astype(wide), **options)
        limit = 20 * np.finfo(dtype).eps * np.sqrt(5 + 3 * H)
        for got, want in zip((output, h_n, c_n), (exact.output, *exact.state)):
            assert np.abs(got - want).max() <= limit, (H, P, dtype)
        for n in range(7):
            length = options["lengths"][n]
            alone, _ = lstm(x[:length, n], reset=options["reset"][:length, n])
            assert (alone == output[:length, n]).all()
        lstm = fastlstm.LSTM(5, H, 2, proj_size=P, dtype=dtype, rng=rng)
        stream = lstm.stream(7)
        assert (np.stack([stream(x_t) for x_t in x]) == lstm(x)[0]).all()
print(target().vector_bits, target().fma)
"""
    bits, fused = run_python(code, NUMBA_CPU_NAME=cpu).split()
    if cpu == "haswell" and sys.platform == "linux" and "avx2" in Path("/proc/cpuinfo").read_text():
        assert (bits, fused) == ("256", "True")


# Start


def test_import_does_nothing_to_the_process() -> None:
    code = (
        """
import sys, os, warnings, threading
import numba, numpy as np
"""
        + COMPILES
        + """
def settings():
    options = {name: getattr(numba.config, name) for name in dir(numba.config) if name.isupper()}
    return options, np.geterr(), list(warnings.filters), dict(os.environ), threading.active_count(), os.getcwd()
before, modules = settings(), set(sys.modules)
import fastlstm
assert settings() == before
assert not compiled, compiled
layer = fastlstm.LSTM(3, 5)
assert not compiled, compiled
try:
    numba.threading_layer()
except ValueError:
    pass  # no threading layer has been started
else:
    raise AssertionError
new = set(sys.modules) - modules
for name in ("torch", "safetensors", "onnx", "matplotlib"):
    assert name not in new, name
for name in ("bench", "demo", "cli", "torch"):
    assert "fastlstm." + name not in new, name
"""
    )
    run_python(code)


def test_a_layer_may_outlive_its_module_at_exit() -> None:
    """Python takes modules apart in any order; freed memory is overwritten, so that using it shows (with glibc)."""
    code = """
import builtins
import numpy as np, fastlstm
x = np.ones((2, 1, 3), np.float32)
lstm = fastlstm.LSTM(3, 5)
lstm(x)
stream = lstm.stream()
stream(x[0])
builtins.kept = lstm, stream
"""
    run_python(code, PYTHONMALLOC="malloc", MALLOC_PERTURB_="34")


def test_a_small_call_starts_no_threads() -> None:
    code = """
import threading, os
import numpy as np, numba, fastlstm
fastlstm.LSTM(3, 5)(np.ones((4, 2, 3), np.float32))
try:
    numba.threading_layer()
except ValueError:
    pass
else:
    raise AssertionError
"""
    run_python(code)


# Memory

MEMORY = """
import re, sys
import numpy as np
import fastlstm

def field(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

def growth(call):
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak
    before = field("VmRSS")
    call()
    return field("VmHWM") - before
"""


@on_linux
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize(
    ("steps", "layer", "options"),
    [
        (100_000, "16, 256", "{}"),
        (20_000, "16, 256", "{'reset': np.zeros((20_000, 1), bool)}"),
        (20_000, "16, 256", "{'lengths': [19_999]}"),
        (20_000, "1, 256, 2", "{}"),  # the input product is not hoisted; there is something between layers
        (20_000, "1, 257, 2, proj_size=256", "{}"),
    ],
)
def test_memory_does_not_grow_with_the_length_of_a_sequence(threads: str, steps: int, layer: str, options: str) -> None:
    """Under 8 MB beside input, output and weights; the control shows that 8 MB would be seen."""
    code = (
        MEMORY
        + f"""
lstm = fastlstm.LSTM({layer})
x, out = np.ones(({steps}, 1, lstm.input_size), np.float32), np.ones(({steps}, 1, 256), np.float32)
options = {options}
lstm(x[:50])
lstm(x[:50], reset=np.zeros((50, 1), bool), lengths=[50])
def control():
    lstm(x, out=out, **options)
    np.ones(1 << 20)
used = growth(lambda: lstm(x, out=out, **options))
print(used, max(growth(control), growth(control)))  # what was given back to the system meanwhile hides some of it
"""
    )
    used, control = map(int, run_python(code, FASTLSTM_NUM_THREADS=threads).split())
    assert used < 8e6
    assert control > 8e6


@on_linux
def test_nothing_leaks() -> None:
    """2,000 calls of many kinds, with errors among them; the control shows that 1 KB a call would be seen."""
    code = (
        MEMORY
        + """
import gc, tracemalloc
lstm = fastlstm.LSTM(5, 33, 2, rng=0)
double = fastlstm.LSTM(5, 33, 2, bidirectional=True, dtype=np.float64, proj_size=7)
rng = np.random.default_rng(0)
kept = []
def work(count, leak=0):
    for i in range(count):
        T, N = rng.integers(1, 12, 2)
        x = rng.normal(size=(T, N, 5))
        lengths, reset = rng.integers(0, T + 1, N), rng.random((T, N)) < 0.1
        output, state = lstm(x, lengths=lengths, reset=reset)
        lstm(x, state)
        lstm(x.astype(np.float32))
        double(x, lengths=lengths)
        stream = lstm.stream(N)
        stream(x)
        stream(x[0])
        stream.reset([0])
        if i % 20 == 0:
            lstm.bias_ih_l0 = lstm.bias_hh_l0
        try:
            lstm(x[:, :, 1:])
        except ValueError:
            pass
        if leak:
            kept.append(np.ones(leak, np.uint8))
    for T in range(1, 9):  # what is left to the next calls is of the same sizes each time
        for layer in lstm, double:
            layer(np.ones((T, 4, 5)))
    gc.collect()
work(500)
before = field("VmRSS")
work(2000)
grown = field("VmRSS") - before
tracemalloc.start()
work(50)
def traced_growth(leak):
    start = tracemalloc.get_traced_memory()[0]
    work(200, leak)
    return tracemalloc.get_traced_memory()[0] - start
traced = min(traced_growth(0), traced_growth(0))  # once in a while Python's table of interned strings grows: 2 MB
leaked = traced_growth(1024)
tracemalloc.stop()
before = field("VmRSS")
work(500, leak=20_000)
print(grown, traced, leaked, field("VmRSS") - before)
"""
    )
    grown, traced, leaked, control = map(int, run_python(code).split())
    assert grown < 2e6 < control
    assert traced < 1e5 < leaked


@on_linux
def test_replaced_weights_are_given_back_at_once() -> None:
    """Not only when Python's collector comes by, which counts objects and not their bytes."""
    code = (
        MEMORY
        + """
import gc
gc.disable()
lstm = fastlstm.LSTM(256, 512)  # 6 MB, and as much packed
x = np.ones((3, 1, 256), np.float32)
def work():
    for _ in range(20):
        lstm.bias_ih_l0 = lstm.bias_hh_l0
        lstm(x)
        lstm.stream()(x)
work()
print(growth(work))
"""
    )
    assert int(run_python(code)) < 40e6


# What the machine may be set to


def test_flushing_denormals_in_the_callers_thread_changes_nothing_elsewhere() -> None:
    """PyTorch can set it for a thread; the layer does not read or change the setting."""
    pytest.importorskip("torch")
    code = """
import numpy as np, torch, fastlstm
x = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
lstm = fastlstm.LSTM(3, 40, rng=0)
expected = lstm(x)[0]
tiny = np.float32([1e-40])
assert (tiny * np.float32(0.5)).any()
if torch.set_flush_denormal(True):
    assert not (tiny * np.float32(0.5)).any()
    assert (lstm(x)[0] == expected).all()
    assert not (tiny * np.float32(0.5)).any()
"""
    run_python(code)


def test_version_is_that_of_the_package() -> None:
    assert run_python("import fastlstm; print(fastlstm.__version__)").split() == [fastlstm.__version__]


def test_helpers_report_a_crash() -> None:
    """A test that cannot fail is none: a subprocess that ends badly must be seen."""
    for code in ("raise SystemExit(3)", "import os; os.abort()"):
        with pytest.raises(AssertionError, match="exit status"):
            run_python(code)
    assert loads("no such layer") is False
