"""What widths are rounded to for a target where nobody says."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from onnxprune.pipeline import shrink
from onnxprune.types import Report
from tests.small import conv_chain, parsed


def widths(report: Report) -> list[int]:
    return [group.kept for group in report.groups if group.frozen is None]


def left(report: Report, cost: str = "macs") -> float:
    assert report.after is not None
    return float(getattr(report.after, cost) / getattr(report.before, cost))


def test_wide_groups_are_cut_in_sixteens_and_narrow_ones_in_less() -> None:
    _, report = shrink(conv_chain((3, 16, 128, 256)), targets={"macs": 0.5}, verify="none")
    narrow, *wide = widths(report)
    assert all(width % 16 == 0 for width in wide)
    assert narrow % 8 == 0
    assert abs(left(report) - 0.5) <= 0.01
    assert report.recipe["options"]["round_to"] == "auto"  # type: ignore[index]  # JSON


def test_less_is_rounded_where_the_target_would_be_missed() -> None:
    _, report = shrink(conv_chain((3, 12, 13)), targets={"macs": 0.5}, verify="none")
    _, forced = shrink(conv_chain((3, 12, 13)), targets={"macs": 0.5}, round_to=4, verify="none")
    assert abs(left(report) - 0.5) <= abs(left(forced) - 0.5)


def test_what_is_asked_for_is_taken() -> None:
    model = conv_chain((3, 32, 128))
    for rounding in (1, 4, "auto"):
        _, report = shrink(model, targets={"macs": 0.5}, round_to=rounding, verify="none")
        assert report.recipe["options"]["round_to"] == rounding  # type: ignore[index]  # JSON
    _, plain = shrink(model, ratio=0.3, verify="none")
    assert widths(plain) == [32 - 9, 128 - 38]
    assert plain.recipe["options"]["round_to"] == 1  # type: ignore[index]  # JSON


def test_target_that_is_missed_is_told_once_and_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    with caplog.at_level(logging.WARNING, "onnxprune"):
        _, report = shrink(
            conv_chain((3, 16, 16), batch="N"), targets={"macs": 0.5}, then="2:4",
            data={"x": images}, verify="none",
        )  # fmt: skip
    told = [text for text in caplog.messages if "nearer" in text]
    assert len(told) == (abs(left(report) - 0.5) > 0.01)
    assert all(f"macs={left(report):.3f}" in text for text in told)


def test_layers_that_wide_blocks_do_not_fit_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "onnxprune"):
        shrink(
            conv_chain((3, 64, 64, 72)), ratio=0.1, then="32x32", ignore=("c0", "c1"),
            verify="none",
        )  # fmt: skip
    (told,) = [text for text in caplog.messages if "--round-to 32" in text]
    assert "stay dense" in told
    caplog.clear()
    with caplog.at_level(logging.WARNING, "onnxprune"):
        shrink(conv_chain((3, 64, 64)), ratio=0.5, round_to=32, then="32x32", verify="none")
        shrink(conv_chain((3, 64, 64)), ratio=0.25, then="4x4", verify="none")
    assert not [text for text in caplog.messages if "--round-to" in text]


def test_targets_out_of_reach_at_every_rounding_are_refused() -> None:
    from onnxprune.errors import TargetError

    model = parsed(
        "g (float[1,3,8,8] x) => (float[1,64,8,8] y) {a = Conv(x, w) r = Relu(a) y = Conv(r, u)}",
        w=np.ones((2, 3, 1, 1), np.float32), u=np.ones((64, 2, 1, 1), np.float32),
    )  # fmt: skip
    with pytest.raises(TargetError, match=r"macs=0\.1 cannot be reached"):
        shrink(model, targets={"macs": 0.1}, verify="none")
