from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune import recipe as recipes
from onnxprune.analyse import analyse
from onnxprune.errors import RecipeError
from onnxprune.io import load, save
from onnxprune.model import Model
from onnxprune.pipeline import shrink
from onnxprune.recipe import Options, Recipe, RemovedEntry
from onnxprune.recording import digest
from onnxprune.replay import replay
from onnxprune.score import METHODS
from tests.small import MODELS, array, conv_chain, parsed, reloaded

ZOO = sorted(MODELS.glob("*.onnx"))


def pruned(model: Model | Path, **options: object) -> tuple[Model, Recipe]:
    made, _ = shrink(model, **{"ratio": 0.5, "verify": "none", **options})  # type: ignore[arg-type]  # test
    return made, recipes.read(made)


def retrained(model: Model) -> Model:
    """Same names and shapes, other values."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1.5), tensor.name))
    return Model(proto)


# ----------------------------------------------------------- the recipe alone says everything


def cut_by_numpy(
    original: Mapping[str, np.ndarray], recipe: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Apply ``removed`` to the original's weights, knowing nothing but the recipe."""
    weights = dict(original)
    weights |= {name: original[copy["of"]] for name, copy in recipe["copies"].items()}
    alive = {
        entry["tensor"]: np.ones(weights[entry["tensor"]].shape, np.bool_)
        for entry in recipe["removed"]
    }
    for entry in recipe["removed"]:
        part = alive[entry["tensor"]]
        for axis, (start, stop) in entry.get("at", {}).items():
            part = np.moveaxis(np.moveaxis(part, int(axis), 0)[start:stop], 0, int(axis))
        np.moveaxis(part, entry["axis"], 0)[entry["indices"]] = False
    for tensor, mask in alive.items():
        later = [tuple(range(axis + 1, mask.ndim)) for axis in range(mask.ndim)]
        # Rows may keep columns that no other row keeps.
        shape = [int(mask.any(rest).sum(axis).max()) for axis, rest in enumerate(later)]
        weights[tensor] = weights[tensor][mask].reshape(shape)
    return weights


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Initializers and values of Constant nodes, by name."""
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return {name: onnx.numpy_helper.to_array(tensor) for name, tensor in found.items()}


def deleted(original: np.ndarray, recipe: Mapping[str, Any], tensor: str) -> np.ndarray:
    """The same for a tensor whose rows do not differ: ``np.delete`` is all it takes."""
    for entry in recipe["removed"]:
        if entry["tensor"] == tensor:
            original = np.delete(original, entry["indices"], entry["axis"])
    return original


@pytest.mark.parametrize(
    "name", ["fashion_resnet", "fashion_vgg", "fashion_mobile", "paddleocr_cls"]
)
def test_recipe_and_numpy_alone_give_the_weights_of_the_pruned_file(
    name: str, tmp_path: Path
) -> None:
    source, target = MODELS / f"{name}.onnx", tmp_path / "pruned.onnx"
    shrink(source, ratio=0.5, verify="none", restore="none", output=target)
    before, file = constants(onnx.load(source)), onnx.load(target)
    text = next(p.value for p in file.metadata_props if p.key == "onnxprune.recipe")
    recipe = json.loads(text)
    wanted = cut_by_numpy(before, recipe)
    touched = {entry["tensor"] for entry in recipe["removed"]}
    after = constants(file)
    assert touched <= set(after)
    assert len(touched) > 10
    for tensor, made in after.items():
        if tensor in touched:
            np.testing.assert_array_equal(made, wanted[tensor])
            if tensor in before and made.ndim == 4:
                np.testing.assert_array_equal(made, deleted(before[tensor], recipe, tensor))
        elif tensor in before and made.dtype == np.float32:
            np.testing.assert_array_equal(made, before[tensor])


@pytest.mark.parametrize("importance", ["l2", "reader", "path"])
def test_rows_of_a_grouped_conv_are_told_row_by_row(importance: str) -> None:
    rng = np.random.default_rng(0)
    model = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y)\n"
        "{a = Conv(x, w) b = Conv<group=2>(a, k) y = Conv(b, v)}",
        w=rng.standard_normal((12, 3, 1, 1)).astype(np.float32),
        k=rng.standard_normal((8, 6, 1, 1)).astype(np.float32),
        v=rng.standard_normal((2, 8, 1, 1)).astype(np.float32),
    )
    made, recipe = pruned(model, importance=importance)
    written = recipe.as_json()
    assert any(entry.at for entry in recipe.removed)
    wanted = cut_by_numpy({n: array(model, n) for n in "wkv"}, written)
    np.testing.assert_array_equal(array(made, "w"), wanted["w"])
    np.testing.assert_array_equal(array(made, "v"), wanted["v"])
    np.testing.assert_array_equal(array(made, "k"), wanted["k"])
    again, _ = shrink(model, recipe=recipe, verify="twin")
    assert again.proto == made.proto


# ------------------------------------------------------------------------------------ replay


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_replay_gives_a_byte_identical_file(path: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{n}.onnx" for n in "abc")
    recipe = tmp_path / "recipe.json"
    shrink(path, ratio=0.4, verify="none", output=first, recipe_out=recipe)
    shrink(path, recipe=recipe, verify="none", output=second)
    shrink(path, recipe=first, verify="none", output=third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()


def test_two_runs_give_byte_identical_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    for target in (first, second):
        shrink(MODELS / "fashion_mobile.onnx", ratio=0.5, verify="none", output=target)
    assert first.read_bytes() == second.read_bytes()


def test_replay_on_a_retrained_model_cuts_the_same_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = conv_chain()
    made, recipe = pruned(model)
    other = retrained(model)
    with caplog.at_level(logging.WARNING, "onnxprune"):
        again, report = shrink(other, recipe=recipe, verify="none")
    assert "other values" in caplog.text
    assert "other values" in report.warnings[0]
    np.testing.assert_allclose(array(again, "w0"), 1.5 * array(made, "w0"))
    assert recipes.read(again).removed == recipe.removed


def test_replay_on_another_model_is_refused() -> None:
    _, recipe = pruned(conv_chain((3, 8, 12)))
    with pytest.raises(RecipeError, match="other weight names or shapes"):
        shrink(conv_chain((3, 8, 13)), recipe=recipe, verify="none")
    with pytest.raises(RecipeError, match="other weight names or shapes"):
        shrink(conv_chain((3, 8, 12), bn=False), recipe=recipe, verify="none")


def test_replay_of_a_recipe_that_was_tampered_with_is_refused() -> None:
    model = conv_chain()
    _, recipe = pruned(model)
    extra = RemovedEntry(tensor="head", axis=0, role="producer", indices=(0,))
    forged = recipe.model_copy(update={"removed": (*recipe.removed, extra)})
    with pytest.raises(RecipeError, match="other channels would go"):
        replay(analyse(model), forged)


# ------------------------------------------------------------------------ reading and writing


def test_recipe_holds_no_path_and_no_time(tmp_path: Path) -> None:
    source = tmp_path / "secret_name.onnx"
    reloaded(conv_chain(), source)
    _, recipe = pruned(source)
    assert "secret" not in recipe.compact()
    assert str(tmp_path) not in recipe.compact()
    assert recipe.options.importance in METHODS  # what auto took
    assert recipe.input_sha256 == digest(load(source))


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    import hashlib

    model = reloaded(conv_chain(), tmp_path / "m.onnx")
    wanted = hashlib.sha256((tmp_path / "m.onnx").read_bytes()).hexdigest()
    assert digest(model) == wanted


def test_readable_form_parses_to_the_same_recipe(tmp_path: Path) -> None:
    _, recipe = pruned(MODELS / "fashion_vit.onnx")
    path = tmp_path / "r.json"
    path.write_text(recipe.readable(), "utf-8")
    assert recipes.read(path) == recipe
    assert json.loads(recipe.readable()) == json.loads(recipe.compact())
    assert max(map(len, recipe.readable().splitlines())) < 3000


def test_recipe_of_a_pruned_model_replaces_the_older_one(tmp_path: Path) -> None:
    made, first = pruned(conv_chain((3, 16, 16)))
    save(made, tmp_path / "a.onnx")
    again, second = pruned(tmp_path / "a.onnx")
    assert sum(p.key == recipes.METADATA_KEY for p in again.proto.metadata_props) == 1
    assert second.input_sha256 != first.input_sha256


def test_nothing_removed_leaves_the_model_equal_after_parsing(tmp_path: Path) -> None:
    source, target, written = (tmp_path / n for n in ("a.onnx", "b.onnx", "r.json"))
    reloaded(conv_chain(), source)
    shrink(source, ratio=0.0, verify="none", output=target, recipe_out=written)
    assert onnx.load(source) == onnx.load(target)
    assert recipes.read(written).removed == ()
    shrink(source, recipe=written, verify="none", output=target, force=True)
    assert onnx.load(source) == onnx.load(target)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "is no recipe of this version: version"),
        ("not json", "is no recipe of this version: the file"),
        ('{"schema": 2}', "is no recipe of this version: schema"),
        ('{"schema": 1, "future": 1}', "is no recipe of this version"),
    ],
)
def test_file_that_is_no_recipe_is_refused(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match=says):
        recipes.read(path)


def test_missing_binary_and_bare_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read recipe"):
        recipes.read(tmp_path / "missing.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00\xff")
    with pytest.raises(RecipeError, match="is not text"):
        recipes.read(tmp_path / "b.json")
    reloaded(conv_chain(), tmp_path / "m.onnx")
    with pytest.raises(RecipeError, match="carries no recipe"):
        recipes.read(tmp_path / "m.onnx")


def test_options_have_the_defaults_of_the_command_line() -> None:
    assert Options().model_dump(exclude_none=True) == {
        "lossless": False, "targets": {}, "scope": "local", "importance": "auto", "round_to": 1,
        "min_channels": 1, "max_ratio": 0.9,
        "ignore": (), "only": (), "ratio_for": {}, "attention": "heads", "allow_norm": False,
        "input_shape": {},
        "restore": "none", "steps": 1, "schedule": "polynomial", "seed": 0,
        "fold_bn": False, "simplify": False,
    }  # fmt: skip
