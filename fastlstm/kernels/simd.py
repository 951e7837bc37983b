"""Explicit SIMD: maths on vectors that emits LLVM instructions while a kernel is compiled.

A `Vec` stands for one `<lanes x float>` register.  Python code that works on `Vec` runs once, at compile time, and each
operator appends an instruction: Python loops are unrolled loops, Python functions are inlined functions.  Nothing
depends on the auto-vectoriser.  `kernel` turns such an emitter into a function that Numba code calls with integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

__all__ = [
    "I64",
    "Bits",
    "Builder",
    "Pointer",
    "Target",
    "Vec",
    "bundle",
    "concat",
    "fma",
    "kernel",
    "target",
    "transpose",
]

I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
TABLE = I64.as_pointer()


@dataclass(frozen=True)
class Target:
    """What the code generator has: bits in a vector register, how many registers, a fused multiply-add."""

    cpu: str
    vector_bits: int
    registers: int
    fma: bool

    def lanes(self, dtype: np.dtype) -> int:
        """Return the numbers of `dtype` that one register holds."""
        return self.vector_bits // (8 * dtype.itemsize)


def _probe(triple: str, cpu: str, features: str) -> tuple[int, bool]:
    """Compile one 16-lane fused multiply-add and read off the instruction that was chosen."""
    source = """
    declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
    define <16 x float> @probe(<16 x float> %a, <16 x float> %b, <16 x float> %c) {
      %d = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %b, <16 x float> %c)
      ret <16 x float> %d
    }"""
    module = llvm.parse_assembly(source)
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=2)
    assembly = machine.emit_assembly(module)
    fused = "vfmadd" in assembly or "fmla" in assembly
    bits = next((bits for register, bits in (("zmm", 512), ("ymm", 256)) if register in assembly), 128)
    return bits, fused


@functools.cache
def target() -> Target:
    """Return what Numba's code generator may use in this process.

    `NUMBA_CPU_NAME=haswell` alone keeps the host's feature list in Numba; the smaller of the two is meant.
    """
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    bits, fused = _probe(triple, cpu, features)
    if bits > 128:
        bits = min(bits, _probe(triple, cpu, "")[0])
    registers = 32 if bits == 512 or triple.startswith(("aarch64", "arm64")) else 16
    return Target(cpu, bits, registers, fused)


class Builder:
    """An instruction stream for vectors of one dtype, with the few scalar operations that addresses need."""

    def __init__(self, builder: ir.IRBuilder, dtype: np.dtype):
        self.ir = builder
        self.dtype = dtype
        self.scalar = ir.FloatType() if dtype.itemsize == 4 else ir.DoubleType()
        self.lanes = target().lanes(dtype)
        self.fused = target().fma

    def vector(self, lanes: int) -> ir.VectorType:
        """Return the LLVM type of `lanes` numbers."""
        return ir.VectorType(self.scalar, lanes)

    def splat(self, scalar: ir.Value, lanes: int) -> Vec:
        """Return a vector with the scalar in every lane."""
        vector = self.vector(lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.ir.insert_element(undefined, scalar, I32(0))
        return Vec(self, self.ir.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)))

    def pointer(self, address: ir.Value) -> Pointer:
        """Return a pointer to numbers of the dtype from an integer address."""
        return Pointer(self, self.ir.inttoptr(address, self.scalar.as_pointer()))

    def call(self, name: str, args: Sequence[ir.Value], result: ir.Type) -> ir.Value:
        """Call an LLVM intrinsic."""
        declared = cgutils.get_or_insert_function(
            self.ir.module, ir.FunctionType(result, [arg.type for arg in args]), name
        )
        return self.ir.call(declared, args)

    def loop(
        self, count: ir.Value, body: Callable[[ir.Value, list[Vec]], list[Vec]], carried: Sequence[Vec] = ()
    ) -> list[Vec]:
        """Emit `for k in range(count): carried = body(k, carried)` with the carried vectors in registers."""
        b = self.ir
        entry = b.block
        head, inside, end = (b.append_basic_block(name) for name in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        k = b.phi(I64)
        registers = [b.phi(vec.values[0].type) for vec in carried]
        b.cbranch(b.icmp_signed("<", k, count), inside, end)
        b.position_at_end(inside)
        updated = body(k, [Vec(self, register) for register in registers])
        k.add_incoming(I64(0), entry)
        k.add_incoming(b.add(k, I64(1)), b.block)
        for register, before, vec in zip(registers, carried, updated, strict=True):
            register.add_incoming(before.values[0], entry)
            register.add_incoming(vec.values[0], b.block)
        b.branch(head)
        b.position_at_end(end)
        return [Vec(self, register) for register in registers]


class Pointer:
    """A pointer to numbers; offsets count numbers and may be Python or LLVM integers."""

    def __init__(self, builder: Builder, value: ir.Value):
        self.builder, self.value = builder, value

    def __add__(self, offset: int | ir.Value) -> Pointer:
        offset = I64(offset) if isinstance(offset, int) else offset
        return Pointer(self.builder, self.builder.ir.gep(self.value, [offset]))

    def _as_vector(self, lanes: int) -> ir.Value:
        return self.builder.ir.bitcast(self.value, self.builder.vector(lanes).as_pointer())

    def load(self, lanes: int) -> Vec:
        """Return the `lanes` numbers here."""
        return Vec(self.builder, self.builder.ir.load(self._as_vector(lanes), align=self.builder.dtype.itemsize))

    def broadcast(self, lanes: int) -> Vec:
        """Return the one number here in every lane."""
        return self.builder.splat(self.builder.ir.load(self.value), lanes)

    def prefetch(self, near: bool = False, write: bool = False) -> None:
        """Ask for the cache line here: to L2, or to L1 where it is needed soon or will be written."""
        b = self.builder.ir
        name = "llvm.prefetch.p0" if llvm.llvm_version_info[0] > 14 else "llvm.prefetch.p0i8"
        how = [I32(int(write)), I32(3 if near or write else 2), I32(1)]
        self.builder.call(name, [b.bitcast(self.value, I8.as_pointer()), *how], ir.VoidType())

    def store(self, vec: Vec, past_caches: bool = False) -> None:
        """Write one register here; past the caches it must be aligned, and other threads see it after a `fence`."""
        b, size = self.builder.ir, self.builder.dtype.itemsize
        written = b.store(*vec.values, self._as_vector(vec.lanes), align=vec.lanes * size if past_caches else size)
        if past_caches:
            written.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))

    def store_first(self, vec: Vec, count: ir.Value) -> None:
        """Write the first `count` lanes here and touch nothing behind them."""
        self._masked("store", vec.lanes, count, vec.values, (), ir.VoidType())

    def load_first(self, lanes: int, count: ir.Value) -> Vec:
        """Return the first `count` numbers here and zeros in the lanes behind, touching nothing there."""
        vector = self.builder.vector(lanes)
        zeros = ir.Constant(vector, [ir.Constant(self.builder.scalar, 0.0)] * lanes)
        return Vec(self.builder, self._masked("load", lanes, count, (), (zeros,), vector))

    def _masked(
        self, action: str, lanes: int, count: ir.Value, before: Sequence[ir.Value], behind: Sequence[ir.Value],
        result: ir.Type,
    ) -> ir.Value:  # fmt: skip
        """Call LLVM's masked load or store of the first `count` lanes."""
        b = self.builder
        index = ir.VectorType(I64, lanes)
        undefined = ir.Constant(index, ir.Undefined)
        first = b.ir.insert_element(undefined, count, I32(0))
        counts = b.ir.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))
        mask = b.ir.icmp_signed("<", ir.Constant(index, list(range(lanes))), counts)
        suffix = f"v{lanes}f{8 * b.dtype.itemsize}"
        pointee = "" if llvm.llvm_version_info[0] > 14 else suffix
        name = f"llvm.masked.{action}.{suffix}.p0{pointee}"
        return b.call(name, [*before, self._as_vector(lanes), I32(b.dtype.itemsize), mask, *behind], result)


class Vec:
    """Vector registers side by side while a kernel is emitted; a Python number beside it stands in every lane.

    An operator appends its instruction for each register in turn: several registers are several independent chains.
    """

    def __init__(self, builder: Builder, *values: ir.Value):
        self.builder, self.values = builder, values

    @property
    def lanes(self) -> int:
        """Numbers in one of the registers."""
        return int(self.values[0].type.count)

    def _constant(self, value: float) -> ir.Constant:
        """Return a register with `value`, rounded to the dtype, in every lane."""
        scalar = ir.Constant(self.builder.scalar, float(self.builder.dtype.type(value)))
        return ir.Constant(self.values[0].type, [scalar] * self.lanes)

    def operands(self, other: Vec | float) -> Sequence[ir.Value]:
        """Return what stands beside each register."""
        return other.values if isinstance(other, Vec) else [self._constant(other)] * len(self.values)

    def _apply(self, instruction: Callable[[ir.Value, ir.Value], ir.Value], other: Vec | float) -> Vec:
        return Vec(self.builder, *map(instruction, self.values, self.operands(other)))

    def __add__(self, other: Vec | float) -> Vec:
        return self._apply(self.builder.ir.fadd, other)

    def __sub__(self, other: Vec | float) -> Vec:
        return self._apply(self.builder.ir.fsub, other)

    def __mul__(self, other: Vec | float) -> Vec:
        return self._apply(self.builder.ir.fmul, other)

    def __truediv__(self, other: Vec | float) -> Vec:
        return self._apply(self.builder.ir.fdiv, other)

    def __rsub__(self, other: float) -> Vec:
        return Vec(self.builder, *map(self.builder.ir.fsub, self.operands(other), self.values))

    def __rtruediv__(self, other: float) -> Vec:
        return Vec(self.builder, *map(self.builder.ir.fdiv, self.operands(other), self.values))

    def __neg__(self) -> Vec:
        return Vec(self.builder, *map(self.builder.ir.fneg, self.values))

    def at_most(self, bound: float) -> Vec:
        """Return the smaller of each lane and `bound`; NaN stays NaN."""
        return self._bounded(">", bound)

    def at_least(self, bound: float) -> Vec:
        """Return the larger of each lane and `bound`; NaN stays NaN."""
        return self._bounded("<", bound)

    def _bounded(self, beyond: str, bound: float) -> Vec:
        b = self.builder.ir
        limit = self._constant(bound)
        return Vec(self.builder, *(b.select(b.fcmp_ordered(beyond, v, limit), limit, v) for v in self.values))

    def unless_below(self, x: Vec, bound: float, value: float) -> Vec:
        """Return `value` in the lanes where x is below the bound, and this vector in the others."""
        b = self.builder.ir
        limit, instead = self._constant(bound), self._constant(value)
        pairs = zip(self.values, x.values, strict=True)
        return Vec(self.builder, *(b.select(b.fcmp_ordered("<", at, limit), instead, v) for v, at in pairs))

    def bits(self) -> Bits:
        """Return the lanes' bits as integers."""
        width = ir.VectorType(ir.IntType(8 * self.builder.dtype.itemsize), self.lanes)
        return Bits(self.builder, *(self.builder.ir.bitcast(v, width) for v in self.values))

    def zeros(self) -> Vec:
        """Return zeros of this shape."""
        return Vec(self.builder, *self.operands(0.0))

    def part(self, start: int, count: int) -> Vec:
        """Return lanes start to start + count of a single register."""
        (value,) = self.values
        if count == self.lanes:
            return self
        mask = ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
        return Vec(self.builder, self.builder.ir.shuffle_vector(value, value, mask))

    def registers(self) -> list[Vec]:
        """Return each register on its own."""
        return [Vec(self.builder, value) for value in self.values]


class Bits:
    """The bits of a `Vec` as integers; a Python integer beside it means that integer in every lane."""

    def __init__(self, builder: Builder, *values: ir.Value):
        self.builder, self.values = builder, values

    def _apply(self, instruction: Callable[[ir.Value, ir.Value], ir.Value], other: Bits | int) -> Bits:
        if isinstance(other, Bits):
            return Bits(self.builder, *map(instruction, self.values, other.values))
        width = self.values[0].type
        constant = ir.Constant(width, [other & ((1 << width.element.width) - 1)] * width.count)
        return Bits(self.builder, *(instruction(value, constant) for value in self.values))

    def __add__(self, other: Bits | int) -> Bits:
        return self._apply(self.builder.ir.add, other)

    def __lshift__(self, other: int) -> Bits:
        return self._apply(self.builder.ir.shl, other)

    def __and__(self, other: Bits | int) -> Bits:
        return self._apply(self.builder.ir.and_, other)

    def __or__(self, other: Bits | int) -> Bits:
        return self._apply(self.builder.ir.or_, other)

    def numbers(self) -> Vec:
        """Return the bits as numbers."""
        vector = self.builder.vector(self.values[0].type.count)
        return Vec(self.builder, *(self.builder.ir.bitcast(value, vector) for value in self.values))


def fma(a: Vec, b: Vec | float, c: Vec | float) -> Vec:
    """Return a * b + c, rounded once where the target can; elsewhere a multiply and an add."""
    builder = a.builder
    if not builder.fused:
        return a * b + c
    name = f"llvm.fma.v{a.lanes}f{8 * builder.dtype.itemsize}"
    operands = zip(a.values, a.operands(b), a.operands(c), strict=True)
    return Vec(builder, *(builder.call(name, abc, builder.vector(a.lanes)) for abc in operands))


def concat(parts: Sequence[Vec]) -> Vec:
    """Return the lanes of equal-sized registers side by side in one; the number of them is a power of two."""
    parts = list(parts)
    while len(parts) > 1:
        lanes = 2 * parts[0].lanes
        mask = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        parts = [
            Vec(low.builder, low.builder.ir.shuffle_vector(*low.values, *high.values, mask))
            for low, high in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def bundle(vecs: Sequence[Vec]) -> Vec:
    """Return the registers of several vectors as one."""
    return Vec(vecs[0].builder, *(value for vec in vecs for value in vec.values))


def transpose(b: Builder, rows: list[Vec]) -> list[Vec]:
    """Return the columns of a square of registers: at each step squares of `half` by `half` change places."""
    lanes, half = len(rows), 1
    while half < lanes:
        low = [lane - half + lanes if lane & half else lane for lane in range(lanes)]
        high = [lane + lanes if lane & half else lane + half for lane in range(lanes)]
        after = list(rows)
        for i in range(lanes):
            if not i & half:
                after[i] = _pick(b, rows[i], rows[i + half], low)
                after[i + half] = _pick(b, rows[i], rows[i + half], high)
        rows, half = after, 2 * half
    return rows


def _pick(b: Builder, first: Vec, second: Vec, lanes: list[int]) -> Vec:
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return Vec(b, b.ir.shuffle_vector(*first.values, *second.values, mask))


def kernel(
    dtype: np.dtype, name: str, arity: int, emit: Callable[..., None], variants: Mapping[int, object]
) -> Callable[[int], None]:
    """Make an emitter callable from Numba code, once for each variant.

    Parameters
    ----------
    dtype : numpy.dtype
        The numbers it works on.
    name : str
        Its name in the assembly.
    arity : int
        How many int64 arguments it takes: addresses in bytes, counts and strides in numbers.
    emit : callable
        `emit(builder, variant, *arguments)`.
    variants : mapping
        What `variant` is in each function, by its index.

    Returns
    -------
    callable
        For Numba code: `call(address)`, where an int64 table lies: the index of the variant and then the arguments.
    """

    def add_variant(module: ir.Module, index: int) -> ir.Function:
        fn = ir.Function(
            module, ir.FunctionType(ir.VoidType(), [TABLE]), f"fastlstm_{name}_f{8 * dtype.itemsize}_{index}"
        )
        fn.linkage = "internal"
        for attribute in ("nounwind", "noinline", "optsize"):  # optsize: k loops are not unrolled into kilobytes
            fn.attributes.add(attribute)
        builder = ir.IRBuilder(fn.append_basic_block("entry"))
        args = [builder.load(builder.gep(fn.args[0], [I64(1 + i)])) for i in range(arity)]
        emit(Builder(builder, dtype), variants[index], *args)
        builder.ret_void()
        return fn

    @intrinsic
    def call(typingctx, address):
        def codegen(context, builder, signature, values):
            table = builder.inttoptr(values[0], TABLE)
            end = builder.append_basic_block("end")
            switch = builder.switch(builder.load(table), end)
            for index in variants:
                variant = add_variant(builder.module, index)
                with builder.goto_block(builder.append_basic_block(f"variant_{index}")):
                    builder.call(variant, [table])
                    builder.branch(end)
                    switch.add_case(I64(index), builder.block)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return call
