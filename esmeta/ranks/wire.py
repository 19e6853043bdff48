"""Plain data as bytes that are checked when they are read: for the wire and for checkpoint files.

A block is framed by a format version, its length and a SHA-256, and read without pickle's power to
run code.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esmeta.types import Comm

MAGIC = b"esmeta checkpoint\n"
FORMAT = 1
_HEAD = len(MAGIC) + 4 + 8 + 32


def _packed(value: Any, where: str) -> Any:
    """The value with detached tensors on the CPU; refuses what a safe loader would not read."""
    if isinstance(value, Tensor):
        # clone: a view would drag its whole storage into the file.
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _packed(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_packed(item, f"{where}[{i}]") for i, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f"checkpoint: {where} is a {type(value).__name__}; only plain data is saved")


def encode(payload: Mapping[str, Any]) -> bytes:
    """Plain data (tensors, numbers, strings, bytes, lists, dicts, None) as a framed block."""
    buffer = io.BytesIO()
    torch.save(_packed(dict(payload), "payload"), buffer)
    body = buffer.getvalue()
    head = FORMAT.to_bytes(4, "little") + len(body).to_bytes(8, "little")
    return MAGIC + head + hashlib.sha256(head + body).digest() + body


def decode(block: bytes) -> dict[str, Any]:
    """The inverse of :func:`encode`; ``ValueError`` if a single byte is missing or changed."""
    if not block.startswith(MAGIC) or len(block) < _HEAD:
        raise ValueError("not an esmeta checkpoint, or cut off")
    head = block[len(MAGIC) : len(MAGIC) + 12]
    version, length = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
    body = memoryview(block)[_HEAD:]
    if len(body) != length:
        raise ValueError(f"cut off: {len(body)} of {length} bytes")
    if hashlib.sha256(head + body).digest() != block[_HEAD - 32 : _HEAD]:
        raise ValueError("damaged: the checksum does not agree")
    if version != FORMAT:
        raise ValueError(f"format {version}, this esmeta reads format {FORMAT}")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def share(comm: Comm, payload: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rank 0's plain data (or None) on every rank; the other ranks' argument is ignored."""
    block = encode(payload) if comm.rank == 0 and payload is not None else b""
    size = int(comm.bcast(torch.tensor([len(block)], dtype=torch.int64, device="cpu")))
    if size == 0:
        return None
    data = bytearray(block) if comm.rank == 0 else bytearray(size)
    return decode(comm.bcast(torch.frombuffer(data, dtype=torch.uint8)).numpy().tobytes())
