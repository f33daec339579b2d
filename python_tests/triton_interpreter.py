"""Triton's interpreter, made to compute what a GPU computes where it does not.

Imported by conftest.py. These faults are in 3.6 and later; test_mrope_triton.py shows that the
mending works.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
_dot = InterpreterBuilder.create_dot
_patch_tensor = interpreter._patch_lang_tensor


def _to_bfloat16(src):
    floats = torch.from_numpy(np.ascontiguousarray(src.data))
    bits = floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return TensorHandle(bits, tl.bfloat16)


def _is_narrowing(src, dst_type):
    return src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16


def cast_impl(self, src, dst_type):
    """float32 to bfloat16 rounds to nearest even; the interpreter cuts off."""
    return _to_bfloat16(src) if _is_narrowing(src, dst_type) else _cast(self, src, dst_type)


def create_fp_to_fp(self, src, dst_type, rounding_mode):
    """The same where a rounding mode is named."""
    if _is_narrowing(src, dst_type):
        return _to_bfloat16(src)
    return _fp_to_fp(self, src, dst_type, rounding_mode)


def create_fma(self, x, y, z):
    """Rounds once, as fma does; the interpreter rounds the product too. float32 alone."""
    assert x.data.dtype == np.float32
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(exact.astype(np.float32), z.dtype.scalar)


def _to_float32(src):
    if src.dtype.scalar != tl.bfloat16:
        return src
    bits = src.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def create_dot(self, a, b, d, *options):
    """bfloat16 is multiplied as numbers; the interpreter multiplies its bits as integers."""
    return _dot(self, _to_float32(a), _to_float32(b), d, *options)


def _patch_lang_tensor(tensor, scope):
    """Bounds of a range: numpy 2.4 makes no int of an array of one element."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def mend():
    interpreter._patch_lang_tensor = _patch_lang_tensor
    for function in (cast_impl, create_fp_to_fp, create_fma, create_dot):
        setattr(InterpreterBuilder, function.__name__, function)
    # Made of the functions that were there when the class was.
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(InterpreterBuilder, name, cast_impl)
