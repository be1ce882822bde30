from __future__ import annotations

import io
import json

import numpy as np
import pytest

from onnxprune.train import wire


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.array(3, np.int64),
        np.zeros((0, 4), np.float32),
        np.array([True, False]),
        np.arange(12, dtype=np.uint8)[::2],
    ],
    ids=["matrix", "scalar", "empty", "truth", "strided"],
)
def test_an_array_comes_through_a_pipe_as_it_was(array: np.ndarray) -> None:
    pipe = io.BytesIO()
    wire.send(pipe, {"do": "step", "rate": 0.5}, {"a": array})
    pipe.seek(0)
    say, arrays = wire.receive(pipe)
    assert say == {"do": "step", "rate": 0.5}
    assert arrays["a"].dtype == array.dtype
    np.testing.assert_array_equal(arrays["a"], array)


def test_a_pipe_that_ends_within_a_message_is_an_error() -> None:
    pipe = io.BytesIO()
    wire.send(pipe, {}, {"a": np.ones(100)})
    with pytest.raises(wire.WireError):
        wire.receive(io.BytesIO(pipe.getvalue()[:-1]))


def test_objects_are_refused_on_the_way_in() -> None:
    head = json.dumps({"say": {}, "arrays": [["a", "|O", [1]]]}).encode()
    with pytest.raises(wire.WireError, match="numbers"):
        wire.receive(io.BytesIO(len(head).to_bytes(8, "little") + head + bytes(8)))


def test_a_head_of_absurd_length_is_no_message() -> None:
    with pytest.raises(wire.WireError, match="not a message"):
        wire.receive(io.BytesIO(b"\xff" * 16))
