"""Write a safetensors file and its SHA-256 in one pass, straight from the tensors' memory.

The hash is of what should be on the disk, not of what can be read back, so a torn write is found when the file is
loaded. Unlike the safetensors package this reads nothing again and reports a full disk as the OSError it is. Reading is
left to the package. Source of the format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 22
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def size_in_bytes(tensors: dict[str, Tensor]) -> int:
    """What these tensors take on the disk, without the header."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors (on the CPU) by name, fsync the file; returns its SHA-256 in hex.

    Raises:
        OSError: the disk is full, read-only, or gone.
    """
    # The widest types first: then every tensor begins at a multiple of its element's size.
    items = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, at = {}, 0
    for name, t in items:
        end = at + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as f:

        def write(data: memoryview) -> None:
            digest.update(data)
            while data:
                data = data[f.write(data) :]

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for _, t in items:
            data = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), BLOCK_BYTES):  # large calls leave Python's lock to the training thread
                write(data[start : start + BLOCK_BYTES])
        os.fsync(f.fileno())
    return digest.hexdigest()
