"""The thread team: one parallel region a call, and in it phases that no thread can wait for in vain.

Work is cut into *phases* and each phase into *shares*.  A thread claims its own share first, so that its weights stay
in its own cache, and then whatever nobody has claimed: one thread alone still finishes, so a threading layer that
starts fewer threads than asked for, or runs them one after the other, cannot hang the call.

The counters of a call are int64, each on a cache line of its own: the tasks taken, where it does not matter who takes
which, or for each share the phases that were claimed of it and the phases that are done.  A thread polls the line of a
share that only its finisher writes, so that a phase costs one transfer between two caches.
"""

from __future__ import annotations

import sys

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastlstm.kernels.compile import unique
from fastlstm.kernels.simd import I8, I32, I64

__all__ = [
    "LINE",
    "byte_at",
    "call_kernel",
    "call_tile",
    "claim",
    "clear",
    "copy",
    "fence",
    "finish",
    "integer_at",
    "is_done",
    "lazy",
    "next_task",
    "on_stack",
    "part",
    "phase_part",
    "record",
    "record_at",
    "run_parallel",
    "set_integer",
]

LINE = 128  # bytes; two lines, because some CPUs fetch them in pairs
SPINS_BEFORE_YIELD = 4096  # a power of two
SPINS_BEFORE_STEAL = 1024  # tens of microseconds: a thread that is only late keeps its share and its cache


def _integer_pointer(builder, address):
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def integer_at(typingctx, address):
    """Return the int64 at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(_integer_pointer(builder, args[0]))

    return types.int64(types.int64), codegen


@intrinsic
def byte_at(typingctx, address):
    """Return the byte at an address."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.load(builder.inttoptr(args[0], I8.as_pointer())), I64)

    return types.int64(types.int64), codegen


@intrinsic
def set_integer(typingctx, address, value):
    """Write an int64 to an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], _integer_pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def record(*names):
    """Return a record of int64 fields."""
    return np.dtype([(name, np.int64) for name in names])


def record_at(record):
    """Return an intrinsic that makes a pointer to a record from an address."""

    @intrinsic
    def pointer(typingctx, address):
        result = types.CPointer(record)

        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), codegen

    return pointer


@intrinsic
def copy(typingctx, to, source, size):
    """Copy `size` bytes between addresses."""

    def codegen(context, builder, signature, args):
        to_, source_ = (builder.inttoptr(arg, I8.as_pointer()) for arg in args[:2])
        cgutils.raw_memcpy(builder, to_, source_, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def clear(typingctx, to, size):
    """Write `size` zero bytes to an address."""

    def codegen(context, builder, signature, args):
        cgutils.memset(builder, builder.inttoptr(args[0], I8.as_pointer()), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _add_atomic(typingctx, address, value):
    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _integer_pointer(builder, args[0]), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _load_atomic(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(_integer_pointer(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store_atomic(typingctx, address, value):
    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], _integer_pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fence(typingctx):
    """Let other threads see all that was written, past the caches too."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _exchange_if(typingctx, address, expected, value):
    """Write the value if the int64 is the expected one; return whether it was."""

    def codegen(context, builder, signature, args):
        pointer = _integer_pointer(builder, args[0])
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "acq_rel", "acquire"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx):
    """Tell the core that this is a spin loop."""

    def codegen(context, builder, signature, args):
        triple = builder.module.triple
        if triple.startswith(("x86_64", "i")):
            fn = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"
            )
            builder.call(fn, [])
        elif triple.startswith(("aarch64", "arm64")):
            fn = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [I32]), "llvm.aarch64.hint"
            )
            builder.call(fn, [I32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _yield_core(typingctx):
    """Let another thread have the core."""
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"

    def codegen(context, builder, signature, args):
        fn = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), name)
        builder.call(fn, [])
        return context.get_dummy_value()

    return types.void(), codegen


def part(result, *arguments):
    """Return a decorator that compiles a part of a kernel for these types alone, and without a way in from Python."""
    compiled = njit(result(*arguments), error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return lambda function: compiled(unique(function))


def lazy(function):
    """Compile a part of a kernel for the types it is first called with."""
    return njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


@lazy
def claim(counters, share, phase):
    """Return whether this thread, and no other, does a share of a phase."""
    return _exchange_if(counters + (1 + 2 * share) * LINE, phase, phase + 1)


@lazy
def finish(counters, share, phase):
    """Report a share of a phase as done."""
    _store_atomic(counters + (2 + 2 * share) * LINE, phase + 1)


@lazy
def is_done(counters, share, phase, spins):
    """Return whether a share of a phase is done before this thread has looked `spins` times; -1: wait for it."""
    looked = 0
    while _load_atomic(counters + (2 + 2 * share) * LINE) <= phase:
        if looked == spins:
            return False
        looked += 1
        if looked & (SPINS_BEFORE_YIELD - 1):
            _pause()
        else:
            _yield_core()
    return True


def phase_part(plan_type, state_type, run_share):
    """Return a part that does what this thread gets of a phase, its own share first, and waits for the rest.

    The plan has `counters`; the thread's state has `rank`, `shares`, `phase` and `impatient`, a bit for each share
    that nobody else did in the phase before, so that it is not waited for again.
    """

    @part(types.void, plan_type, state_type)
    def run_phase(p, q):
        for attempt in range(q.shares):
            share = attempt
            if q.shares > 1:
                share = (q.rank + attempt) % q.shares
                missing = 1 << (share & 63)
                spins = 0 if q.impatient & missing else SPINS_BEFORE_STEAL
                done = attempt > 0 and is_done(p.counters, share, q.phase, spins)
                if done or not claim(p.counters, share, q.phase):
                    q.impatient &= ~missing
                    continue
                if attempt > 0:
                    q.impatient |= missing
            run_share(p, q, share)
            if q.shares > 1:
                finish(p.counters, share, q.phase)
        if q.shares > 1:
            for share in range(q.shares):
                is_done(p.counters, share, q.phase, -1)
            q.phase += 1

    return run_phase


@lazy
def next_task(counters):
    """Return the number of a task that no other thread has."""
    return _add_atomic(counters, 1)


def _call(builder, address, args):
    entry = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(builder.inttoptr(address, entry.as_pointer()), args)


@intrinsic
def on_stack(typingctx, arguments):
    """Return the address of a table of int64 on this thread's stack, made of a tuple of them."""
    count = len(arguments)

    def codegen(context, builder, signature, args):
        table = cgutils.alloca_once(builder, ir.ArrayType(I64, count))
        for i, value in enumerate(cgutils.unpack_tuple(builder, args[0])):
            builder.store(value, builder.gep(table, [I32(0), I32(i)]))
        return builder.ptrtoint(table, I64)

    return types.int64(types.UniTuple(types.int64, count)), codegen


@intrinsic
def call_tile(typingctx, function, arguments):
    """Call the tile at an address with a table of the arguments, a tuple of int64, on this thread's stack."""
    count = len(arguments)

    def codegen(context, builder, signature, args):
        table = cgutils.alloca_once(builder, ir.ArrayType(I64, count))
        for i, value in enumerate(cgutils.unpack_tuple(builder, args[1])):
            builder.store(value, builder.gep(table, [I32(0), I32(i)]))
        _call(builder, args[0], [builder.ptrtoint(table, I64)])
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, count)), codegen


@intrinsic
def call_kernel(typingctx, kernel, plan, rank):
    """Call the kernel at an address with a plan at another, as one of the threads."""

    def codegen(context, builder, signature, args):
        _call(builder, args[0], args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def run_parallel(plan, ranks):
    """Run a plan once for each rank, in one parallel region; its first field is the kernel's address."""
    for rank in prange(ranks):
        call_kernel(integer_at(plan), plan, rank)
