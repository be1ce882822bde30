"""The command line: exit codes, one line on stderr, stdout for results only."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import jsonschema
import numpy as np
import onnx
import pytest

import onnxprune
from onnxprune import io, pipeline
from onnxprune.cli import run
from onnxprune.errors import InvariantError, MissingExtraError, UnsupportedModelError
from tests.masked import masked
from tests.small import MODELS, conv_chain, parsed, reloaded

ROOT = Path(__file__).resolve().parents[2]
RESNET = MODELS / "fashion_resnet.onnx"


@dataclass
class Ran:
    """What one command line did."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.out)
        return found


Call = Callable[..., Ran]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Run a command line in a folder with chain.onnx and frozen.onnx."""
    monkeypatch.chdir(tmp_path)
    reloaded(conv_chain(), tmp_path / "chain.onnx")
    one = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y) {y = Conv(x, w)}",
        w=np.ones((2, 3, 1, 1), np.float32),
    )
    reloaded(one, tmp_path / "frozen.onnx")

    def called(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return called


BEFORE = {"chain.onnx", "frozen.onnx"}


def left() -> set[str]:
    return {path.name for path in Path().iterdir()}


# ------------------------------------------------------------------------------------ it works


def test_shrink_writes_beside_the_input_and_tells_it_last(call: Call) -> None:
    ran = call("shrink", "chain.onnx", "--ratio", 0.5)
    assert (ran.code, ran.err) == (0, "")
    assert left() == BEFORE | {"chain.pruned.onnx"}
    *_, saved, after = ran.out.splitlines()
    assert saved.startswith("saved chain.pruned.onnx · ")
    assert "twin ok" in saved
    assert after == "next: trtexec --onnx=chain.pruned.onnx"
    onnx.checker.check_model("chain.pruned.onnx", full_check=True)


def test_json_is_one_object_that_fits_its_schema_and_nothing_else(call: Call) -> None:
    ran = call("shrink", "chain.onnx", "--ratio", 0.5, "-o", "o.onnx", "--json")
    found = ran.json()
    schema = json.loads(call("schema", "report").out)
    jsonschema.Draft202012Validator(schema).validate(found)
    assert ran.err == ""
    assert found["output"]["path"] == "o.onnx"  # type: ignore[index]  # JSON
    assert found["verify"]["status"] == "passed"  # type: ignore[index]  # JSON


def test_dry_run_writes_nothing(call: Call) -> None:
    ran = call("shrink", "chain.onnx", "--ratio", 0.5, "--dry-run", "--recipe-out", "r.json")
    assert ran.code == 0
    assert "nothing saved" in ran.out
    assert left() == BEFORE


def test_quiet_prints_nothing_and_verbose_lists_the_groups(call: Call) -> None:
    quiet = call("shrink", "chain.onnx", "--ratio", 0.5, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    verbose = call("shrink", "chain.onnx", "--ratio", 0.5, "-v", "--force")
    assert "4 of 8 removed" in verbose.out


def test_lossless_says_so_and_inspect_counts(call: Call) -> None:
    _, zeroed = masked(conv_chain(), 0.5, "consumers")
    reloaded(zeroed, Path("masked.onnx"))
    assert "10 channels have no effect: shrink --lossless" in call("inspect", "masked.onnx").out
    assert json.loads(call("inspect", "masked.onnx", "--json").out)["without_effect"] == 10
    ran = call("shrink", "masked.onnx", "--lossless", "-o", "small.onnx")
    assert "importance lossless (only what has no effect goes)" in ran.out
    assert "equals the original" in ran.out
    again = call("shrink", "masked.onnx", "--recipe", "small.onnx", "-o", "again.onnx")
    assert again.code == 0
    assert Path("again.onnx").read_bytes() == Path("small.onnx").read_bytes()


def test_recipe_repeats_a_run(call: Call) -> None:
    call("shrink", "chain.onnx", "--ratio", 0.5, "-o", "a.onnx", "--recipe-out", "r.json")
    by_file = call("shrink", "chain.onnx", "--recipe", "r.json", "-o", "b.onnx")
    by_model = call("shrink", "chain.onnx", "--recipe", "a.onnx", "-o", "c.onnx")
    assert by_file.code == by_model.code == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes() == Path("c.onnx").read_bytes()
    schema = json.loads(call("schema", "recipe").out)
    jsonschema.Draft202012Validator(schema).validate(json.loads(Path("r.json").read_text("utf-8")))


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        (["--round-to", "3"], (6, 3, 3, 3)),
        (["--min-channels", "7"], (7, 3, 3, 3)),
        (["--ignore", "w0"], (8, 3, 3, 3)),
        (["--only", "c1", "--only", "w0"], (4, 3, 3, 3)),
        (["--only", "c1"], (8, 3, 3, 3)),
        (["--ratio-for", "w0=0.25"], (6, 3, 3, 3)),
        (["--importance", "random", "--seed", "3"], (4, 3, 3, 3)),
        (["--restore", "none", "--attention", "dims"], (4, 3, 3, 3)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_reach_the_selection(
    flags: Sequence[str], shape: tuple[int, ...], call: Call
) -> None:
    ran = call("shrink", "chain.onnx", "--ratio", 0.5, "-o", "o.onnx", "--verify", "twin", *flags)
    assert (ran.code, ran.err) == (0, "")
    assert onnxprune.load("o.onnx").weights()["w0"].shape == shape


def test_round_to_auto_reaches_the_selection(call: Call) -> None:
    reloaded(conv_chain((3, 64, 20)), Path("wide.onnx"))
    ran = call("shrink", "wide.onnx", "--ratio", 0.3, "--round-to", "auto", "--json")
    assert ran.code == 0
    assert [g["kept"] for g in ran.json()["groups"]] == [48, 16, 4]  # type: ignore[attr-defined]  # JSON


@pytest.mark.parametrize(
    ("targets", "most"),
    [(["macs=0.5"], {"macs": 0.5}), (["params=0.6", "macs=0.9"], {"params": 0.6, "macs": 0.9})],
    ids=["macs", "params and macs"],
)
def test_target_is_met_and_kept_in_the_recipe(
    targets: Sequence[str], most: dict[str, float], call: Call
) -> None:
    reloaded(conv_chain((3, 32, 32)), Path("wide.onnx"))
    flags = [part for target in targets for part in ("--target", target)]
    out = ("-o", "o.onnx", "--recipe-out", "r.json")
    ran = call("shrink", "wide.onnx", *flags, "--json", "--aggregate", "mean", *out)
    assert (ran.code, ran.err) == (0, "")
    found = ran.json()
    for name, share in most.items():
        left = found["output"][name] / found["input"][name]  # type: ignore[index]  # JSON
        assert left <= share + 0.04
    options = json.loads(Path("r.json").read_text("utf-8"))["options"]
    assert options["targets"] == most
    assert options["aggregate"] == "mean"
    again = call("shrink", "wide.onnx", "--recipe", "o.onnx", "-o", "again.onnx")
    assert again.code == 0
    assert Path("o.onnx").read_bytes() == Path("again.onnx").read_bytes()


def test_target_out_of_reach_is_exit_3_and_writes_nothing(call: Call) -> None:
    ran = call("shrink", "chain.onnx", "--target", "macs=0.01", "--min-channels", 6)
    assert (ran.code, ran.out) == (3, "")
    assert "macs=0.01 cannot be reached" in ran.err
    assert left() == BEFORE


def test_restore_says_what_it_did_in_words_and_in_json(call: Call) -> None:
    reloaded(conv_chain((3, 16, 24), batch="N"), Path("open.onnx"))
    x = np.random.default_rng(1).standard_normal((80, 3, 8, 8)).astype(np.float32)
    np.savez("calib.npz", x=x)
    with_data = ("shrink", "open.onnx", "--ratio", 0.4, "--data", "calib.npz", "--force")
    for flags in ([], ["--restore", "refit"]):
        ran = call(*with_data, *flags, "--json")
        assert (ran.code, ran.err) == (0, "")
        schema = json.loads(call("schema", "report").out)
        jsonschema.Draft202012Validator(schema).validate(ran.json())
        restored = ran.json()["restored"]
        assert [one["node"] for one in restored] == ["c1", "y"]  # type: ignore[attr-defined]  # JSON
        assert all(0 <= one["after"] <= one["before"] for one in restored)  # type: ignore[attr-defined]  # JSON
    assert call(*with_data, "--restore", "none", "--json").json()["restored"] == []
    said = call(*with_data).out
    assert "restored: 2 of 2 layers refitted on calib.npz, 80 samples; mean held-out" in said
    assert "twin ok" in said
    assert "  c1: " in call(*with_data, "-v").out


def test_global_scope_meets_its_budget(call: Call) -> None:
    ran = call(
        "shrink", "chain.onnx", "--ratio", 0.5, "--scope", "global", "--max-ratio", 0.8, "--json"
    )
    groups = [g for g in ran.json()["groups"] if g["frozen"] is None]  # type: ignore[attr-defined]  # JSON
    assert sum(group["size"] - group["kept"] for group in groups) == 10


def test_inspect_shows_groups_operators_and_one_group(call: Call) -> None:
    assert "frozen: reaches output 'y'" in call("inspect", "chain.onnx").out
    assert "Conv " in call("inspect", "chain.onnx", "--ops").out
    for name in ("w1", "c1", "1"):
        assert "group 1: 12 channels" in call("inspect", "chain.onnx", "--group", name).out
    ran = call("inspect", "chain.onnx", "--group", "w1", "--ops", "--json").json()
    assert [group["name"] for group in ran["groups"]] == ["w1"]  # type: ignore[attr-defined]  # JSON
    assert {use["op_type"] for use in ran["operators"]} >= {"Conv", "Gemm"}  # type: ignore[attr-defined]  # JSON
    assert call("inspect", "chain.onnx", "--csv", "g.csv", "-q").out == ""
    assert Path("g.csv").read_text().splitlines()[1].startswith("0,channel,8,8,w0,w1")


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("0", [0]),
        ("group 0", [0]),
        ("w0", [0]),
        ("c1", [1]),  # makes 1 and reads 0
        ("gamma0", [0]),
        ("head", [2]),  # makes 2 and reads 1
        ("r0", [0]),
        ("n1", [1]),
        ("p", [1]),
    ],
)
def test_group_is_found_by_any_of_its_members(name: str, groups: Sequence[int], call: Call) -> None:
    ran = call("inspect", "chain.onnx", "--group", name, "--json")
    assert [group["id"] for group in ran.json()["groups"]] == groups  # type: ignore[attr-defined]  # JSON
    plain = call("inspect", "chain.onnx", "--group", name).out
    assert re.findall(r"^group (\d+):", plain, re.MULTILINE) == [str(group) for group in groups]


def test_piped_tables_neither_wrap_nor_end_in_blanks(call: Call) -> None:
    wide = conv_chain()
    for node in wide.proto.graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                names[at] = name.replace("w0", "w" * 50).replace("w1", "v" * 50)
    for tensor in wide.proto.graph.initializer:
        tensor.name = tensor.name.replace("w0", "w" * 50).replace("w1", "v" * 50)
    wide.proto.graph.node[-1].name = "n" * 150
    reloaded(wide, Path("wide.onnx"))
    lines = call("inspect", "wide.onnx").out.splitlines()
    assert len(lines) == 1 + 3 + 2
    assert all(line == line.rstrip() for line in lines)
    assert lines[1].endswith(f"{'w' * 50} → {'v' * 50}")
    assert lines[3].endswith(f"Gemm '{'n' * 150}'")


def test_compare_names_the_data(call: Call) -> None:
    data = MODELS / "fashion_calib.npz"
    ran = call("compare", RESNET, RESNET, "--data", data, "--json")
    verify = ran.json()["verify"]
    assert verify["inputs"] == "fashion_calib.npz, 256 samples"  # type: ignore[index]  # JSON
    assert verify["drift"]["logits"]["snr_db"] is None  # type: ignore[index]  # JSON: infinite
    assert "cosine 1.0000" in call("compare", RESNET, RESNET).out


def test_compare_counts_the_channels_of_both(call: Call) -> None:
    call("shrink", "chain.onnx", "--ratio", 0.5, "-o", "o.onnx")
    found = call("compare", "chain.onnx", "o.onnx", "--json").json()
    assert [found[side]["channels"] for side in ("input", "output")] == [24, 14]  # type: ignore[index]  # JSON
    table = call("compare", "chain.onnx", "o.onnx").out
    assert table.splitlines()[4].split() == ["channels", "24", "14", "58.3", "%"]


def test_limits_on_random_input_are_said_to_be_so(call: Call) -> None:
    said = "limits: judged on random input, which says little about quality"
    ran = call("shrink", "chain.onnx", "--ratio", 0.5, "--max-drift", 100, "--json")
    assert said in ran.json()["verify"]["notes"]  # type: ignore[index, operator]  # JSON
    assert said in call("shrink", "chain.onnx", "--ratio", 0.5, "--max-drift", 100, "--force").out


@pytest.mark.parametrize(
    "damage", [b"", b"no model", b"\x08\x0a", "no outputs"], ids=["empty", "text", "bare", "graph"]
)
def test_damaged_model_is_named_wherever_it_is_given(damage: bytes | str, call: Call) -> None:
    if isinstance(damage, str):
        proto = onnx.load("chain.onnx")
        del proto.graph.output[:]
        damage = proto.SerializeToString()
    Path("bad.onnx").write_bytes(damage)
    for arguments in (
        ("inspect", "bad.onnx"),
        ("shrink", "bad.onnx", "--ratio", 0.5),
        ("compare", "chain.onnx", "bad.onnx"),
        ("compare", "bad.onnx", "chain.onnx"),
    ):
        ran = call(*arguments)
        assert (ran.code, ran.out) == (3, "")
        assert "'bad.onnx'" in ran.err
    ran = call("shrink", "chain.onnx", "--recipe", "bad.onnx")
    assert (ran.code, ran.out) == (2, "")
    assert "'bad.onnx'" in ran.err


def test_compare_prints_times_their_ratio_and_its_interval(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxprune import timed
    from onnxprune.timing import Timing, timing

    asked: list[object] = []

    def measured(
        models: list[object], feeds: object, *, threads: int | None, seconds: float
    ) -> list[Timing]:
        asked.append((len(models), threads))
        return [timing([0.004] * 20), timing([0.001] * 20)]

    monkeypatch.setattr(timed, "measure", measured)
    ran = call("compare", RESNET, RESNET, "--latency", "--json").json()
    assert ran["latency"] == {
        "before_ms": 4.0, "after_ms": 1.0, "ratio": 0.25, "low": 0.25, "high": 0.25, "runs": 20,
        "predicted_ms": None, "before_p90_ms": 4.0, "after_p90_ms": 1.0, "threads": 1, "batch": 1,
    }  # fmt: skip
    shown = call("compare", RESNET, RESNET, "--latency", "--threads", 0).out
    said = (
        "latency in ONNX Runtime, all cores, batch 1: 4 ms → 1 ms, p90 4 → 1 ms, "
        "ratio 0.250 (0.250 to 0.250 at 95 %, 20 runs in turn)"
    )
    assert said in " ".join(shown.split())
    assert asked == [(2, 1), (2, None)]
    assert call("compare", RESNET, RESNET, "--json").json()["latency"] is None


def test_shrink_to_a_latency_reports_what_was_predicted_and_measured(call: Call) -> None:
    arguments = (MODELS / "fashion_vgg.onnx", "--target", "latency=0.7", "--dry-run")
    found: dict[str, float] = call("shrink", *arguments, "--json").json()["latency"]  # type: ignore[assignment]  # JSON
    assert min(found[key] for key in ("before_ms", "after_ms", "predicted_ms")) > 0
    assert found["low"] <= found["ratio"] <= found["high"]
    shown = " ".join(call("shrink", *arguments).out.split())
    assert re.search(r"1 thread, batch 1: \S+ ms → \S+ ms \(predicted \S+ ms\), p90", shown)


def test_shrink_warns_of_a_depthwise_layer_off_the_alignment(call: Call) -> None:
    mobile = MODELS / "fashion_mobile.onnx"
    ran = call("shrink", mobile, "--ratio", 0.3, "--dry-run", "--verify", "none", "--json")
    assert any("no multiple of 4" in said for said in ran.json()["warnings"])  # type: ignore[attr-defined]  # JSON
    assert "--round-to 4" in ran.err
    whole = call(
        "shrink", mobile, "--ratio", 0.3, "--round-to", 4, "--dry-run", "--verify", "none", "--json"
    )
    assert whole.json()["warnings"] == []


def test_inspect_shows_the_density_of_each_layer_when_asked(call: Call) -> None:
    assert "MACs per byte" not in call("inspect", "chain.onnx").out
    assert "MACs per byte" in call("inspect", "chain.onnx", "-v").out


def test_nothing_to_cut_is_exit_0_with_a_warning_on_stderr(call: Call) -> None:
    ran = call("shrink", "chain.onnx", "--ratio", 0, "--json")
    assert ran.code == 0
    assert ran.err == "warning: nothing was cut: the ratio is 0\n"
    assert ran.json()["warnings"] == ["nothing was cut: the ratio is 0"]
    assert onnx.load("chain.onnx") == onnx.load("chain.pruned.onnx")


def test_input_shape_may_have_a_colon_in_its_name(call: Call) -> None:
    model = conv_chain(batch="N")
    model.proto.graph.input[0].name = model.proto.graph.node[0].input[0] = "x:0"
    reloaded(model, Path("odd.onnx"))
    ran = call("inspect", "odd.onnx", "--input-shape", "x:0:5x3x8x8", "--json")
    assert ran.json()["stand_ins"] == {"x:0": [5, 3, 8, 8]}


def test_option_without_effect_is_a_warning(call: Call) -> None:
    ran = call(
        "shrink", "chain.onnx", "--ratio", 0.5, "--max-ratio", 0.8, "--ratio-for", "head=0.1"
    )
    assert ran.code == 0
    assert ran.err.splitlines() == [
        "warning: max-ratio 0.8 has no effect: it is for scope global",
        "warning: ratio-for 'head' matches no channels that can go: "
        "reaches output 'y' through Gemm 'y'",
    ]


def test_version_and_help_go_to_stdout(call: Call) -> None:
    assert call("--version").out == f"onnxprune {onnxprune.__version__}\n"
    assert "shrink" in call("--help").out
    assert "--ratio" in call("shrink", "-h").out


# ----------------------------------------------------------------------------------- it refuses


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize(
    "arguments",
    [
        ("shrink", "chain.onnx", "--ratio", "0.5", "-o", "odd"),
        ("shrink", "chain.onnx", "--ratio", "0.5", "-o", "o.onnx", "--recipe-out", "odd"),
        ("inspect", "chain.onnx", "--csv", "odd"),
    ],
    ids=["output", "recipe", "csv"],
)
def test_device_or_pipe_is_never_replaced_by_a_file(arguments: Sequence[str], call: Call) -> None:
    os.mkfifo("odd")
    ran = call(*arguments, "--force")
    assert (ran.code, ran.out) == (2, "")
    assert "'odd' is not a regular file" in ran.err
    assert Path("odd").is_fifo()
    assert left() == BEFORE | {"odd"}


SHRINK = ("shrink", "chain.onnx", "--ratio", "0.5")


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (2, (), "command"),
        (2, ("frobnicate",), "frobnicate"),
        (2, ("shrink",), "Missing argument"),
        (2, ("shrink", "chain.onnx"), "give one of --ratio, --target, --lossless and --recipe"),
        (2, ("shrink", "chain.onnx", "--ratio"), "--ratio"),
        (2, ("shrink", "chain.onnx", "--ratio", "half"), "'--ratio': 'half' is not a number"),
        (2, ("shrink", "chain.onnx", "--ratio", "1"), "ratio is 1"),
        (2, ("shrink", "chain.onnx", "--ratio", "-0.5"), "ratio is -0.5"),
        (2, ("shrink", "chain.onnx", "--ratio", "nan"), "ratio is nan"),
        (2, ("shrink", "chain.onnx", "--ratio", "inf"), "ratio is inf"),
        (
            2,
            (*SHRINK, "--recipe", "r.json"),
            "give one of --ratio, --target, --lossless and --recipe",
        ),
        (2, (*SHRINK, "--lossless"), "give one of --ratio, --target, --lossless and --recipe"),
        (2, ("shrink", "chain.onnx", "--lossless", "--scope", "global"), "go with --lossless"),
        (2, ("shrink", "chain.onnx", "--recipe", "r.json"), "cannot read recipe 'r.json'"),
        (2, ("shrink", "chain.onnx", "--recipe", "chain.onnx"), "carries no recipe: onnxprune did"),
        (2, ("shrink", "chain.onnx", "--recipe", "no.onnx"), "cannot read recipe: no such file"),
        (2, ("shrink", "chain.onnx", "--recipe", "r.json", "--scope", "global"), "--scope cannot"),
        (2, ("shrink", "chain.onnx", "--recipe", "r.json", "--round-to", "8"), "--round-to cannot"),
        (2, (*SHRINK, "--scope", "all"), "'--scope': 'all' is not one of 'local', 'global'"),
        (2, (*SHRINK, "--importance", "magic"), "importance is 'magic'"),
        (2, (*SHRINK, "--round-to", "0"), "'--round-to': '0' is less than 1"),
        (2, (*SHRINK, "--round-to", "1.5"), "'--round-to': '1.5' is not a whole number"),
        (2, (*SHRINK, "--round-to", "eight"), "'eight' is not a whole number; give a whole number"),
        (2, (*SHRINK, "--schedule", "linear"), "--schedule says how --steps share the work"),
        (2, ("shrink", "chain.onnx", "--lossless", "--restore", "bias"), "go with --lossless"),
        (2, (*SHRINK, "--min-channels", "0"), "--min-channels"),
        (2, (*SHRINK, "--max-ratio", "1.5"), "max-ratio is 1.5"),
        (2, (*SHRINK, "--ignore", "nothing*"), "ignore 'nothing*' matches no node"),
        (2, (*SHRINK, "--only", "nothing"), "only 'nothing' matches no node"),
        (2, (*SHRINK, "--ratio-for", "w0"), "--ratio-for w0 is not GLOB=R"),
        (2, (*SHRINK, "--ratio-for", "=0.5"), "--ratio-for =0.5 is not GLOB=R"),
        (2, (*SHRINK, "--ratio-for", "w0=2"), "ratio-for 'w0': the ratio is 2"),
        (2, (*SHRINK, "--ratio-for", "w0=.1", "--ratio-for", "w0=.2"), "gives two ratios for 'w0'"),
        (2, (*SHRINK, "--ratio", "0.3"), "--ratio is given 2 times"),
        (2, (*SHRINK, "-o", "a.onnx", "--output", "b.onnx"), "--output is given 2 times"),
        (2, (*SHRINK, "--restore", "refit"), "restore refit needs calibration data"),
        (2, (*SHRINK, "--verify", "some"), "--verify"),
        (2, (*SHRINK, "--verify", "twin", "--max-drift", "1"), "--max-drift needs --verify full"),
        (2, (*SHRINK, "--min-cosine", "2"), "--min-cosine is 2"),
        (2, (*SHRINK, "--seed", "-1"), "--seed"),
        (2, (*SHRINK, "--input-shape", "x"), "is not NAME:1x3x224x224"),
        (2, (*SHRINK, "--input-shape", "x:1xtwo"), "is not NAME:1x3x224x224"),
        (2, (*SHRINK, "--input-shape", "x:0x3x8x8"), "is not NAME:1x3x224x224"),
        (
            2,
            (*SHRINK, "--input-shape", "x:1x3x8x8", "--input-shape", "x:1x3x8x8"),
            "--input-shape gives two shapes for 'x'",
        ),
        (2, (*SHRINK, "--input-shape", "z:1x3x8x8"), "the model has no input 'z'"),
        (2, (*SHRINK, "--input-shape", "x:1x3x8"), "has 4 dimensions, 3 were given"),
        (2, (*SHRINK, "--input-shape", "x:2x3x8x8"), "is fixed at 1, not 2"),
        (2, (*SHRINK, "--data", "missing.npz"), "no such file"),
        (2, (*SHRINK, "--data", "chain.onnx"), "is not an .npz file"),
        (2, (*SHRINK, "--importance", "obs"), "importance obs needs calibration data"),
        (2, (*SHRINK, "--target", "macs=0.5"), "give one of --ratio, --target"),
        (2, ("shrink", "chain.onnx", "--target", "macs"), "--target macs is not COST=SHARE"),
        (2, ("shrink", "chain.onnx", "--target", "speed=1"), "target 'speed' is unknown"),
        (2, ("shrink", "chain.onnx", "--target", "macs=2"), "is no share to be left"),
        (3, ("shrink", "chain.onnx", "--target", "macs=0.001"), "macs=0.001 cannot be reached"),
        (2, (*SHRINK, "-o", "chain.onnx"), "is the input itself"),
        (2, (*SHRINK, "-o", "chain.onnx", "--force"), "is the input itself"),
        (2, (*SHRINK, "-o", "frozen.onnx"), "give --force to overwrite it"),
        (2, (*SHRINK, "-o", "."), "is a directory"),
        (2, (*SHRINK, "-o", "no/such/folder.onnx"), "does not exist"),
        (2, (*SHRINK, "-o", "o.onnx", "--recipe-out", "o.onnx"), "given for two outputs"),
        (
            2,
            (*SHRINK, "-o", "o.onnx", "--recipe-out", "o.onnx.data"),
            "'o.onnx.data' is where 'o.onnx' may keep its weights",
        ),
        (
            2,
            (*SHRINK, "--data", "frozen.onnx", "-o", "frozen.onnx", "--force"),
            "writing 'frozen.onnx' would overwrite 'frozen.onnx', which this run reads",
        ),
        (
            2,
            ("shrink", "chain.onnx", "--recipe", "o.onnx.data", "-o", "o.onnx", "--force"),
            "writing 'o.onnx' would overwrite 'o.onnx.data', which this run reads",
        ),
        (2, ("inspect", "chain.onnx", "--group", "nothing"), "names no channel group"),
        (2, ("inspect", "chain.onnx", "--csv", "no/such.csv"), "does not exist"),
        (2, ("inspect", "chain.onnx", "--csv", "frozen.onnx"), "give --force"),
        (2, ("inspect", "chain.onnx", "more"), "more"),
        (2, ("compare", "chain.onnx"), "Missing argument"),
        (2, ("schema", "nothing"), "nothing"),
        (3, ("shrink", "missing.onnx", "--ratio", "0.5"), "no such file"),
        (3, ("shrink", ".", "--ratio", "0.5"), "directory"),
        (3, ("inspect", "missing.onnx"), "no such file"),
        (3, ("shrink", "frozen.onnx", "--ratio", "0.5"), "nothing can be pruned"),
        (4, ("compare", "chain.onnx", "frozen.onnx"), "ONNX Runtime cannot run 'frozen.onnx'"),
        (4, ("compare", "frozen.onnx", "chain.onnx"), "ONNX Runtime cannot run 'chain.onnx'"),
        (4, (*SHRINK, "--max-drift", "0.001"), "your limit: --max-drift"),
        (4, (*SHRINK, "--max-drift", "0.001"), "on random input, which says little about quality"),
        (4, (*SHRINK, "--min-cosine", "1"), "your limit: --min-cosine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistake_is_one_line_its_exit_code_and_no_output(
    code: int, arguments: Sequence[str], says: str, call: Call
) -> None:
    ran = call(*arguments)
    assert (ran.code, ran.out) == (code, "")
    assert says in ran.err
    assert ran.err.startswith("onnxprune: ")
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err
    assert left() == BEFORE


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (InvariantError("rule broken"), 1, "rule broken"),
        (UnsupportedModelError("no"), 3, "no"),
        (
            MissingExtraError("not installed", hint="pip install onnxprune[report]"),
            5,
            "pip install",
        ),
        (FileNotFoundError(2, "No such file or directory", "gone.bin"), 2, "'gone.bin': No such"),
        (OSError("odd"), 2, "odd"),
        (OSError(28, "No space left on device"), 2, "standard output: No space left"),
        (MemoryError(), 1, "not enough memory"),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_error_from_within_has_its_exit_code(
    error: BaseException, code: int, says: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "shrink", fails)
    ran = call(*SHRINK)
    assert (ran.code, ran.out) == (code, "")
    assert says in ran.err
    assert ran.err.count("\n") == 1


def test_debug_shows_the_traceback(call: Call) -> None:
    ran = call("shrink", "frozen.onnx", "--ratio", 0.5, "--debug")
    assert ran.code == 3
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("onnxprune: nothing can be pruned")


def test_reader_that_left_is_no_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("onnxprune.commands.inspect.show", fails)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert call(*SHRINK).code == 0


def test_recipe_that_cannot_be_written_leaves_no_model(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(recipe: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io, "text_job", lambda text: full)
    ran = call(*SHRINK, "--recipe-out", "r.json")
    assert (ran.code, ran.out) == (2, "")
    assert "disk full while writing 'r.json'" in ran.err
    assert left() == BEFORE


# ------------------------------------------------------------------------------ as a process


def python(
    *arguments: str, cwd: Path, stdout: IO[str] | int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )


def process(
    *arguments: str, cwd: Path, stdout: IO[str] | int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return python("-m", "onnxprune", *arguments, cwd=cwd, stdout=stdout)


def test_process_keeps_stdout_and_stderr_apart(tmp_path: Path) -> None:
    target = tmp_path / "o.onnx"
    ran = process(
        "shrink", str(RESNET), "--ratio", "0.5", "-o", str(target), "--json", cwd=tmp_path
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["output"]["bytes"] == target.stat().st_size
    plain = process("inspect", str(RESNET), cwd=tmp_path)
    assert "\x1b" not in plain.stdout + plain.stderr
    wrong = process("shrink", str(RESNET), "--ratio", "2", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "\x1b" not in wrong.stderr
    assert wrong.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ("shrink", str(RESNET), "--ratio", "0.5", "-o", "o.onnx", "--recipe-out", "r.json"),
        ("inspect", str(RESNET), "--json", "--csv", "g.csv"),
        ("schema", "report"),
        ("--version",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_stdout_that_is_full_is_named_and_leaves_no_file(
    arguments: Sequence[str], tmp_path: Path
) -> None:
    with Path("/dev/full").open("w") as full:
        ran = process(*arguments, cwd=tmp_path, stdout=full)
    assert ran.returncode == 2
    assert ran.stderr.startswith("onnxprune: standard output: No space left on device")
    assert ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
@pytest.mark.parametrize("order", ["SIGTERM", "SIGHUP"])
def test_order_to_end_while_writing_leaves_no_file(order: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from onnxprune import cli, io\n"
        "def job(text):\n"
        f"    return lambda out: os.kill(os.getpid(), signal.{order}) or out.write(b'')\n"
        "io.text_job = job\n"
        "cli.main()\n"
    )
    ran = python(
        "-c", code, "shrink", str(RESNET), "--ratio", "0.5", "-o", "o.onnx", "--recipe-out",
        "r.json", cwd=tmp_path,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "onnxprune: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_terminal_without_unicode_still_prints(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "onnxprune", "inspect", str(RESNET)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from onnxprune.cli import run; run(['--help']);"
        "heavy = {'onnx', 'onnxruntime', 'polygraphy', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    begun = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert time.perf_counter() - begun < 3  # 0.1 s; the rest is for a busy machine
