"""Option values of the wrong kind: one line that says so, whatever it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxprune import compare, inspect, sensitivity, shrink, sparsify, sweep
from onnxprune.errors import OnnxPruneError, UsageError
from tests.small import conv_chain


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": "a"}, "ratio is 'a', not a number"),
        ({"ratio": True}, "ratio is True, not a number"),
        ({"ratio": 0.5, "max_ratio": "b"}, "max-ratio is 'b'"),
        ({"ratio": 0.5, "min_channels": 1.5}, "min-channels is 1.5, not a whole number"),
        ({"ratio": 0.5, "round_to": 2.5}, "round-to is '2.5'"),
        ({"ratio": 0.5, "seed": "x"}, "seed is 'x'"),
        ({"ratio": 0.5, "steps": "x"}, "steps is x"),
        ({"ratio": 0.5, "scope": 3}, "scope is 3, not a text"),
        ({"ratio": 0.5, "importance": 3}, "importance is 3"),
        ({"ratio": 0.5, "then": 24}, "then is 24, not a text"),
        ({"ratio": 0.5, "attention": []}, "attention is []"),
        ({"ratio": 0.5, "ignore": 3}, "ignore is 3"),
        ({"ratio": 0.5, "only": [3]}, "only is [3]"),
        ({"ratio": 0.5, "ratio_for": [("a", 1)]}, "ratio_for is"),
        ({"ratio": 0.5, "ratio_for": {"a": "b"}}, "ratio_for of 'a' is 'b'"),
        ({"ratio": 0.5, "input_shapes": {"x": "1x3"}}, "input_shapes of 'x' is '1x3'"),
        ({"targets": {"macs": "half"}}, "targets of 'macs' is 'half'"),
        ({"targets": 0.5}, "targets is 0.5"),
        ({"ratio": 0.5, "max_drift": "x"}, "max_drift" .replace("_", "-")),
        ({"ratio": 0.5, "data": 5}, "data is a int"),
        ({"ratio": 0.5, "data": np.ones((1, 3, 8, 8))}, "data is a ndarray"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_shrink_refuses(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        shrink(conv_chain(), **options)  # type: ignore[arg-type]
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": None}, "pattern is None"),
        ({"pattern": 24}, "pattern is 24"),
        ({"pattern": "unstructured", "sparsity": "a"}, "sparsity is 'a'"),
        ({"method": 3}, "method is 3"),
        ({"ignore": 3}, "ignore is 3"),
        ({"data": 5}, "data is a int"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_sparsify_refuses(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        sparsify(conv_chain(), **options)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_studies_and_inspect_refuse() -> None:
    for ratios in ("a", 5, [None], ["0.5"]):
        for study in (sensitivity, sweep):
            with pytest.raises(UsageError):
                study(conv_chain(), ratios=ratios)  # type: ignore[arg-type, operator]
    with pytest.raises(UsageError, match="attention is 3"):
        inspect(conv_chain(), attention=3)  # type: ignore[arg-type]


def test_arrays_by_input_name_are_data() -> None:
    images = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    model = conv_chain(batch="N")
    _, report = shrink(model, ratio=0.5, data={"x": images})
    assert report.verdict.inputs == "the given arrays, 6 samples"
    assert report.restored
    _, listed = shrink(model, ratio=0.5, data={"x": images.tolist()})
    assert listed.verdict.drift["y"].rel_l2 == pytest.approx(report.verdict.drift["y"].rel_l2, 1e-3)
    assert compare(model, model, data={"any": images}).verdict.drift["y"].rel_l2 == 0
    _, sparse = sparsify(conv_chain((3, 8, 12), batch="N"), data={"x": images})
    assert sparse.sparsified is not None
    assert sparse.sparsified.method == "sparsegpt"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"z": np.ones((2, 3)), "w": np.ones(3)}, "the given arrays has no array for input 'x'"),
        ({"x": np.ones((2, 3), np.float32)}, "input 'x' is float32"),
        ({"x": [[1.0], [1.0, 2.0]]}, "data cannot be made into arrays"),
        ({"x": None}, "the given arrays: input 'x'"),
        ({}, "it holds nothing"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arrays_that_do_not_fit_are_refused(data: dict[str, object], said: str) -> None:
    with pytest.raises(OnnxPruneError) as caught:
        shrink(conv_chain(batch="N"), ratio=0.5, data=data)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_data_is_repeated_as_the_file_would_be(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=images)
    model = conv_chain(batch="N")
    (one, first), (two, second) = (
        shrink(model, ratio=0.5, data=data) for data in ({"x": images}, tmp_path / "d.npz")
    )
    assert first.recipe == second.recipe
    assert one.proto == two.proto
