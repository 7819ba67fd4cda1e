"""The longest matches of tokens in a text, in Rust (src/matches.rs): the binding to its C ABI.

This module knows addresses and sizes only; `nanochat.ops.recall` has the same with numpy, and says what it is.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

import rustbpe

VERSION = 3  # of the function below, that of src/matches.rs
WIDTH = 64  # numbers per token: `Found` of src/matches.rs


@functools.cache
def library() -> Any:
    """The library with the function; None without the compiled crate, or where it is of another version."""
    lib = rustbpe._library_with("matches", VERSION)
    if lib is None:
        return None
    lib.rustbpe_matches_find.argtypes = (ctypes.c_void_p, ctypes.c_size_t) * 8
    lib.rustbpe_matches_find.restype = ctypes.c_int
    return lib


def find(
    text: npt.ArrayLike,
    order: npt.ArrayLike,
    weights: npt.ArrayLike,
    tokens: npt.ArrayLike,
    bounds: npt.ArrayLike,
    rank: npt.ArrayLike | None = None,
    begins: npt.ArrayLike | None = None,
    skip: int = 0,
) -> npt.NDArray[np.int32]:
    """See `nanochat.ops.recall.find`; arrays of int32.

    Raises:
        ValueError: arrays that don't belong together, or an order with positions that are not in the text.
    """
    given = [
        None if a is None else np.ascontiguousarray(a, np.int32)
        for a in (text, order, weights, tokens, bounds, rank, begins)
    ]
    out = np.empty((np.size(tokens) - skip, WIDTH), np.int32)
    where = ((None, 0) if a is None else (a.ctypes.data, a.size) for a in (*given, out))
    rustbpe._check(library().rustbpe_matches_find(*(x for pair in where for x in pair)))
    return out
