from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxprune
from onnxprune import shrinking, stepwise, verdicts
from onnxprune.data import Data
from onnxprune.errors import (
    InvariantError,
    ModelError,
    TargetError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from onnxprune.model import Model
from onnxprune.pipeline import compare, inspect, shrink
from onnxprune.runtime import session
from onnxprune.types import Report, TwinResult, Verdict
from onnxprune.verdicts import made_up_data
from tests.small import MODELS, array, conv_chain, parsed, reloaded

RESNET = MODELS / "fashion_resnet.onnx"


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    reloaded(conv_chain(), tmp_path / "chain.onnx")
    return tmp_path / "chain.onnx"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ----------------------------------------------------------------------------------- it works


def test_shrink_writes_a_smaller_model_that_equals_its_twin(chain: Path) -> None:
    target = chain.with_name("small.onnx")
    made, report = shrink(chain, ratio=0.5, output=target)
    assert array(made, "w0").shape == (4, 3, 3, 3)
    assert array(onnxprune.load(target), "w1").shape == (6, 4, 3, 3)
    assert report.verdict.status == "passed"
    assert report.verdict.twin is not None
    assert report.verdict.twin.passed
    assert report.exact is True
    assert report.output_path == str(target)
    assert report.after is not None
    assert report.after.bytes == target.stat().st_size
    assert report.after.params < report.before.params / 2
    assert report.warnings == ()
    assert set(report.recipe) >= {"schema", "removed", "options", "input_sha256"}


def test_shrink_takes_a_path_bytes_a_message_and_a_model() -> None:
    model = conv_chain()
    for given in (model, model.proto, model.proto.SerializeToString()):
        made, report = shrink(given, ratio=0.5, verify="none")
        assert array(made, "w0").shape == (4, 3, 3, 3)
        assert report.input_path == ""


def test_every_stage_is_timed_and_told() -> None:
    told: list[str] = []
    _, report = shrink(RESNET, ratio=0.5, restore="bias", progress=told.append)
    order = [
        "load",
        "prepare",
        "analyse",
        "score",
        "select",
        "rewrite",
        "verify",
        "restore",
        "save",
    ]
    assert told == [*order[:-1], "verify", "save"]
    assert all(report.seconds[stage] > 0 for stage in order[:-1])
    assert report.peak_memory_bytes > 0


def test_two_sizes_are_tried_where_the_batch_is_dynamic() -> None:
    _, report = shrink(conv_chain(batch="N"), ratio=0.5)
    assert report.stand_ins == {"x": (1, 3, 8, 8)}
    graph, _ = inspect(conv_chain(batch="N"))
    data = made_up_data(graph, 0)
    assert [batch["x"].shape[0] for batch in data.batches] == [1, 3]
    assert data.label == "random, seed 0"


def test_data_from_a_file_is_used_and_named() -> None:
    _, report = shrink(RESNET, ratio=0.3, data=MODELS / "fashion_calib.npz")
    assert report.verdict.inputs == "fashion_calib.npz, 256 samples"


def test_input_shape_is_what_costs_are_counted_at() -> None:
    _, report = shrink(RESNET, ratio=0.5, input_shapes={"input": (7, 1, 28, 28)}, verify="none")
    assert report.stand_ins == {"input": (7, 1, 28, 28)}
    _, one = shrink(RESNET, ratio=0.5, verify="none")
    assert report.before.macs == 7 * one.before.macs
    assert report.recipe["options"]["input_shape"] == {"input": [7, 1, 28, 28]}  # type: ignore[index]  # JSON


def test_attention_cuts_heads_or_dimensions_of_every_head() -> None:
    vit = MODELS / "fashion_vit.onnx"
    _, heads = shrink(vit, ratio=0.5, verify="twin")
    _, dims = shrink(vit, ratio=0.5, verify="twin", attention="dims")
    assert {g.unit for g in heads.groups} != {g.unit for g in dims.groups}
    with pytest.raises(UsageError, match="attention is 'tails'"):
        shrink(vit, ratio=0.5, attention="tails")


def test_ratio_zero_writes_an_equal_model_with_a_warning(chain: Path) -> None:
    target = chain.with_name("same.onnx")
    _, report = shrink(chain, ratio=0.0, output=target)
    assert onnx.load(target) == onnx.load(chain)
    assert report.warnings == ("nothing was cut: the ratio is 0",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 0.01}, "less than one channel of every group"),
        ({"ratio": 0.5, "round_to": 64}, "round-to 64 leave every group whole"),
        ({"ratio": 0.5, "min_channels": 99}, "min-channels keeps them"),
        ({"ratio": 0.5, "ignore": ["w*"]}, "ignore and only keep every group"),
    ],
)
def test_nothing_to_cut_is_a_warning_with_the_reason(options: dict[str, object], says: str) -> None:
    model = conv_chain()
    made, report = shrink(model, **options)  # type: ignore[arg-type]  # test
    assert made.proto == model.proto
    assert says in report.warnings[0]
    assert report.recipe == {}


def test_weights_that_are_not_numbers_are_warned_of() -> None:
    model = conv_chain(bn=False)
    broken = array(model, "w0").copy()
    broken[0] = np.nan
    model.proto.graph.initializer[0].raw_data = broken.tobytes()
    _, report = shrink(model, ratio=0.5)
    assert "weight 'w0' holds NaN/Inf" in report.warnings


# --------------------------------------------------------------------------------- it refuses


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "one of ratio, target, lossless and recipe"),
        ({"ratio": 0.5, "recipe": "r.json"}, "one of ratio, target, lossless and recipe"),
        ({"ratio": 1}, "ratio is 1"),
        ({"ratio": -1e-9}, "ratio is -1e-09"),
        ({"ratio": 0.5, "restore": "refit"}, "refit needs calibration data"),
        ({"ratio": 0.5, "restore": "magic"}, "restore is 'magic'"),
        ({"ratio": 0.5, "round_to": "most"}, "round-to is 'most'"),
        ({"targets": {"speed": 0.5}}, "target 'speed' is unknown"),
        ({"ratio": 0.5, "verify": "some"}, "give none, twin or full"),
        ({"ratio": 0.5, "verify": "twin", "max_drift": 0.1}, "--max-drift needs --verify full"),
        ({"ratio": 0.5, "verify": "none", "min_cosine": 0.1}, "--min-cosine needs --verify full"),
        ({"ratio": 0.5, "min_cosine": 1.1}, "--min-cosine is 1.1"),
        ({"ratio": 0.5, "min_top1": -0.1}, "--min-top1 is -0.1"),
        ({"ratio": 0.5, "max_drift": -1}, "--max-drift is -1"),
        ({"ratio": 0.5, "importance": "magic"}, "importance is 'magic'"),
        ({"ratio": 0.5, "data": "missing.npz"}, "no such file"),
        ({"ratio": 0.5, "input_shapes": {"z": (1,)}}, "the model has no input 'z'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], says: str, chain: Path) -> None:
    target = chain.with_name("out.onnx")
    with pytest.raises(UsageError, match=says):
        shrink(chain, output=target, **options)  # type: ignore[arg-type]  # test
    assert files(chain.parent) == {"chain.onnx"}


def test_bad_outputs_are_refused_before_any_work(chain: Path) -> None:
    exists, folder = chain.with_name("exists.onnx"), chain.with_name("folder")
    exists.write_text("mine")
    folder.mkdir()

    def refused(says: str, **options: object) -> None:
        told: list[str] = []
        with pytest.raises(UsageError, match=says):
            shrink(chain, ratio=0.5, progress=told.append, **options)  # type: ignore[arg-type]  # test
        assert told == []

    refused("is the input itself", output=chain)
    refused("is the input itself", output=chain, force=True)
    refused("is the input itself", recipe_out=chain, force=True)
    refused("exists", output=exists)
    refused("exists", output=chain.with_name("new.onnx"), recipe_out=exists)
    refused("is a directory", output=folder, force=True)
    refused("does not exist", output=chain.with_name("no") / "m.onnx")
    refused("given for two outputs", output=folder / "a", recipe_out=folder / "a")
    assert exists.read_text() == "mine"
    assert files(chain.parent) == {"chain.onnx", "exists.onnx", "folder"}


def test_symbolic_link_to_the_input_is_the_input(chain: Path) -> None:
    link = chain.with_name("link.onnx")
    link.symlink_to(chain)
    with pytest.raises(UsageError, match="is the input itself"):
        shrink(chain, ratio=0.5, output=link, force=True)


def test_unwritable_folder_is_refused(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UsageError, match="is not writable"):
        shrink(chain, ratio=0.5, output=chain.with_name("a.onnx"))


def test_force_overwrites(chain: Path) -> None:
    target = chain.with_name("exists.onnx")
    target.write_text("mine")
    shrink(chain, ratio=0.5, output=target, force=True)
    onnx.checker.check_model(target)


def test_nothing_prunable_names_the_reasons() -> None:
    model = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y) {y = Conv(x, w)}",
        w=np.ones((2, 3, 1, 1), np.float32),
    )
    with pytest.raises(UnsupportedModelError, match=r"nothing can be pruned.*reaches output 'y'"):
        shrink(model, ratio=0.5)
    bare = parsed("g (float[4] x) => (float[4] y) {y = Relu(x)}")
    with pytest.raises(UnsupportedModelError, match="no Conv, Gemm or MatMul"):
        shrink(bare, ratio=0.5)


@pytest.mark.parametrize("normed", [True, False], ids=["a norm", "a maximum"])
def test_nothing_prunable_but_under_a_norm_names_the_option(normed: bool) -> None:
    middle = "LayerNormalization(a, g)" if normed else "Softmax(a)"
    weights = {"w1": np.ones((5, 8), np.float32), "w2": np.ones((8, 4), np.float32)}
    model = parsed(
        f"g (float[2,5] x) => (float[2,4] y) {{a = MatMul(x, w1) b = {middle} y = MatMul(b, w2)}}",
        g=np.ones(8, np.float32),
        **weights,
    )
    with pytest.raises(UnsupportedModelError) as raised:
        shrink(model, ratio=0.5)
    assert ("--allow-norm" in raised.value.hint) is normed


def test_missing_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        shrink(tmp_path / "none.onnx", ratio=0.5)


# ------------------------------------------------------------------------------- verification


def verdict_of(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> None:
    monkeypatch.setattr(verdicts, "run_checks", lambda *_, **__: verdict)


def test_wrong_surgery_is_our_bug_and_writes_nothing(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = TwinResult(False, 1, 1, 1e-4, "y")
    verdict_of(monkeypatch, Verdict("failed", "output 'y' differs", twin, {}, "random", ours=True))
    with pytest.raises(VerificationError, match="bug in onnxprune: please report"):
        shrink(chain, ratio=0.5, output=chain.with_name("a.onnx"))
    assert files(chain.parent) == {"chain.onnx"}


def test_passed_limit_is_the_users_and_writes_nothing(chain: Path) -> None:
    with pytest.raises(VerificationError, match=r"your limit: --max-drift 0\.01") as caught:
        shrink(chain, ratio=0.5, output=chain.with_name("a.onnx"), max_drift=0.01)
    assert "bug" not in str(caught.value)
    assert files(chain.parent) == {"chain.onnx"}


def test_limits_that_hold_pass(chain: Path) -> None:
    _, report = shrink(chain, ratio=0.5, max_drift=100, min_cosine=-1, min_top1=0)
    assert report.verdict.passed


def test_untestable_model_is_written_with_a_warning(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict_of(monkeypatch, Verdict("not_run", "too noisy", None, {}, "random"))
    _, report = shrink(chain, ratio=0.5, output=chain.with_name("a.onnx"))
    assert report.warnings == ("not verified: too noisy",)
    assert chain.with_name("a.onnx").exists()


def test_broken_invariant_passes_through(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise InvariantError("a shape cannot be written")

    monkeypatch.setattr(shrinking, "operate", broken)
    with pytest.raises(InvariantError):
        shrink(chain, ratio=0.5, output=chain.with_name("a.onnx"))
    assert files(chain.parent) == {"chain.onnx"}


def odd_tail() -> Model:
    """A model that ONNX Runtime cannot run: its last node is of a domain nobody knows."""
    weights = {"w": np.ones((8, 3, 1, 1), np.float32), "v": np.ones((2, 8, 1, 1), np.float32)}
    model = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y)\n"
        "{a = Conv(x, w) b = Conv(a, v) y = com.acme.Odd(b)}",
        **weights,
    )
    model.proto.opset_import.add(domain="com.acme", version=1)
    return model


def test_model_the_runtime_cannot_run_needs_verify_none() -> None:
    with pytest.raises(VerificationError, match="--verify none"):
        shrink(odd_tail(), ratio=0.5)
    made, report = shrink(odd_tail(), ratio=0.5, verify="none")
    assert array(made, "w").shape == (4, 3, 1, 1)
    assert report.verdict.status == "none"


# ------------------------------------------------------------------------ inspect and compare


def test_inspect_counts_and_lists_without_changing_anything(chain: Path) -> None:
    graph, report = inspect(chain)
    assert [group.frozen is None for group in report.groups] == [True, True, False]
    assert all(group.size == group.kept for group in report.groups)
    assert report.after is None
    assert report.importance == "path"
    assert graph.prunable
    assert files(chain.parent) == {"chain.onnx"}


def test_inspect_works_where_nothing_can_be_pruned() -> None:
    _, report = inspect(parsed("g (float[4] x) => (float[4] y) {y = Relu(x)}"))
    assert report.groups == ()
    assert report.importance == ""


def test_compare_of_a_model_with_itself_finds_no_drift() -> None:
    report = compare(RESNET, RESNET, data=MODELS / "fashion_calib.npz")
    assert report.verdict.drift["logits"].cosine == 1
    assert report.before.params == report.after.params  # type: ignore[union-attr]  # test
    assert report.verdict.inputs.startswith("fashion_calib")


def test_compare_of_models_with_other_inputs_is_refused() -> None:
    other = parsed("g (float[4] z) => (float[4] y) {y = Relu(z)}")
    with pytest.raises(UsageError, match="different inputs"):
        compare(conv_chain(), other)


def test_compare_needs_models_the_runtime_can_run() -> None:
    with pytest.raises(VerificationError, match="cannot run"):
        compare(odd_tail(), odd_tail())


# ------------------------------------------------------------------------------- the package


def test_public_names_are_functions_whatever_was_imported_before() -> None:
    import onnxprune.analyse
    import onnxprune.report.build
    import onnxprune.verify

    for name in ("analyse", "score", "select", "rewrite", "verify", "report", "shrink"):
        assert callable(getattr(onnxprune, name)), name
    assert set(onnxprune.__all__) <= set(dir(onnxprune))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = onnxprune.nothing  # type: ignore[attr-defined]  # test


def test_library_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("onnxprune").handlers.clear()
    shrink(RESNET, ratio=0.5)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# --------------------------------------------------------------------- targets and restoring


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    """Samples for the chain."""
    x = np.random.default_rng(1).standard_normal((80, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=x)
    return tmp_path / "calib.npz"


@pytest.fixture
def open_chain(tmp_path: Path) -> Path:
    reloaded(conv_chain((3, 16, 24), batch="N"), tmp_path / "open.onnx")
    return tmp_path / "open.onnx"


def drifted(report: Report) -> float:
    """Relative L2 difference of the first output."""
    return next(iter(report.verdict.drift.values())).rel_l2


def test_data_restore_and_the_proof_is_that_of_the_plain_cut(open_chain: Path, calib: Path) -> None:
    plain, before = shrink(open_chain, ratio=0.4, data=calib, restore="none", importance="l1")
    made, after = shrink(open_chain, ratio=0.4, data=calib, importance="l1")
    assert before.restored == ()
    assert [one.node for one in after.restored] == ["c1", "y"]
    assert all(0 <= one.after <= one.before for one in after.restored)
    assert after.verdict.status == "passed"
    assert after.verdict.twin == before.verdict.twin
    assert drifted(before) > 1.2 * drifted(after) > 0
    assert after.verdict.inputs == "calib.npz, 80 samples"
    assert after.recipe["options"]["restore"] == "refit"  # type: ignore[index]  # JSON
    assert set(after.recipe["restored"]) == {"w1", "beta1", "head", "y_bias"}  # type: ignore[arg-type]  # JSON
    assert {n: w.shape for n, w in plain.weights().items()} == {
        n: w.shape for n, w in made.weights().items() if n != "y_bias"
    }
    assert after.seconds["restore"] > 0


def test_restored_model_is_the_same_file_twice_and_by_its_recipe(
    open_chain: Path, calib: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        shrink(open_chain, ratio=0.4, data=calib, output=tmp_path / f"{name}.out")
    first = (tmp_path / "a.out").read_bytes()
    assert first == (tmp_path / "b.out").read_bytes()
    shrink(open_chain, recipe=tmp_path / "a.out", data=calib, output=tmp_path / "c.out")
    assert first == (tmp_path / "c.out").read_bytes()
    _, without = shrink(open_chain, recipe=tmp_path / "a.out")
    assert without.restored == ()
    assert any("refit them again" in said for said in without.warnings)


def test_interrupted_refit_leaves_neither_output_nor_temporary_files(
    open_chain: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(stepwise, "_IN_MEMORY", 1)
    monkeypatch.setattr(stepwise, "_SMALL", 1)
    before, spilled = files(tmp_path), []

    def interrupt(stage: str) -> None:
        if stage.startswith("restore 2/"):
            spilled.extend(temporary.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shrink(
            open_chain, ratio=0.4, data=calib, output=tmp_path / "o.onnx", progress=interrupt,
            importance="l1",
        )  # fmt: skip
    assert spilled
    assert files(tmp_path) == before
    assert list(temporary.iterdir()) == []


def test_limits_are_those_of_the_restored_model(open_chain: Path, calib: Path) -> None:
    _, plain = shrink(open_chain, ratio=0.4, data=calib, restore="none", importance="l1")
    _, made = shrink(open_chain, ratio=0.4, data=calib, importance="l1")
    between = (drifted(plain) + drifted(made)) / 2
    options = {"ratio": 0.4, "data": calib, "importance": "l1", "max_drift": between}
    shrink(open_chain, **options)  # type: ignore[arg-type]  # test
    with pytest.raises(VerificationError, match="max-drift"):
        shrink(open_chain, restore="none", **options)  # type: ignore[arg-type]  # test


def test_random_data_restore_nothing() -> None:
    model = conv_chain(batch="N")
    _, report = shrink(model, ratio=0.4, data=onnxprune.random_data(Model(model.proto), seed=0))
    assert report.restored == ()


@pytest.mark.parametrize("measure", ["macs", "params"])
def test_targets_leave_what_they_say(measure: str, open_chain: Path) -> None:
    _, report = shrink(open_chain, targets={measure: 0.5})
    assert report.after is not None
    left = getattr(report.after, measure) / getattr(report.before, measure)
    assert left == pytest.approx(0.5, abs=0.04)
    options = report.recipe["options"]
    assert options["targets"] == {measure: 0.5}  # type: ignore[index]  # JSON
    assert options["scope"] == "isomorphic"  # type: ignore[index]  # JSON


def test_target_out_of_reach_is_an_error_and_writes_nothing(chain: Path) -> None:
    with pytest.raises(TargetError, match="cannot be reached"):
        shrink(chain, targets={"macs": 0.01}, min_channels=4, output=chain.with_name("o.onnx"))
    assert files(chain.parent) == {"chain.onnx"}


def test_round_to_auto_keeps_eights(tmp_path: Path) -> None:
    made, report = shrink(conv_chain((3, 64, 20)), ratio=0.3, round_to="auto")
    assert array(made, "w0").shape == (48, 3, 3, 3)
    assert array(made, "w1").shape == (16, 48, 3, 3)
    assert report.recipe["options"]["round_to"] == "auto"  # type: ignore[index]  # JSON


def test_aggregate_changes_which_channels_stay() -> None:
    """Filter 0 has one large weight, filter 1 many small ones."""
    w = np.full((4, 3, 3, 3), 1.0, np.float32)
    w[0], w[1] = 0, 0.2
    w[0, 0, 0, 0] = 4
    rng = np.random.default_rng(0)
    text = "g (float[1,3,8,8] x) => (float[1,2,4,4] y) {h = Conv(x, w) r = Relu(h) y = Conv(r, v)}"
    kept = {}
    for name in ("sum", "max"):
        model = parsed(text, w=w, v=rng.standard_normal((2, 4, 3, 3)).astype(np.float32))
        made, report = shrink(
            model, ratio=0.25, importance="l1", aggregate=name, ignore="y", verify="none"
        )
        kept[name] = array(made, "w")
        assert report.recipe["options"]["aggregate"] == name  # type: ignore[index]  # JSON
    assert kept["sum"].shape == (3, 3, 3, 3)


def top1(model: Model) -> float:
    with np.load(MODELS / "fashion_test.npz") as stored:
        images, labels = stored["input"], stored["labels"]
    ran = session(model)
    made = [ran.run({"input": images[at : at + 500]})["logits"] for at in range(0, 2000, 500)]
    return float((np.concatenate(made).argmax(1) == labels).mean())


@pytest.mark.slow
def test_half_of_the_channels_of_a_trained_network_cost_little_after_a_refit() -> None:
    data = MODELS / "fashion_calib.npz"
    made, report = shrink(RESNET, ratio=0.5, data=data)
    assert report.importance == "obs"
    assert report.verdict.twin is not None
    assert report.verdict.twin.passed
    assert report.verdict.twin.max_rel < 1e-5
    assert len(report.restored) == 15
    assert all(one.after < one.before for one in report.restored)
    plain, _ = shrink(RESNET, ratio=0.5, data=data, restore="none", importance="obs")
    assert top1(made) >= 0.90
    assert top1(plain) < 0.60


@pytest.mark.slow
def test_a_network_of_constants_in_nodes_runs_through_on_random_images(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (16, 3, 48, 192)).astype(np.float32)
    data = Data([{"x": x[:6]}, {"x": x[6:12]}, {"x": x[12:]}], "images", random=False, samples=16)
    path = MODELS / "paddleocr_cls.onnx"
    plain, before = shrink(path, ratio=0.3, data=data, importance="l1", restore="none")
    made, after = shrink(path, ratio=0.3, data=data, importance="l1", output=tmp_path / "o.onnx")
    assert after.verdict.status == "passed"
    assert drifted(after) < drifted(before)
    assert len(plain.proto.graph.node) == len(made.proto.graph.node)
    assert sum(one.ridge is not None for one in after.restored) > 40
