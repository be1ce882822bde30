from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from rich.console import Console

import onnxprune
from onnxprune import recipe as recipes
from onnxprune.pipeline import compare, inspect, shrink
from onnxprune.report.build import as_json, only_groups
from onnxprune.report.channels import group_detail, groups_csv
from onnxprune.report.clock import STAGES, Clock, Heard, peak_memory
from onnxprune.report.endings import worst_drift
from onnxprune.report.layout import number
from onnxprune.report.ops import operator_table, operators_of
from onnxprune.report.schemas import generate, stored
from onnxprune.report.tables import compare_report, inspect_report, shrink_report
from onnxprune.types import Drift, Latency, NextStep, Refitted, Report
from tests.small import MODELS, conv_chain, parsed


@pytest.fixture(scope="module")
def shrunk() -> Report:
    return shrink(MODELS / "fashion_resnet.onnx", ratio=0.5)[1]


def printed(parts: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=160)
    for part in parts:  # type: ignore[attr-defined]  # test
        console.print(part)
    return out.getvalue()


# -------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", ["report", "recipe", "sensitivity", "sweep"])
def test_stored_schemas_are_up_to_date(name: str) -> None:
    shipped = json.loads(stored(name))
    made = without_doubled(json.loads(generate()[name]))
    assert shipped == made, "run python -m onnxprune.report.schemas"
    jsonschema.Draft202012Validator.check_schema(shipped)


def without_doubled(schema: object) -> object:
    """A schema without what older pydantics add: an ``enum`` that says what ``const`` says."""
    match schema:
        case dict():
            drop = {"enum"} if "const" in schema else set()
            return {key: without_doubled(value) for key, value in schema.items() if key not in drop}
        case list():
            return [without_doubled(value) for value in schema]
    return schema


def test_reports_of_every_verb_fit_the_schema(shrunk: Report) -> None:
    valid = jsonschema.Draft202012Validator(json.loads(stored("report"))).validate
    valid(as_json(shrunk))
    graph, report = inspect(MODELS / "fashion_vit.onnx")
    valid(as_json(report, operators_of(graph, report.before)))
    path = MODELS / "fashion_resnet.onnx"
    found = compare(path, path)
    valid(as_json(found))
    valid(as_json(replace(found, latency=Latency(2.0, 1.0, 0.5, 0.4, 0.6, 9, 1))))


def test_recipes_fit_the_schema() -> None:
    made, _ = shrink(MODELS / "fashion_vit.onnx", ratio=0.5, verify="none")
    recipe = recipes.read(made).as_json()
    jsonschema.Draft202012Validator(json.loads(stored("recipe"))).validate(recipe)


def test_json_has_the_keys_of_the_design(shrunk: Report) -> None:
    found = as_json(shrunk)
    assert found["schema"] == 1
    assert found["verb"] == "shrink"
    for side in ("input", "output"):
        assert {"path", "params", "macs", "bytes", "channels"} <= set(found[side])  # type: ignore[call-overload]  # JSON
    group = found["groups"][0]  # type: ignore[index]  # JSON
    assert {"id", "size", "kept", "unit", "producers", "consumers", "frozen"} <= set(group)
    assert set(found["seconds"]) == set(STAGES)  # type: ignore[call-overload]  # JSON
    verify = found["verify"]
    assert verify["status"] == "passed"  # type: ignore[index]  # JSON
    assert verify["twin"]["passed"] is True  # type: ignore[index]  # JSON
    assert set(verify["drift"]["logits"]) == {"cosine", "snr_db", "rel_l2", "max_abs", "top1"}  # type: ignore[index]  # JSON


def test_what_is_not_a_number_becomes_null(shrunk: Report) -> None:
    odd = Drift(math.nan, math.inf, -math.inf, math.nan, None)
    report = replace(shrunk, verdict=replace(shrunk.verdict, drift={"y": odd}))
    found = as_json(report)
    drift = found["verify"]["drift"]["y"]  # type: ignore[index]  # JSON
    assert set(drift.values()) == {None}
    json.dumps(found, allow_nan=False)


def test_size_and_kept_count_along_the_axis_of_the_producer() -> None:
    _, report = shrink(MODELS / "fashion_vit.onnx", ratio=0.5, verify="none")
    whole = [group for group in report.groups if group.unit in ("head", "group")]
    assert [(group.size, group.kept) for group in whole] == [(192, 96)] * 5


def test_only_groups_leaves_those() -> None:
    graph, report = inspect(MODELS / "fashion_resnet.onnx")
    assert [group.id for group in only_groups(report, graph.groups[3:5]).groups] == [3, 4]


# ------------------------------------------------------------------------------------ tables


def test_shrink_tells_costs_drift_and_a_closing_line(shrunk: Report) -> None:
    step = NextStep("trtexec --onnx='out dir/m.onnx'", ("float32 stays float32",))
    written = replace(shrunk, output_path="out dir/m.onnx", following=step)
    text = printed(shrink_report(written, verbose=True))
    lines = text.splitlines()
    assert "block1.first.conv.weight → block1.second.conv.weight" in text
    assert "frozen: reaches output 'logits'" in text
    assert "random input: says little about quality" in text
    assert lines[-3] == "float32 stays float32"
    assert lines[-2].startswith("saved out dir/m.onnx · 175 k → 44.2 k params · ")
    assert "twin ok · drift on random input" in lines[-2]
    assert lines[-1] == "next: trtexec --onnx='out dir/m.onnx'"


def test_layers_that_keep_their_weights_say_why(shrunk: Report) -> None:
    nan = float("nan")
    left = Refitted("y", nan, nan, None, "Einsum is no plain product")
    report = replace(shrunk, restored=(Refitted("a", 0.5, 0.1, 1e-3), left))
    said = printed(shrink_report(report))
    assert "restored: 1 of 2 layers refitted on" in said
    assert "mean held-out error 0.5 → 0.1" in said
    assert "  1 layer could not be refitted, first y: Einsum is no plain product" in said
    every = printed(shrink_report(report, verbose=True))
    assert "  a: 0.5 → 0.1\n" in every
    assert "  y: not refitted (Einsum is no plain product)" in every
    kept = printed(shrink_report(replace(shrunk, restored=(left, left))))
    assert "  2 layers could not be refitted" in kept
    assert "held-out" not in kept
    restored = as_json(report)["restored"]
    assert restored[1] == {  # type: ignore[index]  # JSON
        "node": "y", "before": None, "after": None, "ridge": None,
        "why": "Einsum is no plain product",
    }  # fmt: skip
    jsonschema.Draft202012Validator(json.loads(stored("report"))).validate(as_json(report))


def test_dry_run_and_no_verification_are_said() -> None:
    _, report = shrink(conv_chain(), ratio=0.5, verify="none")
    text = printed(shrink_report(report))
    assert "nothing saved" in text
    assert "not verified" in text
    assert "next:" not in text


def test_inspect_lists_groups_or_operators() -> None:
    graph, report = inspect(MODELS / "fashion_resnet.onnx")
    assert "9 can be pruned · importance auto: path" in printed(inspect_report(report))
    text = printed(inspect_report(report, operators_of(graph, report.before)))
    assert text.splitlines()[1].startswith("BatchNormalization ")
    detail = printed(group_detail(graph, graph.groups[0]))
    assert "producer" in detail
    assert "consumer" in detail
    assert "BatchNormalization" in detail
    frozen = next(group for group in graph.groups if group.frozen)
    assert "frozen: reaches output" in printed(group_detail(graph, frozen))


def test_inspect_with_names_lists_every_weight_and_node() -> None:
    graph, report = inspect(MODELS / "fashion_mobile.onnx")
    out = io.StringIO()
    for part in inspect_report(report, verbose=True):
        Console(file=out, width=10_000).print(part)
    assert "(+" not in out.getvalue()
    for group in graph.groups:
        for axis in group.producers:
            assert axis.tensor in out.getvalue()
            assert axis.node in out.getvalue()


def test_group_is_found_by_the_tensor_its_node_writes() -> None:
    graph, _ = inspect(MODELS / "fashion_vit.onnx")
    assert [group.id for group in graph.named("logits")] == [11]  # frozen: no labels are left
    assert [group.id for group in graph.named("/head/Gemm")] == [11]
    assert graph.named("nothing") == ()


def test_inspect_counts_heads() -> None:
    _, report = inspect(MODELS / "fashion_vit.onnx")
    assert "4 heads of 48" in printed(inspect_report(report))
    assert [g["units"] for g in as_json(report)["groups"]][:3] == [64, 4, 192]  # type: ignore[attr-defined]  # JSON


def test_model_without_groups_says_which_weights_have_no_rule() -> None:
    model = parsed(
        "g (uint8[1,3,4,4] x) => (int32[1,2,2,2] y) {y = ConvInteger(x, w)}",
        w=np.ones((2, 3, 3, 3), np.uint8),
    )
    _, report = inspect(model)
    text = printed(inspect_report(report))
    assert text.startswith("0 channel groups, 0 can be pruned · nothing can be pruned: no Conv")
    assert "operators that hold weights but have no rule: ConvInteger (1)" in " ".join(text.split())


def test_model_that_is_all_frozen_says_why_in_the_summary() -> None:
    model = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y) {y = Conv(x, w)}",
        w=np.ones((2, 3, 1, 1), np.float32),
    )
    _, report = inspect(model)
    line = printed(inspect_report(report)).splitlines()[-2]
    assert line.startswith("1 channel group, 0 can be pruned · nothing can be pruned: its only")


def test_operator_without_a_rule_is_said_to_freeze() -> None:
    model = parsed("g (float[1,4] x) => (float[1,4] y) {y = com.acme.Odd(x)}")
    model.proto.opset_import.add(domain="com.acme", version=1)
    graph, report = inspect(model)
    (use,) = operators_of(graph, report.before)
    assert (use.op_type, use.domain, use.rule) == ("Odd", "com.acme", None)
    assert "what it touches is frozen" in printed(inspect_report(report, [use]))


def test_compare_shows_both_sides(shrunk: Report) -> None:
    text = printed(compare_report(replace(shrunk, verb="compare")))
    assert "first" in text
    assert "second" in text


def test_csv_has_a_line_for_each_group() -> None:
    _, report = inspect(MODELS / "fashion_resnet.onnx")
    rows = list(csv.DictReader(io.StringIO(groups_csv(report.groups))))
    assert len(rows) == len(report.groups)
    assert rows[-1]["frozen"].startswith("reaches output")


def test_long_lists_of_outputs_are_cut_short(shrunk: Report) -> None:
    one = shrunk.verdict.drift["logits"]
    many = {f"y{n}": one for n in range(9)}
    text = printed(shrink_report(replace(shrunk, verdict=replace(shrunk.verdict, drift=many))))
    assert "and 3 more outputs" in text


def test_worst_drift_is_the_farthest_and_a_missing_figure_is_worst(shrunk: Report) -> None:
    near, far = Drift(1, 99, 0.1, 1, None), Drift(1, 9, 0.9, 1, None)
    lost = Drift(math.nan, math.nan, math.nan, math.nan, None)

    def worst(**drift: Drift) -> Drift | None:
        return worst_drift(replace(shrunk, verdict=replace(shrunk.verdict, drift=drift)))

    assert worst(a=near, b=far) is far
    assert worst(a=far, b=lost) is lost
    assert worst() is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1 k"), (25.6e6, "25.6 M"), (4.09e9, "4.09 G"),
     (999_600, "1 M"), (3.2e13, "32 T")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_operator_table_names_the_unary_ones_once() -> None:
    table = operator_table()
    assert table.startswith("| operators |")
    assert table.count("every element-wise operator with one input") == 1
    assert "`Conv`" in table


# --------------------------------------------------------------------------------- resources


def test_clock_adds_up_and_tells_the_stages() -> None:
    heard: list[str] = []
    clock = Clock(heard.append)
    for _ in range(2):
        with clock.stage("score"):
            pass
    assert heard == ["score", "score"]
    assert clock.seconds["score"] > 0
    assert clock.seconds["save"] == 0


def test_peak_memory_is_plausible() -> None:
    assert 10 * 2**20 < peak_memory() < 2**42


def test_warnings_are_heard_once() -> None:
    import logging

    with Heard() as heard:
        for _ in range(2):
            logging.getLogger("onnxprune.x").warning("careful with %s", "this")
        logging.getLogger("onnxprune.x").info("no matter")
    logging.getLogger("onnxprune.x").warning("too late")
    assert heard.messages == ["careful with this"]


def test_report_function_puts_the_arrows_together() -> None:
    model = onnxprune.load(MODELS / "fashion_resnet.onnx")
    graph = onnxprune.analyse(model)
    plan = onnxprune.select(graph, onnxprune.score(graph), ratio=0.5)
    made = onnxprune.rewrite(model, plan)
    data = onnxprune.random_data(model, seed=0)
    verdict = onnxprune.verify(model, made, twin=onnxprune.masked_twin(plan), data=data)
    report = onnxprune.report(model, made, plan, verdict)
    assert report.after is not None
    assert report.after.params < report.before.params
    assert report.verdict is verdict
    assert Path(report.input_path) == MODELS / "fashion_resnet.onnx"


def test_report_says_which_groups_suit_the_hardware_and_why_others_do_not() -> None:
    _, report = shrink(conv_chain((3, 12, 64)), ratio=0.5, round_to="auto", verify="none")
    assert [group.why for group in report.groups] == [
        "4 of 12 removed; aligned to 8",
        "32 of 64 removed; aligned to 32",
        "not aligned to 8: frozen at 4",
    ]
    _, narrow = shrink(conv_chain((3, 12, 64)), ratio=0.6, round_to=3, verify="none")
    assert narrow.groups[0].why.endswith("not aligned to 8: only 12 to begin with")
