"""The stored networks and ``tools/accuracy.py``, which measures them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
SCRIPT = ROOT / "tools" / "accuracy.py"
CNNS = ("fashion_resnet", "fashion_vgg", "fashion_mobile")
LARGEST_FILE = 1_500_000


def load_tool() -> ModuleType:
    """Import ``tools/accuracy.py``, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("onnxprune_accuracy_tool", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def batch_norm_scales(model: onnx.ModelProto) -> list[np.ndarray]:
    """The scale of every BatchNormalization of ``model``."""
    weights = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    return [weights[node.input[1]] for node in nodes]


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the tool as a program."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def images_500(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 500 stored test images, 50 of each class."""
    path = tmp_path_factory.mktemp("data") / "test_500.npz"
    with np.load(MODELS / "fashion_test.npz") as arrays:
        np.savez(path, input=arrays["input"][:500], labels=arrays["labels"][:500])
    return path


@pytest.fixture
def channel_means(tmp_path: Path) -> Path:
    """Seven images whose class is the channel of the highest mean; one label is wrong."""
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    images = np.eye(3, dtype=np.float32)[labels][:, :, None, None]
    labels[-1] = 1
    np.savez(tmp_path / "means.npz", input=images * np.ones((2, 2), np.float32), labels=labels)
    return tmp_path / "means.npz"


def mean_model(batch: str = "n", dtype: str = "float") -> bytes:
    """A classifier that averages each of three channels."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        means ({dtype}[{batch},3,2,2] pixels) => ({dtype}[{batch},3] scores) {{
            mean = GlobalAveragePool(pixels)
            scores = Flatten(mean)
        }}""")
    serialised: bytes = model.SerializeToString()
    return serialised


# --- the stored networks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "floor"),
    [*((name, 0.90) for name in CNNS), ("fashion_vit", 0.88)],
    ids=[*CNNS, "fashion_vit"],
)
def test_stored_network_reaches_its_accuracy(name: str, floor: float, images_500: Path) -> None:
    assert tool.accuracy(MODELS / f"{name}.onnx", images_500) >= floor


@pytest.mark.parametrize("name", [*CNNS, "fashion_vit"])
def test_stored_network_is_small_with_named_ends_and_a_dynamic_batch(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    assert path.stat().st_size <= LARGEST_FILE
    graph = onnx.load(path).graph
    (source,), (result,) = graph.input, graph.output
    shapes = [
        [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (source, result)
    ]
    assert (source.name, result.name) == ("input", "logits")
    assert shapes == [["batch", 1, 28, 28], ["batch", 10]]


@pytest.mark.parametrize("name", CNNS)
def test_cnn_keeps_its_batch_normalization_in_inference_form(name: str) -> None:
    model = onnx.load(MODELS / f"{name}.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert nodes
    for node in nodes:
        training = [entry.i for entry in node.attribute if entry.name == "training_mode"]
        assert training in ([], [0])
        assert len(node.output) == 1


def test_slimmed_vgg_has_half_of_its_scales_below_a_hundredth_of_the_largest() -> None:
    scales = np.abs(np.concatenate(batch_norm_scales(onnx.load(MODELS / "fashion_vgg.onnx"))))
    assert np.mean(scales < 0.01 * scales.max()) >= 0.5


def test_stored_arrays_are_normalised_float32_and_balanced() -> None:
    with np.load(MODELS / "fashion_calib.npz") as arrays:
        assert arrays.files == ["input"]
        calibration = arrays["input"]
    with np.load(MODELS / "fashion_test.npz") as arrays:
        images, labels = arrays["input"], arrays["labels"]
    assert calibration.shape == (256, 1, 28, 28)
    assert images.shape == (2000, 1, 28, 28)
    assert calibration.dtype == images.dtype == np.float32
    assert images.min() == pytest.approx(-0.2860 / 0.3530)
    assert images.max() == pytest.approx((1 - 0.2860) / 0.3530)
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [200] * 10
    assert np.bincount(labels[:500]).tolist() == [50] * 10


# --- the tool -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 250])
def test_accuracy_is_the_share_of_right_labels_whatever_the_batch(
    batch: int, channel_means: Path
) -> None:
    assert tool.accuracy(mean_model(), channel_means, batch) == pytest.approx(6 / 7)


def test_fixed_batch_is_fed_in_pieces_and_the_filling_is_not_counted(channel_means: Path) -> None:
    assert tool.accuracy(mean_model(batch="4"), channel_means) == pytest.approx(6 / 7)


def test_float16_input_is_converted(channel_means: Path) -> None:
    assert tool.accuracy(mean_model(dtype="float16"), channel_means) == pytest.approx(6 / 7)


def test_json_prints_one_object(channel_means: Path, tmp_path: Path) -> None:
    model = tmp_path / "means.onnx"
    model.write_bytes(mean_model())
    done = run_script(model, "--data", channel_means, "--json")
    assert done.returncode == 0
    printed = json.loads(done.stdout)
    assert printed == {"model": str(model), "images": 7, "accuracy": pytest.approx(6 / 7)}


def test_missing_model_is_reported_in_one_line() -> None:
    done = run_script("no_such.onnx")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("accuracy.py: cannot load no_such.onnx")
    assert done.stderr.count("\n") == 1


def test_missing_labels_are_reported() -> None:
    with pytest.raises(tool.AccuracyError, match="needs the arrays input and labels"):
        tool.accuracy(mean_model(), MODELS / "fashion_calib.npz")


def test_images_of_another_shape_are_reported() -> None:
    with pytest.raises(tool.AccuracyError, match="does not run on these images"):
        tool.accuracy(mean_model(), MODELS / "fashion_test.npz")


def test_model_with_two_inputs_is_reported(channel_means: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        sums (float[n,3] a, float[n,3] b) => (float[n,3] c) { c = Add(a, b) }""")
    with pytest.raises(tool.AccuracyError, match="must have one input, has 2: a, b"):
        tool.accuracy(model.SerializeToString(), channel_means)


def test_output_that_is_not_one_score_a_class_is_reported(channel_means: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        means (float[n,3,2,2] x) => (float[n,3,1,1] y) { y = GlobalAveragePool(x) }""")
    with pytest.raises(tool.AccuracyError, match=r"must be \(batch, classes\), is \(7, 3, 1, 1\)"):
        tool.accuracy(model.SerializeToString(), channel_means)
