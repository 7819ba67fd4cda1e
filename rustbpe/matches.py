"""The longest matches of tokens in a text, in Rust (src/matches.rs): the binding to its C ABI.

This module knows addresses and sizes only; `nanochat.ops.recall` has the same with numpy, and says what it is.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import rustbpe

VERSION = 1  # of the function below, that of src/matches.rs


@functools.cache
def library() -> Any:
    """The library with the function; None without the compiled crate, or where it is of another version."""
    lib = rustbpe._lib
    try:
        version = lib.rustbpe_matches_version
        version.argtypes, version.restype = (), ctypes.c_int
        return lib if version() == VERSION else None
    except AttributeError:
        return None


def find(text: Any, order: Any, tokens: Any, bounds: Any, rank: Any = None) -> Any:
    """See `nanochat.ops.recall.find`; arrays of int32."""
    raise NotImplementedError
