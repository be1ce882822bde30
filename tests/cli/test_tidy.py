"""--fold-bn, --simplify and --latency of shrink and sparsify, from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest

from onnxprune import io
from onnxprune.report.schemas import stored
from tests.calls import Call
from tests.small import MODELS, conv_chain, parsed, reloaded

TIDY = ("--fold-bn", "--simplify")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reloaded(conv_chain((3, 16, 24), batch="N"), tmp_path / "chain.onnx")
    one = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y) {a = Conv(x, w) y = Mul(a, s)}",
        w=np.ones((2, 3, 1, 1), np.float32), s=np.ones((2, 1, 1), np.float32),
    )  # fmt: skip
    reloaded(one, tmp_path / "frozen.onnx")


def kinds(path: str) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def recipe_of(path: str) -> dict:
    (found,) = [p.value for p in onnx.load(path).metadata_props if p.key == "onnxprune.recipe"]
    recipe = json.loads(found)
    jsonschema.validate(recipe, json.loads(stored("recipe")))
    return recipe


def test_shrink_folds_the_norms_of_what_is_left(call: Call) -> None:
    plain = call.json("shrink", "chain.onnx", "--ratio", 0.5, "-o", "plain.onnx")
    found = call.json("shrink", "chain.onnx", "--ratio", 0.5, "-o", "small.onnx", *TIDY)
    assert plain["tidied"] is None
    assert found["tidied"]["norms"] == {"before": 2, "after": 0}
    assert found["tidied"]["nodes"]["after"] == found["tidied"]["nodes"]["before"] - 2
    assert kinds("small.onnx").count("BatchNormalization") == 0
    assert found["verify"]["twin"]["passed"]
    assert found["output"]["bytes"] < plain["output"]["bytes"]
    near = call.json("compare", "plain.onnx", "small.onnx")
    assert near["verify"]["drift"]["y"]["rel_l2"] < 1e-5
    assert "input" in found
    dims = onnx.load("small.onnx").graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param == "N"


def test_recipe_says_it_and_repeats_it_to_the_byte(call: Call) -> None:
    call(
        "shrink", "chain.onnx", "--ratio", 0.5, *TIDY, "-o", "small.onnx", "--recipe-out", "r.json"
    )
    for source in ("r.json", "small.onnx"):
        code, _, err = call(
            "shrink", "chain.onnx", "--recipe", source, "-o", "again.onnx", "--force"
        )
        assert (code, err) == (0, "")
        assert Path("again.onnx").read_bytes() == Path("small.onnx").read_bytes()
    recipe = recipe_of("small.onnx")
    assert recipe["options"]["fold_bn"]
    assert recipe["options"]["simplify"]
    assert recipe["merged"] == [{"node": f"n{n}", "into": f"c{n}"} for n in (0, 1)]
    assert {"w0", "w1"} <= set(recipe["restored"])
    code, _, err = call("shrink", "chain.onnx", "--recipe", "r.json", "--fold-bn")
    assert (code, "--fold-bn cannot go with --recipe" in err) == (2, True)


def test_without_the_flags_a_recipe_is_what_it_was(call: Call) -> None:
    call("shrink", "chain.onnx", "--ratio", 0.5, "-o", "small.onnx")
    recipe = recipe_of("small.onnx")
    assert not {"fold_bn", "simplify"} & recipe["options"].keys()
    assert "merged" not in recipe


def test_file_that_was_folded_can_be_shrunk_again(call: Call) -> None:
    call("shrink", "chain.onnx", "--ratio", 0.3, *TIDY, "-o", "once.onnx")
    found = call.json("shrink", "once.onnx", "--ratio", 0.5, *TIDY, "-o", "twice.onnx")
    assert found["verify"]["twin"]["passed"]
    assert found["output"]["macs"] < found["input"]["macs"]


@pytest.mark.parametrize("model", ["chain.onnx", "frozen.onnx"])
def test_folding_alone_where_nothing_is_to_be_cut(call: Call, model: str) -> None:
    code, out, err = call("shrink", model, "--lossless", "--fold-bn", "-o", "same.onnx")
    assert (code, "nothing was cut" in err) == (0, True)
    assert "BatchNormalizations" in out
    assert "restored" not in out
    assert not {"BatchNormalization", "Mul"} & set(kinds("same.onnx"))
    assert recipe_of("same.onnx")["options"]["lossless"]
    code, _, _ = call("shrink", model, "--recipe", "same.onnx", "-o", "again.onnx")
    assert code == 0
    assert Path("again.onnx").read_bytes() == Path("same.onnx").read_bytes()


def test_frozen_model_is_refused_where_there_is_nothing_to_fold_for(call: Call) -> None:
    assert call("shrink", "frozen.onnx", "--ratio", 0.5, "--fold-bn")[0] == 3
    assert call("shrink", "frozen.onnx", "--lossless")[0] == 3


@pytest.mark.parametrize("verb", ["shrink", "sparsify"])
def test_pattern_holds_after_folding(call: Call, verb: str) -> None:
    given = ("--ratio", 0.5, "--then", "2:4") if verb == "shrink" else ()
    found = call.json(verb, "chain.onnx", *given, *TIDY, "-o", "s.onnx", "--recipe-out", "r.json")
    assert found["tidied"]["norms"] == {"before": 2, "after": 0}
    entries = recipe_of("s.onnx")["sparsity"]
    assert entries
    weights = io.load(Path("s.onnx")).weights()
    for entry in entries:
        runs = np.moveaxis(weights[entry["tensor"]].read(), entry["axis"], -1).reshape(-1, 4)
        assert ((runs != 0).sum(axis=1) <= 2).all()
    code, _, err = call(verb, "chain.onnx", "--recipe", "r.json", "-o", "again.onnx")
    assert (code, err) == (0, "")
    assert Path("again.onnx").read_bytes() == Path("s.onnx").read_bytes()


@pytest.mark.parametrize(
    "name", ["fashion_resnet", "fashion_mobile", "fashion_vit", "paddleocr_cls"]
)
def test_real_models_are_folded_and_equal(call: Call, name: str) -> None:
    found = call.json(
        "shrink",
        MODELS / f"{name}.onnx",
        "--lossless",
        *TIDY,
        "-o",
        "same.onnx",
        "--no-latency",
        warns=True,
    )
    assert found["tidied"]["norms"]["after"] == 0
    assert found["tidied"]["nodes"]["after"] < found["tidied"]["nodes"]["before"]
    assert found["output"]["bytes"] <= found["input"]["bytes"] + len(
        json.dumps(recipe_of("same.onnx"))
    )
    assert all(one["rel_l2"] < 1e-4 for one in found["verify"]["drift"].values())


def test_small_models_are_timed_by_default(call: Call) -> None:
    for verb in (("shrink", "--ratio", 0.5), ("sparsify",)):
        _, out, _ = call(verb[0], "chain.onnx", *verb[1:], "--dry-run")
        said = re.search(
            r"latency in ONNX Runtime, 1 thread, batch 1: \S+ ms → \S+ ms, p90 \S+ → \S+ ms, "
            r"ratio \S+ \(\S+ to \S+ at 95 %, \d+ runs in turn\)",
            out,
        )
        assert said, out
        found = call.json(verb[0], "chain.onnx", *verb[1:], "--dry-run")["latency"]
        assert (found["threads"], found["batch"]) == (1, 1)
        assert 0 < found["before_ms"] <= found["before_p90_ms"]
        assert found["low"] <= found["ratio"] <= found["high"]
        assert found["runs"] >= 7
        for flags in (("--no-latency",), ("--verify", "none")):
            off = call.json(verb[0], "chain.onnx", *verb[1:], "--dry-run", *flags)
            assert off["latency"] is None


def test_latency_is_timed_on_so_many_threads_where_that_is_asked_for(call: Call) -> None:
    given = ("shrink", "chain.onnx", "--ratio", 0.5, "--dry-run", "--latency", "--verify", "none")
    found = call.json(*given, "--threads", 2)["latency"]
    assert found["threads"] == 2
    assert call.json(*given, "--threads", 0)["latency"]["threads"] is None


def test_large_models_are_timed_only_where_that_is_asked_for(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxprune.timed._QUICK_MACS", 1000)
    assert call.json("shrink", "chain.onnx", "--ratio", 0.5, "--dry-run")["latency"] is None
    found = call.json("shrink", "chain.onnx", "--ratio", 0.5, "--dry-run", "--latency")
    assert found["latency"] is not None


def test_compare_says_batch_and_p90_too(call: Call) -> None:
    _, out, _ = call("compare", "chain.onnx", "chain.onnx", "--latency")
    assert re.search(r"latency in ONNX Runtime, 1 thread, batch \d+: .* p90 \S+ → \S+ ms", out)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "arguments",
    [
        ("shrink", "--ratio", 0.5, "--dry-run"),
        ("shrink", "--ratio", 0.5, "--restore", "pictures", "--dry-run"),
        ("sparsify", "--dry-run"),
        ("sensitivity", "--ratios", 0.5),
    ],
    ids=lambda a: " ".join(map(str, a[:1])),
)
def test_weights_that_are_no_numbers_bring_lines_of_ours_only(
    call: Call, value: float, arguments: tuple[object, ...], recwarn: pytest.WarningsRecorder
) -> None:
    model = conv_chain((3, 16, 24))
    w = np.frombuffer(model.proto.graph.initializer[0].raw_data, np.float32).copy()
    w[3] = value
    model.proto.graph.initializer[0].raw_data = w.tobytes()
    reloaded(model, Path("odd.onnx"))
    verb, *options = arguments
    code, _, err = call(verb, "odd.onnx", *options)
    assert code in (0, 3, 4)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    assert all(line.startswith(("warning: ", "onnxprune: ")) for line in err.splitlines())


def test_inspect_takes_auto_for_attention_as_shrink_does(call: Call) -> None:
    by_heads = call.json("inspect", MODELS / "fashion_vit.onnx")
    auto = call.json("inspect", MODELS / "fashion_vit.onnx", "--attention", "auto")
    assert auto["groups"] == by_heads["groups"]
