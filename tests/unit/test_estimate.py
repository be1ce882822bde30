"""What a dry run says of a study."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from onnxprune.studies import sensitivity, sweep
from tests.small import MODELS

VGG, VIT = MODELS / "fashion_vgg.onnx", MODELS / "fashion_vit.onnx"
CALIB = MODELS / "fashion_calib.npz"


@pytest.mark.parametrize("restore", ["none", "bias", "refit"])
def test_dry_run_counts_the_cuts_and_is_about_right_in_time(restore: str) -> None:
    common = {"ratios": (0.0, 0.3, 0.7), "data": CALIB, "importance": "l1", "restore": restore}
    said = sensitivity(VIT, **common, dry_run=True)  # type: ignore[arg-type]
    begun = time.perf_counter()
    found = sensitivity(VIT, **common)  # type: ignore[arg-type]
    spent = time.perf_counter() - begun
    assert said.estimate is not None
    assert said.estimate.points == 20  # 10 groups; ratio 0 cuts nothing
    assert spent / 5 < said.estimate.seconds < 5 * spent
    assert not said.complete
    assert [[p.removed for p in e.points] for e in said.groups] == [
        [p.removed for p in e.points] for e in found.groups
    ]
    assert {p.figure for e in said.groups for p in e.points} == {None}
    assert found.estimate is None
    assert "estimate" not in found.as_json()


def test_dry_run_counts_what_a_resumed_run_has_left(tmp_path: Path) -> None:
    output = tmp_path / "s.json"
    done = sensitivity(VGG, ratios=(0.5,), data=CALIB, output=output)
    part = done.model_copy(update={"groups": done.groups[:5], "complete": False})
    output.write_text(part.model_dump_json(by_alias=True))
    before = output.read_text()
    said = sensitivity(VGG, ratios=(0.5,), data=CALIB, output=output, resume=True, dry_run=True)
    assert said.estimate is not None
    assert said.estimate.points == 2
    assert output.read_text() == before


def test_dry_sweep_tells_the_cost_at_each_ratio_and_measures_nothing() -> None:
    said = sweep(VGG, ratios=(0.0, 0.5), dry_run=True)
    assert said.estimate is not None
    assert said.estimate.points == 2
    assert 0.4 < said.estimate.seconds < 20
    assert [point.latency_ms for point in said.points] == [None, None]
    assert [point.removed for point in said.points] == [0, 232]
    assert said.points[1].macs < 0.3 * said.points[0].macs
