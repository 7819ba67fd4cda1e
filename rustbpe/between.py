"""What a training step on a CPU does between its matrix products, in Rust (src/between): the binding to its C ABI.

This module knows addresses and sizes only; `nanochat.ops.native` knows tensors.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import rustbpe

VERSION = 5  # of the functions below, those of src/between/abi.rs

_int, _size, _pointer, _float = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_float


class HeadsShape(ctypes.Structure):
    """`Shape` of src/between/heads.rs."""

    _fields_ = (
        *((name, _size) for name in ("tokens", "heads", "size")),
        *((name, _pointer) for name in ("cos", "sin")),
        *((name, _size) for name in ("own_angles", "x_heads")),
    )


class View(ctypes.Structure):
    """`View` of src/between/attend.rs."""

    _fields_ = (("at", _pointer), *((name, _size) for name in ("sequence", "head", "token")))


class AttentionShape(ctypes.Structure):
    """`Shape` of src/between/attend.rs."""

    _fields_ = (*((name, _size) for name in ("heads", "kv_heads", "tokens", "size")), ("scale", _float))


_attention = (ctypes.POINTER(View), _pointer, ctypes.POINTER(AttentionShape), _size)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "add_norm": (_int, _int, *(_pointer,) * 5, _size, _size, _float),
    "add_norm_back": (_int, _int, *(_pointer,) * 6, _size, _size),
    "relu_squared": (_int, _pointer, _pointer, _size),
    "relu_squared_back": (_int, _pointer, _pointer, _pointer, _size),
    "rotary_norm": (_int, _int, *(_pointer,) * 3, ctypes.POINTER(HeadsShape), _size, _float),
    "rotary_norm_back": (_int, _int, *(_pointer,) * 4, ctypes.POINTER(HeadsShape), _size),
    "softmax": (_int, _pointer, _size, _size, _size, _float, _pointer, _size, _size),
    "softmax_back": (_int, _pointer, _pointer, _size, _size, _float),
    "muon_look_ahead": (_int, *(_pointer,) * 3, _size, _size, _size, _float, _float, _size, _float),
    "muon_apply": (_int, *(_pointer,) * 3, *(_size,) * 4, _float, _float, _float, _size),
    "muon_orthogonalize": (_pointer, _pointer, _size, _size, _size, _pointer, _size),
    "attend": _attention,
    "attend_back": _attention,
    "loss": (_int, *(_pointer,) * 3, _size, _size, _size, _float),
}
_BY_TILES = "attend", "attend_back", "muon_orthogonalize"


class Kernels:
    """The functions of src/between/abi.rs, each with its own arguments after the number of threads.

    Raises: RuntimeError for a failure inside, ValueError for sizes that don't fit.
    """

    Shape, View, AttentionShape = HeadsShape, View, AttentionShape

    def __init__(self, library: Any) -> None:
        # The workers that torch computes with, so that no second pool fights with them for the cores.
        try:
            openmp = ctypes.CDLL(None)
            parallel = ctypes.cast(openmp.GOMP_parallel, _pointer)
        except (OSError, TypeError, AttributeError):  # as where torch has another OpenMP than GNU's
            parallel = _pointer()
        available = getattr(library, "rustbpe_tiles_available", None)
        self.has_tiles = available is not None and bool(available())
        """True if the processor has what the functions of `_BY_TILES` need."""
        for name, arguments in _FUNCTIONS.items():
            if name in _BY_TILES and not self.has_tiles:
                continue
            function = getattr(library, f"rustbpe_{name}")
            function.argtypes, function.restype = (_pointer, _size, *arguments), _int
            setattr(self, name, functools.partial(self._call, function, parallel))

    @staticmethod
    def _call(function: Any, parallel: Any, *arguments: Any) -> None:
        status = function(parallel, *arguments)
        if status:
            rustbpe._check(status)


@functools.cache
def kernels() -> Any:
    """The `Kernels`; None without the compiled crate, or where it is of another version."""
    library = rustbpe._library_with("between", VERSION)
    return None if library is None else Kernels(library)
