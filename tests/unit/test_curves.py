"""The result file: written whole, gone on from, and what it allows each group to lose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onnxprune
from onnxprune import curves, studies
from onnxprune.analyse import analyse
from onnxprune.curves import PointEntry, largest_ratio
from onnxprune.errors import UsageError
from onnxprune.io import load
from onnxprune.recipe import read
from onnxprune.select import select
from tests.small import MODELS, conv_chain, reloaded


def points(*pairs: tuple[float, float | None]) -> list[PointEntry]:
    return [PointEntry(ratio=r, removed=1, figure=loss, loss=loss) for r, loss in pairs]


@pytest.mark.parametrize(
    ("losses", "most", "wanted"),
    [
        pytest.param([(0.2, 0.0), (0.4, 0.1)], 0.05, 0.3, id="half way between two points"),
        pytest.param([(0.2, 0.1)], 0.05, 0.1, id="from nothing to the first"),
        pytest.param([(0.2, 0.0), (0.9, 0.01)], 0.02, 0.9, id="not beyond the last"),
        pytest.param([(0.2, 0.1), (0.4, 0.0), (0.6, 0.2)], 0.05, 0.1, id="winning back is chance"),
        pytest.param([(0.2, -0.1), (0.4, 0.1)], 0.05, 0.3, id="a gain counts as nothing"),
        pytest.param([(0.2, 0.0), (0.4, None)], 9.0, 0.2, id="not finite is too much"),
        pytest.param([(0.2, 0.0), (0.4, 0.1)], 0.0, 0.2, id="nothing may be lost"),
        pytest.param([(0.4, 0.1), (0.2, 0.0)], 0.1, 0.4, id="in any order"),
    ],
)
def test_largest_ratio_is_where_the_envelope_meets_the_limit(
    losses: list[tuple[float, float | None]], most: float, wanted: float
) -> None:
    assert largest_ratio(points(*losses), most) == pytest.approx(wanted)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    return reloaded(conv_chain((3, 8, 12, 6), batch="N"), tmp_path / "chain.onnx").path or Path()


def test_ratios_are_those_of_the_file_and_at_most_the_given_one(chain: Path) -> None:
    found = onnxprune.sensitivity(chain, ratios=(0.25, 0.5, 0.75))
    graph = analyse(load(chain))
    limit = found.groups[1].points[1].loss
    assert limit is not None
    free = curves.allowed_ratios(found, graph, limit)
    assert free[1] == pytest.approx(0.5)
    bounded = curves.allowed_ratios(found, graph, limit, most=0.3)
    assert bounded == {number: min(ratio, 0.3) for number, ratio in free.items()}
    plan = select(graph, onnxprune.score(graph), ratio=0.0, group_ratios=free)
    assert plan.keep[1].size == 6


def test_shrink_takes_what_is_allowed_and_the_recipe_says_so(chain: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    found = onnxprune.sensitivity(chain, ratios=(0.25, 0.5, 0.75), output=file)
    limit = found.groups[1].points[1].loss
    made, report = onnxprune.shrink(chain, sensitivity=file, max_loss=limit)
    kept = {group.id: group.kept for group in report.groups}
    assert kept[1] == 6
    options = report.recipe["options"]
    assert isinstance(options, dict)
    assert options["max_loss"] == limit
    assert options["ratio"] is None
    again, _ = onnxprune.shrink(chain, recipe=read(made))
    assert {n: w.shape for n, w in again.weights().items()} == {
        n: w.shape for n, w in made.weights().items()
    }


def test_same_layout_with_other_weights_warns(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "s.json"
    onnxprune.sensitivity(chain, ratios=(0.5,), output=file)
    other = conv_chain((3, 8, 12, 6), batch="N", seed=1)
    onnxprune.shrink(other, sensitivity=file, max_loss=0.1, verify="none")
    assert "same names and shapes, other values" in caplog.text


def test_file_of_another_model_is_refused(chain: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    onnxprune.sensitivity(chain, ratios=(0.5,), output=file)
    with pytest.raises(UsageError, match="other weight names or shapes"):
        onnxprune.shrink(conv_chain((3, 8, 10, 6)), sensitivity=file, max_loss=0.1)


def test_groups_measured_in_another_mode_are_refused(tmp_path: Path) -> None:
    model, file = MODELS / "fashion_vit.onnx", tmp_path / "s.json"
    onnxprune.sensitivity(model, ratios=(0.5,), attention="dims", output=file)
    with pytest.raises(UsageError, match="has no group") as caught:
        onnxprune.shrink(model, sensitivity=file, max_loss=0.1, attention="heads")
    assert "--attention dims" in str(caught.value)
    _, report = onnxprune.shrink(model, sensitivity=file, max_loss=0.1, verify="none")
    assert report.recipe["options"]["attention"] == "dims"  # type: ignore[index]


def test_other_ranking_than_the_measured_one_warns(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "s.json"
    onnxprune.sensitivity(chain, ratios=(0.5,), importance="l1", output=file)
    onnxprune.shrink(chain, sensitivity=file, max_loss=0.1, importance="l2", verify="none")
    assert "measured with importance l1 and are cut by l2" in caplog.text


# -- going on --------------------------------------------------------------------------------------


def test_interrupted_run_goes_on_where_it_stopped(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s.json"
    whole = onnxprune.sensitivity(chain, ratios=(0.5,))
    measured: list[int] = []
    plain = studies.Bench.measure

    def measure(self: object, number: int) -> object:
        if len(measured) == 2 and not file_is_old:
            raise KeyboardInterrupt
        measured.append(number)
        return plain(self, number)  # type: ignore[arg-type]

    file_is_old = False
    monkeypatch.setattr(studies.Bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        onnxprune.sensitivity(chain, ratios=(0.5,), output=file)
    left = curves.read(file)
    assert not left.complete
    assert [entry.groups[0].id for entry in left.groups] == [0, 1]
    with pytest.raises(UsageError, match="not complete"):
        onnxprune.shrink(chain, sensitivity=file, max_loss=0.1)
    with pytest.raises(UsageError, match="exists"):
        onnxprune.sensitivity(chain, ratios=(0.5,), output=file)
    file_is_old = True
    found = onnxprune.sensitivity(chain, ratios=(0.5,), output=file, resume=True)
    assert measured == [0, 1, 2]
    assert found.complete
    assert found.groups == whole.groups
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain.onnx", "s.json"]


def test_run_of_other_ratios_or_data_is_not_gone_on_with(chain: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    onnxprune.sensitivity(chain, ratios=(0.5,), output=file)
    with pytest.raises(UsageError, match="made with another ratios"):
        onnxprune.sensitivity(chain, ratios=(0.4,), output=file, resume=True)
    data = onnxprune.random_data(load(chain), seed=3)
    with pytest.raises(UsageError, match="made with another data"):
        onnxprune.sensitivity(chain, ratios=(0.5,), output=file, resume=True, data=data)
    reloaded(conv_chain((3, 8, 12, 6), batch="N", seed=1), chain)
    with pytest.raises(UsageError, match="made with another model"):
        onnxprune.sensitivity(chain, ratios=(0.5,), output=file, resume=True)


def test_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text("{}")
    with pytest.raises(UsageError, match="no result of"):
        curves.read(file)
    with pytest.raises(UsageError, match="cannot read"):
        curves.read(tmp_path / "none.json")


def test_digest_tells_values_types_and_order_apart() -> None:
    one = {"x": np.arange(4, dtype=np.float32)}
    assert curves.arrays_digest([one]) == curves.arrays_digest([dict(one)])
    assert curves.arrays_digest([one]) != curves.arrays_digest([{"x": one["x"][::-1]}])
    assert curves.arrays_digest([one]) != curves.arrays_digest([{"x": one["x"].reshape(2, 2)}])
    assert curves.labels_digest(None) is None
