"""The verb sparsify, --then, and inspect --sparsity from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest

from onnxprune import io
from onnxprune.model import Model
from onnxprune.report.schemas import stored
from onnxprune.thin import Thinned
from tests.calls import Call
from tests.small import conv_chain, parsed, reloaded

BEFORE = {"chain.onnx", "frozen.onnx"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reloaded(conv_chain((3, 16, 24)), tmp_path / "chain.onnx")
    one = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y) {y = Conv(x, w)}",
        w=np.ones((2, 3, 1, 1), np.float32),
    )
    reloaded(one, tmp_path / "frozen.onnx")


def left() -> set[str]:
    return {path.name for path in Path().iterdir()}


def runs_hold(path: str, names: dict[str, int]) -> bool:
    weights = io.load(path).weights()
    return all(
        ((np.moveaxis(weights[name].read(), axis, -1).reshape(-1, 4) != 0).sum(axis=1) <= 2).all()
        for name, axis in names.items()
    )


CHAIN = {"w1": 1, "head": 1}


def test_sparsify_writes_beside_the_input_and_says_what_to_do_next(call: Call) -> None:
    code, out, err = call("sparsify", "chain.onnx")
    assert (code, err) == (0, "")
    assert left() == BEFORE | {"chain.sparse.onnx"}
    assert runs_hold("chain.sparse.onnx", CHAIN)
    *_, saved, after = out.splitlines()
    assert saved.startswith("saved chain.sparse.onnx · ")
    assert "pattern holds, loads and runs" in saved
    assert after == "next: trtexec --onnx=chain.sparse.onnx --sparsity=enable"
    assert "dense: 3 channels to sum over, not a multiple of 4" in out
    onnx.checker.check_model("chain.sparse.onnx", full_check=True)


def test_file_grows_by_the_recipe_alone(call: Call) -> None:
    call("sparsify", "chain.onnx")
    made = onnx.load("chain.sparse.onnx")
    del made.metadata_props[:]
    assert made.ByteSize() <= Path("chain.onnx").stat().st_size


def test_json_has_a_row_for_every_layer(call: Call) -> None:
    found = call.json("sparsify", "chain.onnx", "-o", "o.onnx")
    assert found["verb"] == "sparsify"
    sparse = found["sparsity"]
    assert (sparse["pattern"], sparse["sparsity"], sparse["method"]) == ("2:4", 0.5, "magnitude")
    first, second, head = sparse["layers"]
    assert (first["done"], first["eligible"], first["shape"]) == (False, False, [1, 16, 3, 9])
    assert (second["done"], second["axis"], second["shape"]) == (True, 1, [1, 24, 16, 9])
    assert (second["aligned"], head["aligned"]) == (True, False)
    weight = np.abs(io.load("chain.onnx").weights()["w1"].read().astype(np.float64))
    best = np.sort(weight.reshape(24, 4, 4, 9), axis=2)[:, :, 2:].sum()
    assert second["kept"] == pytest.approx(best / weight.sum(), rel=1e-6)
    assert sparse["dense_bytes"] == 4 * (24 * 16 * 9 + 4 * 24)
    assert sparse["packed_bytes"] == sparse["dense_bytes"] // 2 + (24 * 16 * 9 + 4 * 24) // 8
    assert sparse["xz"]["after"] < sparse["xz"]["before"]
    assert found["verify"]["status"] == "passed"
    assert set(found["verify"]["drift"]) == {"y"}


def test_table_goes_to_a_file(call: Call) -> None:
    assert call("sparsify", "chain.onnx", "--csv", "t.csv", "--dry-run")[0] == 0
    assert left() == BEFORE
    assert call("sparsify", "chain.onnx", "--csv", "t.csv")[0] == 0
    rows = list(csv.DictReader(Path("t.csv").read_text("utf-8").splitlines()))
    assert [row["done"] for row in rows] == ["False", "True", "True"]


@pytest.mark.parametrize(
    "asked",
    [
        ["--pattern", "2:4"],
        ["--pattern", "1x4", "--sparsity", "0.3"],
        ["--pattern", "kernel", "--sparsity", "0.5", "--scope", "global"],
        ["--pattern", "unstructured", "--sparsity", "0.7", "--ignore", "head"],
    ],
    ids=lambda asked: asked[1],
)
def test_recipe_repeats_to_the_byte(call: Call, asked: list[str]) -> None:
    first = call("sparsify", "chain.onnx", *asked, "-o", "a.onnx", "--recipe-out", "r.json")
    assert first[0] == 0
    for recipe in ("r.json", "a.onnx"):
        code, _, err = call("sparsify", "chain.onnx", "--recipe", recipe, "-o", "b.onnx", "--force")
        assert (code, err) == (0, "")
        assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    written = json.loads(Path("r.json").read_text("utf-8"))
    jsonschema.validate(written, json.loads(stored("recipe")))
    for entry in written["sparsity"]:
        assert entry["pattern"] == asked[1]
        assert (io.load("a.onnx").weights()[entry["tensor"]].read() == 0).any()


def test_recipe_for_a_retrained_model_warns_and_for_another_is_refused(call: Call) -> None:
    call("sparsify", "chain.onnx", "--recipe-out", "r.json")
    reloaded(conv_chain((3, 16, 24), seed=1), Path("again.onnx"))
    code, _, err = call("sparsify", "again.onnx", "--recipe", "r.json")
    assert code == 0
    assert "other values" in err
    reloaded(conv_chain((3, 16, 32)), Path("wider.onnx"))
    assert call("sparsify", "wider.onnx", "--recipe", "r.json")[0] == 2
    call("shrink", "chain.onnx", "--ratio", 0.5, "--recipe-out", "cut.json")
    code, _, err = call("sparsify", "chain.onnx", "--recipe", "cut.json", "--force")
    assert code == 2
    assert "thins no weights" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["chain.onnx", "--pattern", "2:2"], 2, "not N:M"),
        (["chain.onnx", "--pattern", "ring"], 2, "not known"),
        (["chain.onnx", "--pattern", ""], 2, "not known"),
        (["chain.onnx", "--sparsity", "0.4"], 2, "means sparsity 0.5"),
        (["chain.onnx", "--pattern", "1x4"], 2, "how much is to be zero"),
        (["chain.onnx", "--pattern", "kernel", "--sparsity", "1"], 2, "0 < sparsity < 1"),
        (["chain.onnx", "--scope", "global"], 2, "same of every run"),
        (["chain.onnx", "--ignore", "nothing"], 2, "matches no layer"),
        (["chain.onnx", "-o", "chain.onnx"], 2, "never overwritten"),
        (["absent.onnx"], 3, "absent.onnx"),
        (["frozen.onnx"], 3, "no layer can take pattern 2:4"),
        (["chain.onnx", "--min-cosine", "0.9999"], 4, "nothing was written"),
        (["chain.onnx", "--max-drift", "1e-6"], 4, "nothing was written"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else None,
)
def test_refusals_are_one_line_and_leave_nothing(
    call: Call, arguments: list[str], code: int, said: str
) -> None:
    got, out, err = call("sparsify", *arguments)
    assert (got, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1
    assert left() == BEFORE


def test_existing_output_needs_force(call: Call) -> None:
    assert call("sparsify", "chain.onnx")[0] == 0
    assert call("sparsify", "chain.onnx")[0] == 2
    assert call("sparsify", "chain.onnx", "--force")[0] == 0


def test_nothing_to_thin_by_choice_writes_the_model_with_a_warning(call: Call) -> None:
    code, out, err = call("sparsify", "chain.onnx", "--ignore", "*")
    assert code == 0
    assert "nothing was thinned" in err
    assert "a copy: nothing was thinned" in out
    assert "--sparsity" not in out
    assert onnx.load("chain.sparse.onnx") == onnx.load("chain.onnx")


def test_file_in_which_the_pattern_does_not_hold_is_not_kept(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxprune import thinning

    whole = io.load("chain.onnx")
    real = thinning.embed
    monkeypatch.setattr(thinning, "embed", lambda _, recipe: real(whole, recipe))
    code, _, err = call("sparsify", "chain.onnx")
    assert code == 4
    assert "does not hold 2:4 in the written file" in err
    assert left() == BEFORE


def test_other_change_than_zeros_is_caught(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxprune import impose
    from onnxprune.replaced import replaced

    real = impose.thin

    def tampered(model: Model, *rest: object) -> Thinned:
        from dataclasses import replace

        found = real(model, *rest)
        bias = next(t for t in found.model.proto.graph.initializer if t.name == "beta0")
        value = onnx.numpy_helper.to_array(bias) + 1
        return replace(found, model=replaced(found.model, {id(bias): lambda: value}))

    monkeypatch.setattr(impose, "thin", tampered)
    code, _, err = call("sparsify", "chain.onnx")
    assert code == 4
    assert "'beta0' changed" in err
    assert left() == BEFORE


def test_external_data_stays_external(call: Call) -> None:
    proto = onnx.load("chain.onnx")
    onnx.save(proto, "out.onnx", save_as_external_data=True, location="out.bin", size_threshold=64)
    code, _, err = call("sparsify", "out.onnx")
    assert (code, err) == (0, "")
    assert left() == BEFORE | {"out.onnx", "out.bin", "out.sparse.onnx", "out.sparse.onnx.data"}
    assert runs_hold("out.sparse.onnx", CHAIN)


def test_inspect_shows_what_sparsity_weights_have(call: Call) -> None:
    call("sparsify", "chain.onnx", "--ignore", "head")
    found = call.json("inspect", "chain.sparse.onnx", "--sparsity")
    assert [(one["tensor"], "2:4" in one["runs"]) for one in found["held"]] == [
        ("w0", False), ("w1", True), ("head", False),
    ]  # fmt: skip
    assert found["held"][1]["zeros"] == 0.5
    assert "2:4 4:8" in call("inspect", "chain.sparse.onnx", "--sparsity")[1]
    assert call.json("inspect", "chain.onnx")["held"] is None
    assert call("inspect", "chain.onnx", "--sparsity", "--csv", "h.csv")[0] == 0
    assert len(Path("h.csv").read_text("utf-8").splitlines()) == 4


# -- shrink --then ---------------------------------------------------------------------------------


def test_then_cuts_to_what_the_pattern_wants_and_imposes_it(call: Call) -> None:
    reloaded(conv_chain((3, 64, 96)), Path("wide.onnx"))
    found = call.json("shrink", "wide.onnx", "--ratio", 0.4, "--then", "2:4", "-o", "o.onnx",
                      "--recipe-out", "r.json")  # fmt: skip
    shape = io.load("o.onnx").weights()["w1"].shape
    assert shape == (64, 48, 3, 3), "multiples of 16, not of 8"
    assert runs_hold("o.onnx", CHAIN)
    assert found["verify"]["twin"]["passed"]
    assert [one["done"] for one in found["sparsity"]["layers"]] == [False, True, True]
    written = json.loads(Path("r.json").read_text("utf-8"))
    assert written["removed"]
    assert {(e["tensor"], e["axis"]) for e in written["sparsity"]} == {("w1", 1), ("head", 1)}
    for recipe in ("r.json", "o.onnx"):
        again = call("shrink", "wide.onnx", "--recipe", recipe, "-o", "p.onnx", "--force")
        assert again[0] == 0
        assert Path("o.onnx").read_bytes() == Path("p.onnx").read_bytes()


def test_then_drift_is_that_of_the_file_and_a_limit_judges_it(call: Call) -> None:
    plain = call.json("shrink", "chain.onnx", "--ratio", 0.2, "--round-to", 4, "--dry-run")
    both = call.json("shrink", "chain.onnx", "--ratio", 0.2, "--round-to", 4, "--then", "2:4",
                     "--dry-run")  # fmt: skip
    drift = [found["verify"]["drift"]["y"]["rel_l2"] for found in (plain, both)]
    assert drift[1] > drift[0]
    limit = sum(drift) / 2
    code, _, _ = call("shrink", "chain.onnx", "--ratio", 0.2, "--then", "2:4", "--max-drift", limit)
    assert code == 4
    assert left() == BEFORE


def test_then_says_that_the_pattern_holds(call: Call) -> None:
    _, out, _ = call("shrink", "chain.onnx", "--ratio", 0.3, "--then", "2:4")
    *_, saved, after = out.splitlines()
    assert "twin ok, then 2:4, which holds" in saved
    assert after.endswith("--sparsity=enable")
    assert call("shrink", "chain.onnx", "--ratio", 0.3, "--then", "2:2", "--force")[0] == 2


def test_then_with_data_is_a_part_of_the_refit(call: Call) -> None:
    """The weights that stay make up for those that go: nearer than the smallest ones gone."""
    rng = np.random.default_rng(3)
    shape = io.load("chain.onnx").proto.graph.input[0].type.tensor_type.shape
    sizes = [dim.dim_value or 1 for dim in shape.dim[1:]]
    mixed = rng.standard_normal((200, *sizes)) + rng.standard_normal((200, 1, *sizes[1:]))
    np.savez("d.npz", mixed.astype(np.float32))
    given = ("shrink", "chain.onnx", "--ratio", 0.2, "--round-to", 4, "--then", "2:4", "--data",
             "d.npz", "--force")  # fmt: skip
    drifts = []
    for restore, method in (("none", "magnitude"), ("refit", "sparsegpt")):
        found = call.json(*given, "--restore", restore)
        assert found["sparsity"]["method"] == method
        assert [row["zeros"] for row in found["sparsity"]["layers"] if row["done"]] == [0.5] * 2
        (drift,) = found["verify"]["drift"].values()
        drifts.append(drift["rel_l2"])
    assert drifts[1] < 0.7 * drifts[0]


def test_a_pattern_that_a_later_shrink_destroys_is_warned_of(call: Call) -> None:
    np.savez("d.npz", np.random.default_rng(3).standard_normal((64, 3, 8, 8)).astype(np.float32))
    call("sparsify", "chain.onnx", "--pattern", "2:4", "-o", "thin.onnx")
    given = ("shrink", "thin.onnx", "--ratio", 0.2, "--round-to", 4, "--data", "d.npz", "--dry-run")
    code, _, err = call(*given)
    assert code == 0
    assert "1 layer held 2:4 before and no longer does: --then 2:4 keeps the pattern" in err
    assert "no longer" not in call(*given, "--then", "2:4")[2]
    assert "no longer" not in call("shrink", "chain.onnx", *given[2:])[2]


def test_then_repeated_without_the_data_says_so_and_takes_the_smallest(call: Call) -> None:
    np.savez("d.npz", np.random.default_rng(3).standard_normal((200, 3, 8, 8)).astype(np.float32))
    call("shrink", "chain.onnx", "--ratio", 0.2, "--then", "2:4", "--data", "d.npz")
    code, _, err = call("shrink", "chain.onnx", "--recipe", "chain.pruned.onnx", "-o", "o.onnx")
    assert code == 0
    assert "were refitted to data, these are not" in err
    (entry,) = (p for p in io.load("o.onnx").proto.metadata_props if p.key == "onnxprune.recipe")
    assert json.loads(entry.value)["options"]["sparsify"]["method"] == "magnitude"


def test_recipe_with_data_and_orders_repeats_byte_by_byte_and_knows_other_data(call: Call) -> None:
    rng = np.random.default_rng(3)
    for name in ("d", "e"):
        np.savez(f"{name}.npz", rng.standard_normal((60, 3, 8, 8)).astype(np.float32))
    given = ("sparsify", "chain.onnx", "--force")
    call(*given, "--data", "d.npz", "--permute", "-o", "first.onnx")
    again = (*given, "--recipe", "first.onnx", "-o", "again.onnx")
    code, _, err = call(*again, "--data", "d.npz")
    assert (code, "other data" in err) == (0, False)
    assert Path("first.onnx").read_bytes() == Path("again.onnx").read_bytes()
    code, _, err = call(*again, "--data", "e.npz")
    assert (code, "the recipe was made with other data" in err) == (0, True)
    code, _, err = call(*again)
    assert (code, "the recipe's method sparsegpt needs data" in err) == (2, True)


def test_recipe_of_another_verb_is_refused_with_the_one_that_repeats_it(call: Call) -> None:
    call("sparsify", "chain.onnx", "--recipe-out", "thin.json")
    code, out, err = call("shrink", "chain.onnx", "--recipe", "thin.json")
    assert (code, out) == (2, "")
    assert "removes no channels (sparsify --recipe repeats it)" in err
    call("shrink", "chain.onnx", "--ratio", 0.5, "--then", "2:4", "--recipe-out", "both.json")
    code, out, err = call("sparsify", "chain.onnx", "--recipe", "both.json", "--force")
    assert (code, out) == (2, "")
    assert "shrink --recipe repeats it" in err


def test_then_takes_the_sparsity_asked_for(call: Call) -> None:
    given = ("shrink", "chain.onnx", "--ratio", 0.5, "--force")
    found = call.json(*given, "--then", "unstructured", "--sparsity", 0.75)
    rows = [row for row in found["sparsity"]["layers"] if row["done"]]
    assert rows
    for row in rows:
        assert row["zeros"] == pytest.approx(0.75, abs=0.01)
    made = io.load("chain.pruned.onnx").weights()["w1"].read()
    assert (made == 0).mean() == pytest.approx(0.75, abs=0.01)
    code, _, err = call(*given, "--then", "2:4", "--sparsity", 0.7)
    assert (code, "means sparsity 0.5" in err) == (2, True)
    code, _, err = call(*given, "--sparsity", 0.7)
    assert (code, "sparsity goes with a pattern" in err) == (2, True)
