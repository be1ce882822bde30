"""A model run piece by piece gives what the whole gives, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnxprune import stepwise
from onnxprune.calibrate import stream
from onnxprune.data import Data, random_data
from onnxprune.io import load
from onnxprune.model import Model
from onnxprune.prepare import prepare
from onnxprune.stepwise import Stepwise
from tests.small import MODELS, conv_chain, parsed


def rows(*counts: int, shape: tuple[int, ...] = (3, 8, 8), name: str = "x") -> Data:
    rng = np.random.default_rng(5)
    batches = [{name: rng.standard_normal((n, *shape)).astype(np.float32)} for n in counts]
    return Data(batches, "rows", random=False, samples=sum(counts))


def assert_as_whole(model: Model, data: Data, names: list[str], tolerance: float = 1e-5) -> None:
    """Asked one after the other, tensors are what one run of everything gives."""
    graph = prepare(model)
    with Stepwise(graph, data, names) as run:
        got = {n: run.until(graph.producer[n].index + 1, [n])[n] for n in names}
    for number, whole in enumerate(stream(graph.model, names, data)):
        for name in names:
            assert got[name][number].dtype == whole[name].dtype
            scale = np.abs(whole[name]).max()
            error = got[name][number].astype(float) - whole[name].astype(float)
            np.testing.assert_allclose(error / scale, 0, atol=tolerance, err_msg=name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_every_tensor_of_a_chain_is_as_in_one_run_with_a_smaller_last_batch() -> None:
    model = conv_chain(batch="N")
    names = [node.output[0] for node in model.proto.graph.node]
    assert_as_whole(model, rows(4, 4, 3), names)


@pytest.mark.parametrize("name", ["fashion_resnet", "fashion_vit", "fashion_mobile"])
def test_tensors_of_whole_networks_are_as_in_one_run(name: str) -> None:
    model = load(MODELS / f"{name}.onnx")
    graph = prepare(model)
    made = [node.outputs[0] for node in graph.nodes if node.key not in graph.derived]
    assert_as_whole(model, random_data(model, seed=1), [*made[::9], made[-1]])


def test_tensors_beyond_the_limit_are_the_same_from_files_and_files_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepwise, "_IN_MEMORY", 1)
    monkeypatch.setattr(stepwise, "_SMALL", 1)
    graph = prepare(conv_chain(batch="N"))
    data = rows(4, 2)
    with Stepwise(graph, data, ["c0"]) as run:
        found = run.until(graph.producer["r1"].index, ["c0", "n1"])
        assert [type(array) for array in found["n1"]] == [np.memmap, np.memmap]
        assert len(list(folder.iterdir())) == 1
        for number, whole in enumerate(stream(graph.model, ["c0", "n1"], data)):
            np.testing.assert_allclose(found["c0"][number], whole["c0"], atol=1e-5)
            np.testing.assert_allclose(found["n1"][number], whole["n1"], atol=1e-4)
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(stepwise, "_SMALL", 1)
    assert_as_whole(conv_chain(batch="N"), data, ["c0", "r0", "c1", "y"])


def test_interruption_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepwise, "_IN_MEMORY", 1)
    monkeypatch.setattr(stepwise, "_SMALL", 1)
    graph = prepare(conv_chain(batch="N"))
    run = Stepwise(graph, rows(4))

    def interrupted() -> None:
        with run:
            run.until(3, ["r0"])
            assert len(list(folder.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(folder.iterdir()) == []


def test_memory_is_what_is_held_now(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody reads any more makes room; a run that fits at each step makes no file."""
    graph = prepare(conv_chain((3, 8, 8, 8, 8, 8), bn=False, batch="N"))
    one = 4 * 8 * 8 * 8 * 4  # bytes of one tensor
    monkeypatch.setattr(stepwise, "_IN_MEMORY", 3 * one)
    monkeypatch.setattr(stepwise, "_SMALL", 1)
    with Stepwise(graph, rows(4)) as run:
        for node in graph.nodes[:-4]:
            run.until(node.index + 1, [node.outputs[0]])
        assert list(folder.iterdir()) == []


def test_bfloat16_comes_back_from_a_file_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepwise, "_IN_MEMORY", 1)
    monkeypatch.setattr(stepwise, "_SMALL", 1)
    model = parsed(
        "g (float[N,6] x) => (float[N,6] y) {h = Cast<to=16>(x)  r = Cast<to=1>(h)  y = Relu(r)}"
    )
    data = rows(5, shape=(6,))
    with Stepwise(prepare(model), data) as run:
        (half,) = run.until(1, ["h"])["h"]
        assert half.dtype == ml_dtypes.bfloat16
        (back,) = run.until(3, ["y"])["y"]
    wanted = np.maximum(data.batches[0]["x"].astype(ml_dtypes.bfloat16).astype(np.float32), 0)
    np.testing.assert_array_equal(back, wanted)


def test_constants_that_change_on_the_way_count_from_there() -> None:
    model = conv_chain(bn=False, batch="N")
    graph, data = prepare(model), rows(2)
    with Stepwise(graph, data) as run:
        run.until(2, ["r0"])
        run.constants["w1"] = np.zeros((12, 8, 3, 3), np.float32)
        (made,) = run.until(3, ["c1"])["c1"]
    assert not made.any()


def test_weights_behind_other_nodes_and_read_by_subgraphs_are_there() -> None:
    rng = np.random.default_rng(0)
    model = parsed(
        """g (float[N,4] x, bool b) => (float[N,4] y) {
            t = Transpose<perm=[1,0]>(w)
            h = MatMul(x, t)
            r = Relu(h)
            y = If (b) <
                then_branch = a () => (float[N,4] p) { p = Add(h, c) },
                else_branch = e () => (float[N,4] q) { q = Add(r, c) }
            >
        }""",
        w=rng.standard_normal((4, 4)).astype(np.float32),
        c=rng.standard_normal(4).astype(np.float32),
    )
    x = rng.standard_normal((3, 4)).astype(np.float32)
    data = Data([{"x": x, "b": np.array(flag)} for flag in (True, False)], "d", False, 6)
    assert_as_whole(model, data, ["h", "r", "y"])


def test_several_outputs_and_an_inner_tensor_that_is_one() -> None:
    model = parsed(
        "g (float[N,3,8,8] x) => (float[N,3,8,8] r, float[N,6,8,8] y, float[N,3,8,8] s) {"
        "r = Relu(x)  s = Sigmoid(r)  y = Concat<axis=1>(r, s)}"
    )
    assert_as_whole(model, rows(2, 1), ["r", "s", "y"])
