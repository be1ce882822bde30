"""Bad input is refused with one line that names what is wrong; odd but valid models are not."""

from __future__ import annotations

import io as std_io
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnxprune import io
from onnxprune.errors import ModelError

CASES = Path(__file__).parents[3] / "shared" / "cases"
Change = Callable[[onnx.ModelProto], object]


def conv_model() -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, pooling and Gemm; 4 channels in, 16 in the middle, 8 out."""
    proto = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 4, 8, 8] x) => (float[n, 8] y)
        {
            [conv] c = Conv <kernel_shape = [3, 3]> (x, w, b)
            [bn] d = BatchNormalization (c, scale, shift, mean, var)
            [relu] r = Relu (d)
            [pool] p = GlobalAveragePool (r)
            [flat] f = Flatten (p)
            [fc] y = Gemm <transB = 1> (f, fc_w, fc_b)
        }
        """
    )
    shapes = {"w": (16, 4, 3, 3), "b": (16,), "fc_w": (8, 16), "fc_b": (8,)}
    shapes |= dict.fromkeys(("scale", "shift", "mean", "var"), (16,))
    for name, shape in shapes.items():
        put(proto, name, shape)
    return proto


def put(proto: onnx.ModelProto, name: str, shape: tuple[int, ...]) -> None:
    """Give initializer ``name`` the shape ``shape`` and ones as values."""
    made = numpy_helper.from_array(np.ones(shape, np.float32), name)
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(made)
            return
    proto.graph.initializer.append(made)


def node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.name == name)


def initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def refusal(source: onnx.ModelProto | bytes | str | Path) -> str:
    """The message with which a model is refused."""
    with pytest.raises(ModelError) as caught:
        io.as_model(source)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.hint
    return message


def test_the_model_all_changes_start_from_is_valid() -> None:
    io.as_model(conv_model())


# -- the file --------------------------------------------------------------------------------------


def zip_bytes() -> bytes:
    buffer = std_io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(b"import onnx\n" * 9, "not an ONNX file (text)", id="text"),
        pytest.param("Größe: 3\n".encode() * 900, "(text)", id="text cut inside a letter"),
        pytest.param(b"\n<!DOCTYPE html><html>", "not an ONNX file (HTML", id="html"),
        pytest.param(zip_bytes(), "a zip / PyTorch file (export it to ONNX first)", id="zip"),
        pytest.param(pickle.dumps({"w": [1.0]}), "a pickle / PyTorch file", id="pickle"),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
            "run `git lfs pull`",
            id="git-lfs",
        ),
        pytest.param(b"\x1c\0\0\0TFL3" + bytes(64), "a TensorFlow Lite file", id="tflite"),
        pytest.param(b"\x1c\0\0\0ORTM" + bytes(64), "an ORT-format file", id="ort"),
        pytest.param(b"\x02" + bytes(7) + b"{}" + b"\xff" * 9, "safetensors", id="safetensors"),
        pytest.param(b"\x89HDF\r\n\x1a\n" + bytes(9), "Keras / HDF5", id="hdf5"),
        pytest.param(b"\x1f\x8b\x08" + bytes(9), "a gzip archive", id="gzip"),
        pytest.param(b"\xff\xfe\x00\x01" * 9, "is not an ONNX file", id="noise"),
        pytest.param(conv_model().SerializeToString()[:-9], "truncated or damaged", id="truncated"),
        pytest.param(onnx.ModelProto(ir_version=8).SerializeToString(), "truncated", id="no graph"),
        pytest.param(
            numpy_helper.from_array(np.ones(9, np.float32), "t").SerializeToString(),
            "'M'",
            id="a tensor",
        ),
    ],
)
def test_file_that_is_no_model_is_told_by_its_kind(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "M"
    path.write_bytes(content)
    text = refusal(path).replace(str(path), "M")
    assert message in text
    assert "'M'" in text


def test_missing_file_and_directory_are_told_by_their_path(tmp_path: Path) -> None:
    assert f"no such file: '{tmp_path / 'm.onnx'}'" in refusal(tmp_path / "m.onnx")
    assert "is a directory" in refusal(tmp_path)


def test_file_that_is_no_regular_file_is_refused_and_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_inline_model_of_2_gib_is_told_to_use_external_data(tmp_path: Path) -> None:
    with (tmp_path / "m.onnx").open("wb") as out:
        out.truncate(2**31)
    assert "external data" in refusal(tmp_path / "m.onnx")


def test_path_that_cannot_be_looked_up_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="too long"):
        io.load(tmp_path / ("x" * 300))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = conv_model().SerializeToString()
    for length in range(0, len(data), 97):
        (tmp_path / "m.onnx").write_bytes(data[:length])
        refusal(tmp_path / "m.onnx")


# -- external data ---------------------------------------------------------------------------------


def external(proto: onnx.ModelProto, name: str, **entries: str) -> onnx.ModelProto:
    tensor = initializer(proto, name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return proto


def written(folder: Path, **entries: str) -> Path:
    """A model whose ``w`` is external, with the given entries."""
    path = folder / "m.onnx"
    path.write_bytes(external(conv_model(), "w", **entries).SerializeToString())
    return path


W_BYTES = 16 * 4 * 9 * 4


def test_missing_external_data_names_the_file_and_the_folder(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, location="w.bin"))
    assert "initializer 'w'" in message
    assert f"'w.bin' is missing in '{tmp_path}'" in message


def test_short_external_data_names_needed_and_found_bytes(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(100))
    message = refusal(written(tmp_path, location="w.bin", offset="8"))
    assert f"too short: needed {W_BYTES + 8} bytes, found 100" in message


@pytest.mark.parametrize("location", ["/etc/hostname", "C:\\weights.bin", "c:/weights.bin"])
def test_absolute_external_path_is_refused(location: str, tmp_path: Path) -> None:
    assert "is absolute: refused" in refusal(written(tmp_path, location=location))


@pytest.mark.parametrize("location", ["../w.bin", "a/../../w.bin", "..\\w.bin"])
def test_external_path_out_of_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "w.bin").write_bytes(bytes(W_BYTES))
    assert "leads out of the model's folder" in refusal(written(folder, location=location))


def test_external_symlink_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(W_BYTES))
    (folder / "w.bin").symlink_to(tmp_path / "w.bin")
    assert "leads out of the model's folder" in refusal(written(folder, location="w.bin"))


def test_external_symlink_is_fine_where_the_model_is_a_link_to_the_same_folder(
    tmp_path: Path,
) -> None:
    """As in the cache of the Hugging Face hub."""
    for name in ("blobs", "snapshot"):
        (tmp_path / name).mkdir()
    (tmp_path / "blobs" / "data").write_bytes(bytes(W_BYTES))
    written(tmp_path / "blobs", location="w.bin")
    (tmp_path / "snapshot" / "m.onnx").symlink_to(tmp_path / "blobs" / "m.onnx")
    (tmp_path / "snapshot" / "w.bin").symlink_to(tmp_path / "blobs" / "data")
    model = io.load(tmp_path / "snapshot" / "m.onnx")
    assert not model.weights()["w"].read().any()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "names no file"),
        ({"location": "w.bin", "offset": "-4"}, "bad offset '-4'"),
        ({"location": "w.bin", "length": "x"}, "bad length 'x'"),
        ({"location": "w.bin", "length": "12"}, f"needs {W_BYTES} bytes"),
        ({"location": "sub"}, "not a regular file"),
    ],
)
def test_bad_external_reference_is_told(
    entries: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(W_BYTES))
    (tmp_path / "sub").mkdir()
    assert message in refusal(written(tmp_path, **entries))


# -- structure -------------------------------------------------------------------------------------


def reorder(proto: onnx.ModelProto) -> None:
    nodes = [*proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend([nodes[1], nodes[0], *nodes[2:]])


def add_if(proto: onnx.ModelProto, reads: str) -> None:
    """Append an If whose branches are Relu(``reads``)."""
    body = helper.make_graph(
        [helper.make_node("Relu", [reads], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    proto.graph.node.add().CopyFrom(
        helper.make_node("If", ["flag"], ["z"], "if", then_branch=body, else_branch=body)
    )


STRUCTURE: dict[str, tuple[Change, str]] = {
    "cycle": (
        lambda p: node(p, "conv").input.__setitem__(0, "r"),
        "the graph has a cycle through tensor 'r', which Conv 'conv' reads",
    ),
    "node reads itself": (
        lambda p: node(p, "relu").input.__setitem__(0, "r"),
        "cycle through tensor 'r'",
    ),
    "unsorted": (
        reorder,
        "not sorted: BatchNormalization 'bn' reads tensor 'c' before Conv 'conv' makes it",
    ),
    "undefined": (
        lambda p: node(p, "conv").input.__setitem__(1, "gone"),
        "tensor 'gone' is used by Conv 'conv' but never defined",
    ),
    "undefined in a body": (
        lambda p: add_if(p, "gone"),
        "tensor 'gone' is used by If 'if' but never defined",
    ),
    "two nodes write": (
        lambda p: p.graph.node.add(op_type="Relu", name="again", input=["x"], output=["r"]),
        "tensor 'r' is written twice: by Relu 'again' and Relu 'relu'",
    ),
    "one node writes twice": (
        lambda p: p.graph.node.add(op_type="Split", input=["x"], output=["q", "q"]),
        "tensor 'q' is written twice: by Split 'q' and itself",
    ),
    "node writes an initializer": (
        lambda p: p.graph.node.add(op_type="Relu", name="again", input=["x"], output=["w"]),
        "tensor 'w' is written twice: by Relu 'again' and an initializer",
    ),
    "node writes an input": (
        lambda p: p.graph.node.add(op_type="Relu", name="again", input=["x"], output=["x"]),
        "tensor 'x' is written twice: by Relu 'again' and a graph input",
    ),
    "two initializers": (
        lambda p: p.graph.initializer.append(initializer(p, "b")),
        "tensor 'b' is written twice: by two initializers",
    ),
    "two inputs": (
        lambda p: p.graph.input.append(p.graph.input[0]),
        "tensor 'x' is written twice: by two graph inputs",
    ),
    "initializer without a name": (
        lambda p: p.graph.initializer.append(numpy_helper.from_array(np.ones(2), "")),
        "an initializer has no name",
    ),
    "no outputs": (lambda p: p.graph.ClearField("output"), "the graph has no outputs"),
    "output nobody makes": (
        lambda p: setattr(p.graph.output[0], "name", "logitz"),
        "graph output 'logitz' is never produced",
    ),
    "no opset": (lambda p: p.ClearField("opset_import"), "declares no opset"),
    "no standard opset": (
        lambda p: setattr(p.opset_import[0], "domain", "ai.acme"),
        "declares no opset for ONNX's own operators, but Conv 'conv'",
    ),
    "opset 99": (
        lambda p: setattr(p.opset_import[0], "version", 99),
        f"unsupported opset 99 (newest known {onnx.defs.onnx_opset_version()})",
    ),
    "IR version 99": (
        lambda p: setattr(p, "ir_version", 99),
        f"unknown IR version 99 (newest known {onnx.IR_VERSION})",
    ),
    "no IR version": (lambda p: p.ClearField("ir_version"), "declares no IR version"),
}


@pytest.mark.parametrize(
    ("change", "message"), [pytest.param(*case, id=name) for name, case in STRUCTURE.items()]
)
def test_broken_structure_is_told_with_the_tensor_or_node(change: Change, message: str) -> None:
    proto = conv_model()
    change(proto)
    assert message in refusal(proto)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fc_w", "tensor"), ("pool", "node"), ("Flatten", "operator"), ("transB", "attribute")],
)
def test_name_that_is_no_utf8_is_refused(name: str, kind: str) -> None:
    data = conv_model().SerializeToString()
    broken = name[:-1].encode() + b"\xff"
    assert f"{kind} name {broken!r} is not valid UTF-8" in refusal(
        data.replace(name.encode(), broken)
    )


def test_wide_and_deep_graphs_are_checked_in_linear_time() -> None:
    size = 20_000
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(size)]
    values = [helper.make_tensor_value_info(f"t{i}", TensorProto.FLOAT, [1]) for i in (0, size)]
    graph = helper.make_graph([*nodes[::-1]], "g", values[:1], values[1:])
    opset = [helper.make_opsetid("", 17)]
    message = refusal(helper.make_model(graph, opset_imports=opset, ir_version=8))
    assert "not sorted" in message


# -- data ------------------------------------------------------------------------------------------


DATA: dict[str, tuple[Change, str]] = {
    "no data": (
        lambda p: initializer(p, "w").ClearField("raw_data"),
        "initializer 'w' has no data for its 576 elements",
    ),
    "too little raw data": (
        lambda p: setattr(initializer(p, "w"), "raw_data", bytes(100)),
        "initializer 'w' of shape [16, 4, 3, 3] needs 2304 bytes but has 100",
    ),
    "too many values": (
        lambda p: initializer(p, "b").CopyFrom(
            TensorProto(name="b", data_type=1, dims=[16], float_data=[0.0] * 17)
        ),
        "initializer 'b' of shape [16] needs 16 values but has 17",
    ),
    "no element type": (
        lambda p: initializer(p, "b").ClearField("data_type"),
        "initializer 'b' has the unknown element type 0",
    ),
    "negative dimension": (
        lambda p: initializer(p, "b").dims.__setitem__(0, -16),
        "initializer 'b' has a negative dimension: [-16]",
    ),
    "constant without data": (
        lambda p: p.graph.node.add().CopyFrom(
            helper.make_node(
                "Constant", [], ["k"], "const", value=TensorProto(data_type=1, dims=[3])
            )
        ),
        "'value' of Constant 'const' has no data for its 3 elements",
    ),
}


@pytest.mark.parametrize(
    ("change", "message"), [pytest.param(*case, id=name) for name, case in DATA.items()]
)
def test_data_that_does_not_fit_its_shape_is_told(change: Change, message: str) -> None:
    proto = conv_model()
    change(proto)
    assert message in refusal(proto)


# -- channel counts --------------------------------------------------------------------------------


def bn_of(length: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        for name in ("scale", "shift", "mean", "var"):
            put(proto, name, (length,))

    return change


def transposed(proto: onnx.ModelProto) -> None:
    """The convolution as a ConvTranspose with too few input channels in its weight."""
    node(proto, "conv").op_type = "ConvTranspose"
    put(proto, "w", (3, 16, 3, 3))


def transposed_bias(proto: onnx.ModelProto) -> None:
    node(proto, "conv").op_type = "ConvTranspose"
    put(proto, "w", (4, 16, 3, 3))
    put(proto, "b", (4,))


def instance_norm(proto: onnx.ModelProto) -> None:
    made = helper.make_node("InstanceNormalization", ["c", "long", "long"], ["d"], "in")
    node(proto, "bn").CopyFrom(made)
    put(proto, "long", (17,))


CHANNELS: dict[str, tuple[Change, str]] = {
    "Conv weight": (
        lambda p: put(p, "w", (16, 3, 3, 3)),
        "Conv 'conv': weight wants 3 input channels, tensor has 4",
    ),
    "Conv bias": (
        lambda p: put(p, "b", (20,)),
        "Conv 'conv': bias has 20 entries, expected 16",
    ),
    "Conv groups": (
        lambda p: node(p, "conv").attribute.append(helper.make_attribute("group", 4)),
        "Conv 'conv': weight wants 16 input channels, tensor has 4",
    ),
    "ConvTranspose weight": (
        transposed,
        "ConvTranspose 'conv': weight wants 3 input channels, tensor has 4",
    ),
    "ConvTranspose bias": (
        transposed_bias,
        "ConvTranspose 'conv': bias has 4 entries, expected 16",
    ),
    "BatchNormalization, all vectors": (
        bn_of(15),
        "BatchNormalization 'bn' has 15 channels but its input has 16",
    ),
    "BatchNormalization, one vector": (
        lambda p: put(p, "var", (15,)),
        "BatchNormalization 'bn' has 15 channels but its input has 16",
    ),
    "InstanceNormalization": (
        instance_norm,
        "InstanceNormalization 'in' has 17 channels but its input has 16",
    ),
    "Gemm weight": (
        lambda p: put(p, "fc_w", (8, 15)),
        "Gemm 'fc': weight wants 15 input features, tensor has 16",
    ),
    "Gemm bias": (lambda p: put(p, "fc_b", (9,)), "Gemm 'fc': bias has 9 entries, expected 8"),
}


@pytest.mark.parametrize(
    ("change", "message"), [pytest.param(*case, id=name) for name, case in CHANNELS.items()]
)
def test_channel_mismatch_is_told_with_both_counts(change: Change, message: str) -> None:
    proto = conv_model()
    change(proto)
    assert message in refusal(proto)


def test_group_that_does_not_divide_the_channels_is_refused() -> None:
    proto = conv_model()
    put(proto, "w", (16, 1, 3, 3))
    node(proto, "conv").attribute.append(helper.make_attribute("group", 3))
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    assert "Conv 'conv': 16 channels cannot be split into 3 groups" in refusal(proto)


def test_shapes_that_do_not_fit_elsewhere_are_told_in_one_line() -> None:
    proto = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 4] x, float[5, 6] w) => (float[n, 6] y) { [mm] y = MatMul (x, w) }
        """
    )
    message = refusal(proto)
    assert message.startswith("MatMul 'mm': ")
    assert ".cc" not in message


def test_complaint_of_the_checker_names_the_node_in_one_line() -> None:
    proto = conv_model()
    node(proto, "flat").attribute.append(helper.make_attribute("colour", 3))
    assert refusal(proto).startswith("Flatten 'flat': Unrecognized attribute: colour")


# -- odd, but valid --------------------------------------------------------------------------------


def stale_value_info(proto: onnx.ModelProto) -> None:
    proto.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 99]))
    proto.graph.value_info.append(helper.make_tensor_value_info("nowhere", TensorProto.FLOAT, [1]))


def not_finite(proto: onnx.ModelProto) -> None:
    initializer(proto, "b").raw_data = np.full(16, np.nan, np.float32).tobytes()


def input_is_initializer(proto: onnx.ModelProto) -> None:
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        proto.graph.input.append(value)


def custom_op(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain="ai.acme", version=1)
    node(proto, "relu").op_type, node(proto, "relu").domain = "Magic", "ai.acme"


def group_norm_18(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 18
    made = helper.make_node("GroupNormalization", ["c", "g", "g"], ["d"], "gn", num_groups=4)
    node(proto, "bn").CopyFrom(made)
    put(proto, "g", (4,))


def empty_names(proto: onnx.ModelProto) -> None:
    for each in proto.graph.node:
        each.name = ""
    proto.graph.node.add().CopyFrom(
        helper.make_node("Clip", ["r", "", "limit"], ["clipped"], name="")
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array(6, np.float32), "limit"))


def output_without_shape(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.ClearField("shape")


def local_function(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain="local", version=1)
    opset = [helper.make_opsetid("", 17)]
    body = [helper.make_node("Relu", ["a"], ["b"])]
    proto.functions.append(helper.make_function("local", "MyRelu", ["a"], ["b"], body, opset))
    node(proto, "relu").op_type, node(proto, "relu").domain = "MyRelu", "local"


VALID: dict[str, Change] = {
    "stale value_info": stale_value_info,
    "NaN weights": not_finite,
    "initializers that are inputs": input_is_initializer,
    "custom domain": custom_op,
    "GroupNormalization of opset 18": group_norm_18,
    "unnamed nodes and optional inputs": empty_names,
    "output without a shape": output_without_shape,
    "body that captures an outer tensor": lambda p: add_if(p, "r"),
    "dead branch": lambda p: p.graph.node.add(op_type="Relu", input=["x"], output=["unused"]),
    "unused initializer": lambda p: put(p, "unused", (3, 3)),
    "local function": local_function,
    "empty tensor": lambda p: put(p, "unused", (0, 3)),
}


@pytest.mark.parametrize(
    "change", [pytest.param(change, id=name) for name, change in VALID.items()]
)
def test_odd_but_valid_model_loads(change: Change, tmp_path: Path) -> None:
    proto = conv_model()
    change(proto)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert io.load(tmp_path / "m.onnx").proto == proto


def test_complaint_that_the_runtime_does_not_share_is_only_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    proto = conv_model()
    group_norm_18(proto)
    with caplog.at_level(logging.INFO, "onnxprune"):
        io.as_model(proto)
    assert "GroupNormalization" in caplog.text


def test_deprecated_operator_beside_a_custom_one_loads() -> None:
    proto = conv_model()
    group_norm_18(proto)
    custom_op(proto)
    io.as_model(proto)


# -- the hard cases --------------------------------------------------------------------------------


@pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases beside this checkout")
def test_hard_cases_load_or_are_refused_as_the_manifest_says() -> None:
    wrong = []
    for case in json.loads((CASES / "manifest.json").read_text()):
        path = CASES / "onnx" / case["path"]
        invalid = case["error"] is not None and case["id"] != "inv_all_frozen"
        try:
            io.load(path)
        except ModelError as error:
            if not invalid:
                wrong.append(f"{case['id']}: {error}")
        else:
            if invalid:
                wrong.append(f"{case['id']} was accepted, wanted: {case['error']}")
    assert not wrong
