from __future__ import annotations

import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxprune.data import load_data, random_data
from onnxprune.errors import UsageError, VerificationError
from onnxprune.model import Model

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'


def model(text: str) -> Model:
    return Model(onnx.parser.parse_model(HEAD + text))


def identity(dtype: str, shape: str) -> Model:
    return model(f"g ({dtype}[{shape}] x) => ({dtype}[{shape}] y) {{y = Identity(x)}}")


TWO = model("g (float[N,3] a, float[N,2] b) => (float[N,5] y) {y = Concat<axis = 1>(a, b)}")


# ------------------------------------------------------------------------------ random inputs


@pytest.mark.parametrize(
    ("spelled", "dtype"),
    [
        ("float", np.float32),
        ("double", np.float64),
        ("float16", np.float16),
        ("bfloat16", ml_dtypes.bfloat16),
        ("bool", np.bool_),
    ],
)
def test_random_input_has_the_declared_type_and_shape(spelled: str, dtype: type) -> None:
    data = random_data(identity(spelled, "2,3"))
    assert [batch["x"].dtype for batch in data.batches] == [dtype, dtype]
    assert data.batches[0]["x"].shape == (2, 3)
    assert (data.label, data.random, data.samples) == ("random, seed 0", True, 4)


def test_same_seed_gives_the_same_arrays_and_another_seed_others() -> None:
    one, same, other = (random_data(identity("float", "2,3"), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.batches[1]["x"], same.batches[1]["x"])
    assert not np.array_equal(one.batches[0]["x"], other.batches[0]["x"])
    assert not np.array_equal(one.batches[0]["x"], one.batches[1]["x"])


def test_given_shapes_are_used() -> None:
    data = random_data(identity("float", "N,3"), shapes={"x": (5, 3)})
    assert data.batches[0]["x"].shape == (5, 3)


def test_dynamic_model_gets_two_sizes() -> None:
    data = random_data(identity("float", "N,3"))
    first, last = data.probes
    assert first["x"].shape[1:] == last["x"].shape[1:] == (3,)
    assert first["x"].shape[0] != last["x"].shape[0]


def test_uint8_image_uses_the_whole_range() -> None:
    image = random_data(identity("uint8", "1,8,8,3")).batches[0]["x"]
    assert image.dtype == np.uint8
    assert image.max() > 200


def test_token_ids_stay_inside_the_vocabulary_while_other_ids_keep_their_range() -> None:
    embedding = model("""g (int64[1,64] ids, int64[1,64] segments, int64[1,64] mask, int64[4] free)
        => (float[1,64] y, float[1,64] z, int64[1,64] m, int64[4] f)
        <float[50] words, float[2] kinds> {
        y = Gather(words, ids) z = Gather(kinds, segments) m = Identity(mask) f = Neg(free)}""")
    for name, size in (("words", 50), ("kinds", 2)):
        weight = onnx.numpy_helper.from_array(np.ones(size, np.float32), name)
        embedding.proto.graph.initializer.append(weight)
    batch = random_data(embedding).batches[0]
    assert 1 < batch["ids"].max() <= 9
    assert batch["segments"].max() == 1
    assert batch["mask"].max() == 1
    assert batch["free"].max() > 9


def test_input_with_an_initializer_is_not_fed() -> None:
    overridable = model("g (float[2] x, float[2] w) => (float[2] y) {y = Mul(x, w)}")
    weight = onnx.numpy_helper.from_array(np.ones(2, np.float32), "w")
    overridable.proto.graph.initializer.append(weight)
    assert set(random_data(overridable).batches[0]) == {"x"}


def test_string_input_is_refused_with_a_way_out() -> None:
    with pytest.raises(VerificationError, match=r"'x' takes strings.*--data"):
        random_data(identity("string", "N"))


def test_sequence_input_is_refused_by_name() -> None:
    with pytest.raises(VerificationError, match="'q' is a sequence"):
        random_data(model("g (seq(float[2]) q) => (int64 n) {n = SequenceLength(q)}"))


# ---------------------------------------------------------------------------- inputs from a file


def save(path: Path, **arrays: np.ndarray) -> Path:
    file = path / "calib.npz"
    np.savez(file, **arrays)
    return file


def test_one_array_for_one_input_may_have_any_key(tmp_path: Path) -> None:
    images = np.arange(30, dtype=np.float32).reshape(10, 3)
    data = load_data(save(tmp_path, images=images), identity("float", "N,3"), batch=4)
    assert (data.label, data.random, data.samples) == ("calib.npz, 10 samples", False, 10)
    np.testing.assert_array_equal(np.concatenate([one["x"] for one in data.batches]), images)


def test_batches_are_views_of_one_array(tmp_path: Path) -> None:
    data = load_data(save(tmp_path, x=np.zeros((8, 3), np.float32)), identity("float", "N,3"))
    assert np.shares_memory(data.batches[0]["x"], data.batches[0]["x"])


@pytest.mark.parametrize("count", [5, 8, 9, 12])
def test_dynamic_model_sees_two_batch_sizes(tmp_path: Path, count: int) -> None:
    file = save(tmp_path, x=np.zeros((count, 3), np.float32))
    data = load_data(file, identity("float", "N,3"), batch=4)
    first, last = data.probes
    assert len(first["x"]) != len(last["x"])
    assert sum(len(one["x"]) for one in data.batches) == count


def test_fixed_batch_is_fed_in_pieces_and_the_rest_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = save(tmp_path, x=np.zeros((10, 3), np.float32))
    with caplog.at_level(logging.WARNING):
        data = load_data(file, identity("float", "4,3"))
    assert [one["x"].shape for one in data.batches] == [(4, 3), (4, 3)]
    assert data.samples == 8
    assert "the last 2" in caplog.text


def test_limit_takes_the_first_samples(tmp_path: Path) -> None:
    file = save(tmp_path, x=np.arange(30, dtype=np.float32).reshape(10, 3))
    data = load_data(file, identity("float", "N,3"), limit=6)
    assert data.label == "calib.npz, 6 samples"


@pytest.mark.parametrize("found", [np.float64, np.int32, np.uint8, ">f4"])
def test_numbers_are_cast_to_a_float_input(tmp_path: Path, found: str) -> None:
    file = save(tmp_path, x=np.ones((4, 3), found))
    assert load_data(file, identity("float", "N,3")).batches[0]["x"].dtype == np.float32


def test_strings_are_read_as_objects(tmp_path: Path) -> None:
    data = load_data(save(tmp_path, x=np.array(["a", "b"])), identity("string", "N"))
    assert data.batches[0]["x"].dtype == object


def test_labels_beside_the_inputs_are_ignored(tmp_path: Path) -> None:
    file = save(tmp_path, x=np.zeros((4, 3), np.float32), labels=np.zeros(4))
    assert set(load_data(file, identity("float", "N,3")).batches[0]) == {"x"}


def test_array_with_one_more_axis_holds_a_whole_input_for_each_run(tmp_path: Path) -> None:
    scaled = model("g (float[N,3] x, float rate) => (float[N,3] y) {y = Mul(x, rate)}")
    file = save(tmp_path, x=np.zeros((4, 3), np.float32), rate=np.arange(4, dtype=np.float32))
    data = load_data(file, scaled)
    assert [(one["x"].shape, float(one["rate"])) for one in data.batches][:2] == [
        ((1, 3), 0.0),
        ((1, 3), 1.0),
    ]


def test_scalar_is_the_same_for_every_run(tmp_path: Path) -> None:
    scaled = model("g (float[N,3] x, float rate) => (float[N,3] y) {y = Mul(x, rate)}")
    file = save(tmp_path, x=np.zeros((4, 3), np.float32), rate=np.float32(7))
    assert load_data(file, scaled).batches[0]["rate"] == 7


@pytest.mark.parametrize(
    ("net", "arrays", "says"),
    [
        pytest.param(TWO, {"a": np.zeros((4, 3), np.float32)}, r"no array for input 'b'.*holds 'a'",
                     id="missing key"),
        pytest.param(TWO, {"a": np.zeros((4, 3), "f"), "b": np.zeros((5, 2), "f")},
                     "'a' 4, 'b' 5", id="sample counts"),
        pytest.param(identity("float", "N,3"), {"x": np.zeros((4, 5), "f")},
                     r"'x' is float32 \[\?, 3\], found float32 \[4, 5\]", id="shape"),
        pytest.param(identity("float", "N,3"), {"x": np.zeros(4, "f")}, "found", id="rank"),
        pytest.param(identity("float", "N,3"), {"x": np.float32(1)}, "found", id="scalar"),
        pytest.param(identity("int64", "N"), {"x": np.zeros(4)}, r"'x' is int64.*found float64",
                     id="float for int"),
        pytest.param(identity("int8", "N"), {"x": np.array([300])}, "from 300 to 300", id="range"),
        pytest.param(identity("float", "N"), {"x": np.array(["a"])}, "found <U1", id="text"),
        pytest.param(identity("float", "N"), {"x": np.array([1j])}, "found complex", id="complex"),
        pytest.param(identity("float", "N"), {"x": np.array([1, np.nan])}, "NaN", id="nan"),
        pytest.param(
            identity("float", "N"), {"x": np.array([1, -np.inf])}, "infinite", id="infinite"
        ),
        pytest.param(
            identity("float16", "N"), {"x": np.array([1, 1e5])}, "1e\\+05, which", id="too-large"
        ),
        pytest.param(identity("float", "N"), {"x": np.array([{}])}, "pickle", id="pickle"),
        pytest.param(identity("float", "N"), {"x": np.zeros(0)}, "0 samples", id="empty"),
        pytest.param(identity("float", "4"), {"x": np.zeros(3)}, "3 samples", id="too few"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, net: Model, arrays: dict[str, np.ndarray], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        load_data(save(tmp_path, **arrays), net)
    assert caught.value.message.startswith("calib.npz")
    assert "\n" not in str(caught.value)


def test_masks_may_have_minus_infinity(tmp_path: Path) -> None:
    found = load_data(save(tmp_path, x=np.array([0, -np.inf])), identity("float", "N"))
    assert sum(np.isneginf(batch["x"]).sum() for batch in found.batches) == 1


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    net = identity("float", "N")
    with pytest.raises(UsageError, match="no such file"):
        load_data(tmp_path / "absent.npz", net)
    with pytest.raises(UsageError, match=r"not an \.npz file"):
        load_data(tmp_path, net)
    junk = tmp_path / "junk.npz"
    for content in (b"", b"PK\x03\x04junk", b"hello"):
        junk.write_bytes(content)
        with pytest.raises(UsageError, match=r"not an \.npz file"):
            load_data(junk, net)
    np.save(tmp_path / "bare.npy", np.zeros(3))
    with pytest.raises(UsageError, match="one bare array"):
        load_data(tmp_path / "bare.npy", net)


def test_damaged_member_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, x=np.zeros((400, 3), np.float32))
    content = bytearray(file.read_bytes())
    content[300] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match="'x' cannot be read"):
        load_data(file, identity("float", "N,3"))
