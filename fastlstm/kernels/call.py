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
from fastlstm.kernels.simd import I64
from fastlstm.kernels.team import call_kernel, integer_at

__all__ = ["HEAD", "bind"]

HEAD = object.__basicsize__
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


def builtin_kernel(_: None):
    """Describe the built-in function: of the plan, whose first field is the kernel's address, and of array objects.

    It takes the address and the number of its arguments, two or four, and returns the second, the output.
    """

    def builtin(plan, arguments, count):
        plan = integer_at(plan + HEAD)
        x, out = integer_at(arguments), integer_at(arguments + 8)
        h_n, c_n = 0, 0
        if count == 4:
            h_n, c_n = integer_at(arguments + 16), integer_at(arguments + 24)
        state = _release_gil(0)
        call_kernel(integer_at(plan), plan, 0, x, out, h_n, c_n)
        _take_gil(state)
        _add_reference(out)
        return out

    return builtin, types.int64(types.int64, types.int64, types.int64)


@functools.cache
def _method() -> _Method:
    """Return the method definition, for ever: functions that outlive this module at exit still refer to it."""
    method = _Method(b"run", entry(builtin_kernel), METH_FASTCALL, None)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(method))
    return method


def bind(plan: NDArray[np.int64]) -> Callable[..., NDArray[Any]]:
    """Return a function that runs a plan on this thread: of x and out, or of x, out, h_n and c_n; it returns out."""
    function: Callable[..., NDArray[Any]] = _new_function(_method(), plan, None)
    return function
