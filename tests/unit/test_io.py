"""Loading, saving and the handles on weights."""

from __future__ import annotations

import errno
import io as std_io
import os
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnxprune import files, io, messages, stream
from onnxprune.errors import InvariantError, ModelError, UsageError
from onnxprune.model import Model, Weight
from onnxprune.skeleton import skeleton

RNG = np.random.default_rng(0)
BIG = RNG.standard_normal((32, 16)).astype(np.float32)  # 2 KiB
SMALL = RNG.standard_normal(32).astype(np.float32)


def gemm_model() -> onnx.ModelProto:
    """A Gemm with a weight over and a bias under 1 KiB, and a large Constant."""
    proto = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17], producer_name: "test", doc_string: "kept">
        net (float[n, 16] x) => (float[n, 32] y)
        {
            h = Gemm <transB = 1> (x, w, b)
            y = Add (h, c)
        }
        """
    )
    proto.graph.initializer.extend(
        [numpy_helper.from_array(BIG, "w"), numpy_helper.from_array(SMALL, "b")]
    )
    table = numpy_helper.from_array(np.tile(SMALL, (16, 1))[:1].repeat(1, 0), "")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=table))
    helper.set_model_props(proto, {"key": "value"})
    return proto


def run(model: bytes | str) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    result = session.run(None, {"x": np.ones((2, 16), np.float32)})[0]
    assert isinstance(result, np.ndarray)
    return result


def saved(path: Path) -> Path:
    onnx.save(gemm_model(), path)
    return path


def save_external(model: Model, path: Path) -> Model:
    """As ``save`` does for a model that had external data from the start."""
    files.write_files(stream.model_jobs(model, path, path.with_name(path.name + ".data")))
    return io.load(path)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        np.float16,
        np.float64,
        np.int64,
        np.uint8,
        np.bool_,
        np.complex64,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.int4,
        ml_dtypes.uint4,
    ],
)
@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_every_element_type_survives_reading_and_writing(
    dtype: type, external: bool, tmp_path: Path
) -> None:
    array = (np.arange(3 * 1025) % 7).reshape(3, 1025).astype(dtype)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(array.dtype), None)],
        [numpy_helper.from_array(array, "w")],
    )
    opset = [helper.make_opsetid("", 21)]
    model = io.as_model(helper.make_model(graph, opset_imports=opset, ir_version=10))
    if external:
        model = save_external(model, tmp_path / "m.onnx")
    weight = model.weights()["w"]
    assert weight.dtype == array.dtype
    assert weight.shape == (3, 1025)
    assert weight.size == array.size
    assert len(weight.payload()) == weight.nbytes
    np.testing.assert_array_equal(weight.read().astype(complex), array.astype(complex))
    again = Weight.from_tensor(weight.to_proto(), None).read()
    np.testing.assert_array_equal(again.astype(complex), array.astype(complex))


def test_typed_data_fields_read_like_raw_data() -> None:
    tensor = helper.make_tensor("t", TensorProto.FLOAT16, [2], np.array([1.5, -2], np.float16))
    np.testing.assert_array_equal(Weight.from_tensor(tensor, None).read(), [1.5, -2])


def test_values_are_read_only() -> None:
    weight = Weight.from_array("w", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        weight.read()[0] = 1


def test_lazy_weight_computes_only_when_read_and_never_caches() -> None:
    calls = []

    def compute() -> np.ndarray:
        calls.append(1)
        return np.zeros((2, 3), np.float32)

    weight = Weight.lazily("w", [2, 3], TensorProto.FLOAT, compute)
    assert weight.nbytes == 24
    assert not calls
    weight.read()
    weight.read()
    assert len(calls) == 2


def test_lazy_weight_of_the_wrong_shape_is_our_own_bug() -> None:
    weight = Weight.lazily("w", [2, 3], TensorProto.FLOAT, lambda: np.zeros((3, 2), np.float32))
    with pytest.raises(InvariantError, match="'w' should be float32"):
        weight.read()


def test_external_weight_is_a_memory_map(tmp_path: Path) -> None:
    model = save_external(io.as_model(gemm_model()), tmp_path / "m.onnx")
    assert isinstance(model.weights()["w"].read(), np.memmap)


def test_constant_nodes_of_every_kind_are_weights() -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([5.0, 7.0], np.float32), "v"),
        numpy_helper.from_array(np.array([1, 3], np.int64), "i"),
        [2, 2],
    )
    nodes = [
        helper.make_node("Constant", [], ["f"], value_float=1.5),
        helper.make_node("Constant", [], ["fs"], value_floats=[1.0, 2.0]),
        helper.make_node("Constant", [], ["i"], value_int=3),
        helper.make_node("Constant", [], ["is"], value_ints=[3, 4]),
        helper.make_node("Constant", [], ["s"], value_string="text"),
        helper.make_node("Constant", [], ["sp"], sparse_value=sparse),
        helper.make_node("Identity", ["f"], ["y"]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "g", [], [output])
    model = io.as_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    )
    weights = model.weights()
    assert list(weights) == ["f", "fs", "i", "is", "sp"]
    assert weights["f"].read() == 1.5
    assert weights["i"].read().shape == ()
    np.testing.assert_array_equal(weights["is"].read(), [3, 4])
    np.testing.assert_array_equal(weights["sp"].read(), [[0, 5], [0, 7]])


@pytest.mark.parametrize("indices", [[1, 3], [[0, 1], [1, 1]]], ids=["linear", "coordinates"])
def test_sparse_initializer_is_seen_dense_and_written_sparse(indices: list, tmp_path: Path) -> None:
    proto = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 2] x) => (float[n, 2] y) { y = MatMul (x, w) }
        """
    )
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.array([5.0, 7.0], np.float32), "w"),
            numpy_helper.from_array(np.array(indices, np.int64), "w_indices"),
            [2, 2],
        )
    )
    model = io.as_model(proto)
    np.testing.assert_array_equal(model.weights()["w"].read(), [[0, 5], [0, 7]])
    io.save(model, tmp_path / "m.onnx")
    assert io.load(tmp_path / "m.onnx").proto == proto


# -- load and as_model -----------------------------------------------------------------------------


def test_load_takes_a_string_and_counts_the_bytes_of_external_data(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx")
    assert io.load(str(path)).file_bytes == path.stat().st_size
    save_external(io.load(path), tmp_path / "e.onnx")
    total = sum(file.stat().st_size for file in tmp_path.glob("e.onnx*"))
    assert io.load(tmp_path / "e.onnx").file_bytes == total


def test_as_model_shares_a_proto_and_passes_a_model_through(tmp_path: Path) -> None:
    proto = gemm_model()
    model = io.as_model(proto)
    assert model.proto is proto
    assert model.file_bytes == 0
    assert io.as_model(model) is model
    assert io.as_model(proto.SerializeToString()).proto == proto
    assert io.as_model(saved(tmp_path / "m.onnx")).proto == proto


def test_external_data_from_memory_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = save_external(io.as_model(gemm_model()), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="load the model by its path"):
        io.as_model(model.proto)


# -- save ------------------------------------------------------------------------------------------


def test_saved_model_parses_equal_and_returns_its_size(tmp_path: Path) -> None:
    model = io.load(saved(tmp_path / "in.onnx"))
    written = io.save(model, tmp_path / "out.onnx")
    assert written == (tmp_path / "out.onnx").stat().st_size
    assert onnx.load(tmp_path / "out.onnx") == gemm_model()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = io.load(saved(tmp_path / "in.onnx"))
    for name in ("a.onnx", "b.onnx"):
        io.save(model, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_external_model_stays_external_and_aligned_beside_the_output(tmp_path: Path) -> None:
    proto = gemm_model()
    proto.graph.initializer.append(numpy_helper.from_array(BIG * 2, "unused"))
    model = save_external(io.as_model(proto), tmp_path / "in.onnx")
    (tmp_path / "sub").mkdir()
    written = io.save(model, tmp_path / "sub" / "out.onnx")
    files = sorted((tmp_path / "sub").iterdir())
    assert [file.name for file in files] == ["out.onnx", "out.onnx.data"]
    assert written == sum(file.stat().st_size for file in files)
    again = io.load(files[0])
    references = [
        messages.external_reference(tensor)
        for tensor in again.proto.graph.initializer
        if messages.is_external(tensor)
    ]
    assert [(ref.location, ref.offset) for ref in references] == [
        ("out.onnx.data", 0),
        ("out.onnx.data", 4096),
    ]
    np.testing.assert_array_equal(again.weights()["unused"].read(), BIG * 2)
    np.testing.assert_allclose(run(str(files[0])), run(proto.SerializeToString()), rtol=1e-6)


def test_model_over_the_inline_limit_is_saved_with_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "INLINE_LIMIT", 2000)
    model = io.as_model(gemm_model())
    io.save(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size == BIG.nbytes
    with pytest.raises(UsageError, match="2 GiB"):
        stream.serialize(model)
    with io.runnable(model) as source:
        assert isinstance(source, str)
        np.testing.assert_allclose(run(source), run(gemm_model().SerializeToString()), rtol=1e-6)
    assert not Path(source).exists()


def test_external_tensors_in_subgraphs_follow_the_model(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["o"])],
        "body",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(BIG.T.copy(), "inner")],
    )
    node = helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=body)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(np.array(True), "flag")],
    )
    opset = [helper.make_opsetid("", 17)]
    proto = helper.make_model(graph, opset_imports=opset, ir_version=8)
    model = save_external(io.as_model(proto), tmp_path / "in.onnx")
    assert model.file_bytes > 2 * BIG.nbytes
    (tmp_path / "sub").mkdir()
    io.save(model, tmp_path / "sub" / "out.onnx")
    expected = run(proto.SerializeToString())
    np.testing.assert_allclose(run(str(tmp_path / "sub" / "out.onnx")), expected, rtol=1e-6)
    np.testing.assert_allclose(run(stream.serialize(model)), expected, rtol=1e-6)


def test_deferred_weights_are_read_once_when_the_model_is_written(tmp_path: Path) -> None:
    whole, proto = gemm_model(), gemm_model()
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.node[0].attribute[0].t.ClearField("raw_data")
    reads = []

    def compute() -> np.ndarray:
        reads.append(1)
        return BIG

    weights = io.as_model(whole).weights()
    deferred = {"w": Weight.lazily("w", BIG.shape, TensorProto.FLOAT, compute), "c": weights["c"]}
    model = Model(proto, deferred=deferred)
    assert list(model.weights()) == ["w", "b", "c"]
    assert not reads
    io.save(model, tmp_path / "m.onnx")
    assert len(reads) == 1
    assert onnx.load(tmp_path / "m.onnx") == whole
    skeleton(model)
    assert len(reads) == 1


def test_deferred_weight_that_does_not_fit_its_declaration_is_our_own_bug() -> None:
    model = Model(gemm_model(), deferred={"w": Weight.from_array("w", BIG[:4])})
    with pytest.raises(InvariantError, match="deferred weight 'w'"):
        stream.serialize(model)


def test_text_that_is_no_utf8_survives(tmp_path: Path) -> None:
    proto = gemm_model()
    proto.producer_name = "latin-X"
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString().replace(b"latin-X", b"latin-\xe9"))
    io.save(io.load(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert b"latin-\xe9" in (tmp_path / "out.onnx").read_bytes()


# -- refused outputs -------------------------------------------------------------------------------


def test_existing_output_needs_force(tmp_path: Path) -> None:
    model = io.load(saved(tmp_path / "in.onnx"))
    (tmp_path / "out.onnx").write_text("precious")
    with pytest.raises(UsageError, match="--force"):
        io.save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_text() == "precious"
    io.save(model, tmp_path / "out.onnx", force=True)
    assert onnx.load(tmp_path / "out.onnx") == model.proto


@pytest.mark.parametrize("kind", ["same", "dotted", "symlink", "hardlink"])
def test_input_is_never_overwritten_whatever_its_name(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "in.onnx")
    before = path.read_bytes()
    output = tmp_path / "other.onnx"
    match kind:
        case "same":
            output = path
        case "dotted":
            output = tmp_path / "x" / ".." / "in.onnx"
            (tmp_path / "x").mkdir()
        case "symlink":
            output.symlink_to(path)
        case "hardlink":
            output.hardlink_to(path)
    with pytest.raises(UsageError, match="input itself"):
        io.save(io.load(path), output, force=True)
    assert path.read_bytes() == before


def test_external_data_of_the_input_is_never_overwritten(tmp_path: Path) -> None:
    model = save_external(io.as_model(gemm_model()), tmp_path / "in.onnx")
    (tmp_path / "in.onnx").rename(tmp_path / "renamed.onnx")
    model = io.load(tmp_path / "renamed.onnx")
    with pytest.raises(UsageError, match=r"in\.onnx\.data' is the input itself"):
        io.save(model, tmp_path / "in.onnx", force=True)
    assert not (tmp_path / "in.onnx").exists()
    deferred = {"w": Weight.from_array("w", BIG)}
    inline = replace(model, proto=gemm_model(), deferred=deferred)  # no reference left
    with pytest.raises(UsageError, match="input itself"):
        io.save(inline, tmp_path / "in.onnx", force=True)


def test_existing_data_file_needs_force_too(tmp_path: Path) -> None:
    model = save_external(io.as_model(gemm_model()), tmp_path / "in.onnx")
    (tmp_path / "out.onnx.data").write_text("precious")
    with pytest.raises(UsageError, match="--force"):
        io.save(model, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [("missing/out.onnx", "does not exist"), ("folder", "is a directory"), ("fifo", "regular")],
)
def test_output_that_cannot_be_a_file_is_a_usage_error(
    output: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match=message):
        io.save(io.as_model(gemm_model()), tmp_path / output, force=True)


def test_unwritable_folder_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="not writable"):
        io.save(io.as_model(gemm_model()), tmp_path / "out.onnx")


def test_file_name_that_is_too_long_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        io.save(io.as_model(gemm_model()), tmp_path / ("x" * 300 + ".onnx"))


@pytest.mark.parametrize("fails_at", [1, 2], ids=["data file", "model file"])
def test_full_disk_leaves_nothing_behind(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_external(io.as_model(gemm_model()), tmp_path / "in.onnx")
    before = sorted(tmp_path.iterdir())
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="disk full"):
        io.save(model, tmp_path / "out.onnx")
    assert sorted(tmp_path.iterdir()) == before


def test_interrupt_while_writing_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = io.as_model(gemm_model())
    (tmp_path / "out.onnx").write_text("precious")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        io.save(model, tmp_path / "out.onnx", force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]
    assert (tmp_path / "out.onnx").read_text() == "precious"


def test_model_that_cannot_be_moved_into_place_takes_its_data_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_external(io.as_model(gemm_model()), tmp_path / "in.onnx")
    before = sorted(tmp_path.iterdir())
    move = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target.suffix == ".onnx":
            raise PermissionError(errno.EACCES, "Permission denied")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match="Permission denied"):
        io.save(model, tmp_path / "out.onnx")
    assert sorted(tmp_path.iterdir()) == before


# -- skeleton --------------------------------------------------------------------------------------


def test_skeleton_declares_large_constants_as_inputs_and_keeps_small_ones() -> None:
    proto = gemm_model()
    proto.graph.initializer.append(numpy_helper.from_array(BIG, "in_constant"))
    bones = skeleton(io.as_model(proto))
    assert [value.name for value in bones.graph.input] == ["x", "w", "in_constant"]
    assert [tensor.name for tensor in bones.graph.initializer] == ["b"]
    declared = bones.graph.input[1].type.tensor_type
    assert [dim.dim_value for dim in declared.shape.dim] == [32, 16]
    assert bones.doc_string == "kept"
    onnx.checker.check_model(bones, full_check=True)
    assert proto.graph.initializer[0].raw_data == BIG.tobytes()


def test_skeleton_of_an_initializer_that_is_also_an_input_declares_it_once() -> None:
    proto = gemm_model()
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    bones = skeleton(io.as_model(proto))
    assert [value.name for value in bones.graph.input] == ["x", "w", "b"]


def test_skeleton_of_a_large_model_is_small(tmp_path: Path) -> None:
    proto = gemm_model()
    proto.graph.node.insert(
        0, helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(BIG, ""))
    )
    assert len(skeleton(io.as_model(proto)).SerializeToString()) < 1024


def test_parts_know_their_length_before_they_are_made() -> None:
    part = stream._Part(3, lambda: b"xx")
    with pytest.raises(InvariantError, match="3 bytes came out as 2"):
        stream._write_parts(std_io.BytesIO(), [part])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_text_never_replaces_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="is not a regular file"):
        files.write_texts({pipe: "text"})
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
