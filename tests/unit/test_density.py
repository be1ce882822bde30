from __future__ import annotations

import numpy as np
import pytest

from onnxprune.analyse import analyse
from onnxprune.cost import stats
from onnxprune.density import changes, is_thin, thinnest, warnings
from onnxprune.types import LayerStats, ModelStats
from tests.small import conv_chain, parsed


def layer(
    name: str, inputs: int, outputs: int, *, depthwise: bool = False, share: int = 1
) -> LayerStats:
    """A 1 × 1 or depthwise Conv on 28 × 28."""
    size = 28 * 28
    filters = outputs if depthwise else inputs * outputs
    moved = 4 * ((inputs + outputs) * size + filters)
    return LayerStats(
        name, "Conv", filters, share * filters * size, moved, inputs, outputs, depthwise
    )


def model(*layers: LayerStats) -> ModelStats:
    return ModelStats(0, sum(one.macs for one in layers), 0, 0, layers)


def test_density_is_macs_by_bytes_of_weights_input_and_output() -> None:
    found = {one.node: one for one in stats(analyse(conv_chain((3, 8)))).layers}
    conv = found["c0"]
    assert (conv.inputs, conv.outputs, conv.depthwise) == (3, 8, False)
    assert conv.moved_bytes == 4 * (3 * 64 + 8 * 3 * 9 + 8 * 64)
    assert conv.density == pytest.approx(8 * 64 * 27 / conv.moved_bytes)
    assert found["n0"].moved_bytes == 0
    assert found["n0"].density == 0.0
    assert (found["y"].inputs, found["y"].outputs) == (8, 4)


def test_density_counts_half_precision_as_two_bytes() -> None:
    half = parsed(
        "g (float16[1,6,4,4] x) => (float16[1,6,4,4] y) {y = Conv<group=6,pads=[1,1,1,1]>(x, k)}",
        k=np.ones((6, 1, 3, 3), np.float16),
    )
    (found,) = stats(analyse(half)).layers
    assert found.depthwise
    assert found.moved_bytes == 2 * (6 * 16 * 2 + 6 * 9)


def test_layers_are_paired_by_name_and_the_worst_loss_comes_first() -> None:
    before = model(layer("a", 64, 64), layer("b", 64, 64), layer("gone", 8, 8))
    after = model(layer("a", 64, 32), layer("b", 64, 8))
    found = changes(before, after)
    assert [change.after.node for change in found] == ["a", "b"]
    assert [change.after.node for change in thinnest(found, 1)] == ["b"]


def test_a_wide_layer_left_with_few_channels_is_warned_of_by_name() -> None:
    before = model(layer("a", 64, 64), layer("b", 64, 64))
    (said,) = warnings(before, model(layer("a", 64, 12), layer("b", 12, 64)))
    assert "Conv 'a' (and 1 more) is left thin: 64 channels in and 12 out" in said
    assert "--min-channels 16 or --round-to 16" in said


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(layer("a", 64, 64), layer("a", 64, 16), id="16 channels are enough"),
        pytest.param(layer("a", 3, 24), layer("a", 3, 12), id="it was never wide"),
        pytest.param(
            layer("a", 64, 64, depthwise=True), layer("a", 32, 32, depthwise=True), id="dw"
        ),
    ],
)
def test_other_layers_are_not_warned_of(before: LayerStats, after: LayerStats) -> None:
    assert list(warnings(model(before), model(after))) == []


def test_a_layer_that_hardly_counts_is_not_warned_of() -> None:
    big = layer("big", 512, 512, share=4)
    assert list(warnings(model(big, layer("a", 64, 64)), model(big, layer("a", 64, 8)))) == []


def test_depthwise_layers_off_the_alignment_are_warned_of() -> None:
    before = model(layer("a", 64, 64, depthwise=True), layer("b", 32, 32, depthwise=True))
    after = model(layer("a", 51, 51, depthwise=True), layer("b", 26, 26, depthwise=True))
    (said,) = warnings(before, after)
    assert "depthwise Conv 'a' (and 1 more) is left 51 channels, no multiple of 4" in said
    assert "--round-to 4" in said
    even = model(layer("a", 52, 52, depthwise=True), layer("b", 28, 28, depthwise=True))
    assert list(warnings(before, even)) == []


@pytest.mark.parametrize(
    ("before", "after", "thin"),
    [
        pytest.param(layer("a", 64, 64), layer("a", 64, 12), True, id="few channels"),
        pytest.param(layer("a", 64, 64), layer("a", 64, 16), False, id="enough channels"),
        pytest.param(
            layer("a", 64, 64, depthwise=True), layer("a", 51, 51, depthwise=True), True, id="odd"
        ),
    ],
)
def test_layers_that_a_cut_left_too_thin_are_told_apart(
    before: LayerStats, after: LayerStats, thin: bool
) -> None:
    (change,) = changes(model(before), model(after))
    assert is_thin(change) is thin
