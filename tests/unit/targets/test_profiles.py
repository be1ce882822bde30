"""Shapes that an engine is built for."""

from __future__ import annotations

import pytest

from onnxprune.errors import UsageError
from onnxprune.model import Model
from onnxprune.targets.files import profile_findings
from onnxprune.targets.profiles import Wanted
from tests.small import parsed


def pair() -> Model:
    return parsed(
        "g (float[n,4] x, float[n,m] v, float[2,2] c) => (float[n,k] y) "
        "{s = MatMul(v, x) y = Concat<axis=1>(x, v)}"
    )


KNOWN = ({"x": (1, 4), "v": (1, 8)}, {"x": (3, 4), "v": (3, 24)})


def shapes(model: Model, known: tuple = KNOWN, **given: dict) -> dict[str, tuple]:
    found = Wanted.read(model, **given).profiles(known)
    return {name: (one.least, one.best, one.most) for name, one in found.items()}


def test_open_inputs_lie_between_the_sizes_of_the_analysis() -> None:
    assert shapes(pair()) == {
        "x": ((1, 4), (1, 4), (3, 4)),
        "v": ((1, 8), (1, 8), (3, 24)),
    }


def test_what_is_given_counts_in_every_input_with_the_symbol() -> None:
    found = shapes(pair(), least={"x": (2, 4)}, best={"x": (4, 4)}, most={"x": (16, 4)})
    assert found["x"] == ((2, 4), (4, 4), (16, 4))
    assert found["v"] == ((2, 8), (4, 8), (16, 24))


def test_one_shape_stands_for_all_three() -> None:
    assert shapes(pair(), best={"x": (5, 4)})["x"] == ((5, 4),) * 3
    assert shapes(pair(), most={"x": (5, 4)})["x"] == ((5, 4),) * 3
    assert shapes(pair(), least={"x": (5, 4)})["x"] == ((5, 4),) * 3


def test_static_model_has_no_profiles() -> None:
    assert shapes(parsed("g (float[1,4] x) => (float[1,4] y) {y = Relu(x)}"), ()) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"best": {"z": (1, 4)}}, "--opt-shape: the model has no input 'z'"),
        ({"least": {"x": (1, 4, 1)}}, "--min-shape: input 'x' has 2 dimensions, 3 were given"),
        ({"most": {"x": (1, 5)}}, "--max-shape: dimension 1 of 'x' is fixed at 4, not 5"),
        ({"least": {"x": (9, 4)}, "most": {"x": (2, 4)}}, "dimension 0 of 'x' is 9 at least"),
        ({"best": {"x": (1, 4), "v": (2, 3)}}, "dimension 0 of 'v' is the same as another, 'n'"),
    ],
    ids=["name", "rank", "fixed", "order", "symbol"],
)
def test_shape_that_does_not_fit_is_refused(given: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Wanted.read(pair(), **given)
    assert str(caught.value).startswith(message)


def test_inputs_that_are_settled_are_known_before_the_analysis() -> None:
    assert Wanted.read(pair(), best={"x": (5, 4)}).settled == {"x": (5, 4)}
    assert Wanted.read(pair(), best={"v": (5, 7)}).settled == {"x": (5, 4), "v": (5, 7)}


def test_finding_says_whose_shapes_they_are() -> None:
    chosen = list(profile_findings(Wanted.read(pair()).profiles(KNOWN)))
    assert "the engine is for 1x4 to 3x4, tuned for 1x4 (chosen by onnxprune" in chosen[0].message
    given = list(profile_findings(Wanted.read(pair(), best={"x": (5, 4)}).profiles(KNOWN)))
    assert "(as given)" in given[0].message
