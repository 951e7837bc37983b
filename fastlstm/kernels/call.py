"""Calling a kernel from Python in a tenth of a microsecond.

A call through ctypes takes half a microsecond and one through a Numba dispatcher a third: as long as a step of 32
cells.  So a kernel is made a built-in function here, as C extensions make them: bound to its plan, called with array
objects.
The address of an array's data is the first field behind the object's head in NumPy's documented C interface.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastlstm.kernels.compile import entry
from fastlstm.kernels.simd import I8, I64
from fastlstm.kernels.team import call_kernel, integer_at, lazy, set_integer

__all__ = ["address", "bind"]

HEAD = object.__basicsize__
FIRST = 1  # field of a plan that has the address of the first array; before it stands the kernel's
METH_FASTCALL = 0x80

_probe = np.zeros(1)
if ctypes.c_void_p.from_address(id(_probe) + HEAD).value != _probe.ctypes.data:
    raise ImportError("fastlstm needs CPython and a NumPy that lays out its arrays as in its documented C interface")


class _Method(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_new_function = ctypes.pythonapi.PyCFunction_NewEx
_new_function.argtypes = [ctypes.POINTER(_Method), ctypes.py_object, ctypes.c_void_p]
_new_function.restype = ctypes.py_object


def _python(name: str, result: ir.Type, *arguments: ir.Type) -> Any:
    """Return an intrinsic that calls a function of CPython's C interface; pointers are integers."""

    @intrinsic
    def call(typingctx, argument):
        def codegen(context, builder, signature, args):
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)
            value = builder.call(function, args[: len(arguments)])
            return value if result is I64 else I64(0)

        return types.int64(types.int64), codegen

    return call


_release_gil = _python("PyEval_SaveThread", I64)
_take_gil = _python("PyEval_RestoreThread", ir.VoidType(), I64)
_add_reference = _python("Py_IncRef", ir.VoidType(), I64)


@intrinsic
def _none(typingctx):
    """Return the address of None."""

    def codegen(context, builder, signature, args):
        name = "_Py_NoneStruct"
        found = builder.module.globals.get(name) or ir.GlobalVariable(builder.module, I8, name)
        return builder.ptrtoint(found, I64)

    return types.int64(), codegen


@lazy
def _place(plan, arguments, count):
    """Write where the data of array objects is to a plan."""
    none = _none()
    for k in range(count):
        array = integer_at(arguments + 8 * k)
        set_integer(plan + (FIRST + k) * 8, 0 if array == none else integer_at(array + HEAD))


def running_kernel(_: None):
    """Describe the built-in function: of the plan, and of array objects or None, whose addresses it writes there.

    It takes the address and the number of its arguments and returns the second, the output, where there are two.
    """

    def running(plan, arguments, count):
        plan = integer_at(plan + HEAD)
        _place(plan, arguments, count)
        state = _release_gil(0)
        call_kernel(integer_at(plan), plan, 0)
        _take_gil(state)
        result = _none() if count < 2 else integer_at(arguments + 8)
        _add_reference(result)
        return result

    return running, types.int64(types.int64, types.int64, types.int64)


def placing_kernel(_: None):
    """Describe a built-in function that only writes the addresses."""

    def placing(plan, arguments, count):
        _place(integer_at(plan + HEAD), arguments, count)
        _add_reference(_none())
        return _none()

    return placing, types.int64(types.int64, types.int64, types.int64)


@functools.cache
def _method(describe: Any) -> _Method:
    """Return a method definition, for ever: functions that outlive this module at exit still refer to it."""
    method = _Method(b"run", entry(describe, None), METH_FASTCALL, None)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(method))
    return method


def bind(plan: NDArray[np.int64], run: bool = True) -> Callable[..., Any]:
    """Return a function that runs a plan on this thread: of the arrays whose addresses come first in it.

    None is 0. Arrays that are not given stay those of before. It returns the second, where there are two.
    run : False: it only writes the addresses.
    """
    function: Callable[..., Any] = _new_function(_method(running_kernel if run else placing_kernel), plan, None)
    return function


def address(array: NDArray[Any] | None) -> int:
    """Return where an array's data is, 0 for None; in a quarter of the time that `array.ctypes` takes."""
    return 0 if array is None else ctypes.c_size_t.from_address(id(array) + HEAD).value
