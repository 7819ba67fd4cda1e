"""The decode step of a language model on a CPU, in Rust (src/decode): the binding to its C ABI.

This module knows addresses and sizes only; `nanochat.generate.native_step` knows the model.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import rustbpe

VERSION = 5  # of the layouts below, that of src/decode/abi.rs
FORMATS = ("float32", "bfloat16", "int8", "int4")
LEVELS = ("best", "portable", "avx2", "avx512", "amx")

_size, _pointer = ctypes.c_size_t, ctypes.c_void_p


class Floats(ctypes.Structure):
    """Where float32 numbers lie, and how many; none by default."""

    _fields_ = (("data", _pointer), ("len", _size))


class Tokens(ctypes.Structure):
    """Where int32 numbers lie, and how many; none by default."""

    _fields_ = (("data", _pointer), ("len", _size))


class Layer(ctypes.Structure):
    """`RawLayer` of src/decode/abi.rs."""

    _fields_ = (
        *(
            (name, Floats)
            for name in ("query", "key", "value", "output", "hidden", "residual", "value_table", "value_gate")
        ),
        *((name, ctypes.c_float) for name in ("keep", "again", "scale")),
        ("window", _size),
    )


class Model(ctypes.Structure):
    """`RawModel` of src/decode/abi.rs."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        *((name, _size) for name in ("num_layers", "channels", "mlp", "heads", "kv_heads", "vocab", "key_offset")),
        *((name, Floats) for name in ("embedding", "head", "smear_gate", "cos", "sin")),
        *((name, Tokens) for name in ("text", "order", "token_weights")),
        *((name, Floats) for name in ("followers", "trust", "follower_scale")),
        *((name, ctypes.c_float) for name in ("smear", "backout", "softcap", "eps")),
    )


class Cache(ctypes.Structure):
    """`RawCache` of src/decode/abi.rs."""

    _fields_ = (
        *((name, _pointer) for name in ("keys", "values")),
        *((name, _size) for name in ("len", "width", "rows", "positions")),
        ("tokens", _pointer),
        ("token_positions", _size),
    )


class Sampling(ctypes.Structure):
    """`Sampling` of src/decode/choose.rs: how tokens are chosen."""

    _fields_ = (*((name, ctypes.c_float) for name in ("temperature", "top_p", "min_p")), ("top_k", _size))


class Ahead(ctypes.Structure):
    """`RawAhead` of src/decode/abi.rs."""

    _fields_ = (
        ("sampling", ctypes.POINTER(Sampling)),
        *((name, _pointer) for name in ("uniforms", "stops")),
        ("num_stops", _size),
        ("chosen", _pointer),
        ("steps", _size),
    )


@functools.cache
def library() -> Any:
    """The library with the decoder's functions; None without the compiled crate, or where it is of another version."""
    lib = rustbpe._library_with("decoder", VERSION)
    if lib is None:
        return None
    step = (_pointer, ctypes.POINTER(Cache), _pointer, _pointer, _size, _size, _pointer, _size)
    lib.rustbpe_decoder_new.argtypes = (ctypes.POINTER(Model), _size, _size, _size, ctypes.POINTER(_pointer))
    lib.rustbpe_decoder_new.restype = ctypes.c_int
    lib.rustbpe_decoder_step.argtypes, lib.rustbpe_decoder_step.restype = step, ctypes.c_int
    ahead = (*step[:-2], ctypes.POINTER(Ahead), ctypes.POINTER(_size))
    lib.rustbpe_decoder_ahead.argtypes, lib.rustbpe_decoder_ahead.restype = ahead, ctypes.c_int
    choose = (_pointer, _size, _size, ctypes.POINTER(Sampling), _pointer, _pointer)
    lib.rustbpe_choose.argtypes, lib.rustbpe_choose.restype = choose, ctypes.c_int
    lib.rustbpe_decoder_free.argtypes, lib.rustbpe_decoder_free.restype = (_pointer,), None
    return lib


def choose(logits: int, shape: tuple[int, int], sampling: Sampling, uniforms: int, chosen: int) -> None:
    """Choose a token from each row of logits; −1 where they are not numbers.

    Args:
        logits: address of float32 numbers of this shape.
        shape: rows and vocabulary.
        sampling: how.
        uniforms: address of a float32 random number in [0, 1) per row; not read for the likeliest.
        chosen: address of an int64 per row, for the tokens.
    """
    rustbpe._check(library().rustbpe_choose(logits, *shape, ctypes.byref(sampling), uniforms, chosen))


class Decoder:
    """A model that decodes. The memory that `model` points to must stay as it is as long as this lives.

    Args:
        model: its sizes, and where its weights are.
        format: one of FORMATS, what the matrices are kept as; float32 stays where it is, else a copy is made.
        threads: how many compute.
        level: one of LEVELS, the instructions to use.

    Raises:
        ValueError: sizes that don't belong together, or a level that this processor doesn't have.
    """

    def __init__(self, model: Model, format: str, threads: int, level: str = "best") -> None:
        self.threads = threads
        handle, lib = _pointer(), library()
        arguments = FORMATS.index(format), LEVELS.index(level), threads, ctypes.byref(handle)
        rustbpe._check(lib.rustbpe_decoder_new(ctypes.byref(model), *arguments))
        self._handle, self._step, self._ahead = handle, lib.rustbpe_decoder_step, lib.rustbpe_decoder_ahead
        weakref.finalize(self, lib.rustbpe_decoder_free, handle)

    def step(self, cache: Cache, ids: int, positions: list[int], first_row: int, logits: int, num_logits: int) -> None:
        """Run one token for each of the cache's rows from `first_row` on.

        Args:
            cache: the keys and values.
            ids: address of the tokens, int64, as many as positions.
            positions: where they stand.
            first_row: the cache's row of the first one.
            logits: address of float32 numbers, (tokens, vocabulary).
            num_logits: how many.

        Raises:
            ValueError: a token or a position that the model or the cache doesn't have.
        """
        batch = len(positions)
        at = (ctypes.c_int64 * batch)(*positions)
        status = self._step(self._handle, ctypes.byref(cache), ids, at, batch, first_row, logits, num_logits)
        rustbpe._check(status)

    def ahead(
        self,
        cache: Cache,
        ids: Sequence[int],
        positions: list[int],
        first_row: int,
        sampling: Sequence[Sampling],
        uniforms: Sequence[Sequence[float]],
        stops: Iterable[int],
    ) -> list[list[int]]:
        """Run several steps, each with the tokens that the one before has chosen.

        Args:
            cache: the keys and values.
            ids: the tokens to begin with, one for each of the cache's rows from `first_row` on.
            positions: where they stand.
            first_row: the cache's row of the first one.
            sampling: how each row's tokens are chosen.
            uniforms: for each step, the most there are, a random number per row.
            stops: tokens after which it returns.

        Returns:
            The tokens of each step that was run; −1 where the logits are not numbers, which ends it too.

        Raises:
            ValueError: as for `step`.
        """
        batch, steps, ends = len(ids), len(uniforms), list(stops)
        chosen, done = (ctypes.c_int64 * (batch * steps))(), _size()
        how, stop = (Sampling * batch)(*sampling), (ctypes.c_int64 * len(ends))(*ends)
        random = (ctypes.c_float * (batch * steps))(*(x for row in uniforms for x in row))
        first, at = (ctypes.c_int64 * batch)(*ids), (ctypes.c_int64 * batch)(*positions)
        addresses = (ctypes.addressof(array) for array in (random, stop))
        raw = Ahead(how, *addresses, len(ends), ctypes.addressof(chosen), steps)
        where = ctypes.byref(cache), first, at, batch, first_row
        rustbpe._check(self._ahead(self._handle, *where, ctypes.byref(raw), ctypes.byref(done)))
        return [chosen[i : i + batch] for i in range(0, batch * done.value, batch)]
