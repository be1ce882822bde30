"""Arrays through a pipe: a line of JSON and raw bytes, no pickles.

A message is the length of its head (8 bytes, little endian), the head (JSON: whatever the sender
says, and name, type and shape of each array), and the arrays' bytes one after the other. Only numpy
and the standard library are used, as both ends run it, in different interpreters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

_LENGTH = 8
_LONGEST_HEAD = 1 << 26
_KINDS = "fiub"  # numbers and truth values; nothing that holds objects


class WireError(Exception):
    """The other end has gone, or sent what is no message."""


def send(stream: IO[bytes], say: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write one message.

    Raises:
        WireError: Nobody reads any more.
    """
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # ascontiguousarray makes a scalar an array of one: the shape is the caller's
    entries = [[name, one.dtype.str, list(np.shape(arrays[name]))] for name, one in held.items()]
    head = json.dumps({"say": dict(say), "arrays": entries}).encode()
    try:
        stream.write(len(head).to_bytes(_LENGTH, "little") + head)
        for array in held.values():
            if array.size:
                stream.write(array.reshape(-1).view(np.uint8).data)
        stream.flush()
    except (BrokenPipeError, ValueError, OSError) as error:
        raise WireError(str(error)) from error


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read one message.

    Raises:
        WireError: There is none any more, or it is none.
    """
    length = int.from_bytes(_exactly(stream, _LENGTH), "little")
    if length > _LONGEST_HEAD:
        raise WireError("not a message")
    head = json.loads(_exactly(stream, length))
    arrays = {}
    for name, spelled, shape in head["arrays"]:
        dtype = np.dtype(spelled)
        if dtype.kind not in _KINDS:
            raise WireError(f"not an array of numbers: {name}")
        raw = _exactly(stream, dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        arrays[name] = np.frombuffer(raw, dtype).reshape(shape)
    return head["say"], arrays


def _exactly(stream: IO[bytes], count: int) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        piece = stream.readinto(view[got:])  # type: ignore[attr-defined]  # of buffered streams
        if not piece:
            raise WireError("the pipe has ended")
        got += piece
    return data
