"""``sensitivity`` and ``sweep`` on the command line: tables, JSON, plots, exit codes."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from onnxprune.cli import run
from onnxprune.report import plots
from onnxprune.report.schemas import stored
from onnxprune.timing import Timing, timing
from tests.small import MODELS, conv_chain, parsed, reloaded

VGG = MODELS / "fashion_vgg.onnx"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with chain.onnx, 200 images and their labels."""
    monkeypatch.chdir(tmp_path)
    reloaded(conv_chain((3, 8, 12), batch="N"), tmp_path / "chain.onnx")
    with np.load(MODELS / "fashion_test.npz") as test:
        np.savez("images.npz", input=test["input"][:200])
        np.save("labels.npy", test["labels"][:200])
    return tmp_path


def called(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def test_sensitivity_prints_a_row_for_each_group_and_writes_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert called("sensitivity", "chain.onnx", "--ratios", "0.5,0.25") == 0
    out = capsys.readouterr()
    lines = out.out.splitlines()
    assert lines[0].split() == ["group", "size", "0.25", "0.5"]
    assert [line.split()[0] for line in lines[1:3]] == ["w0", "w1"]
    assert "random input: says little about quality" in lines[3]
    assert lines[4] == (
        "next: onnxprune shrink chain.onnx --sensitivity chain.sensitivity.json --max-loss 0.01"
    )
    assert out.err == ""
    assert json.loads(Path("chain.sensitivity.json").read_text())["complete"] is True


def test_json_of_sensitivity_fits_its_schema_and_is_what_the_file_holds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = called(
        *("sensitivity", VGG, "--data", "images.npz", "--labels", "labels.npy"),
        *("--ratios", "0.3,0.9", "-o", "s.json", "--json"),
    )
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, json.loads(stored("sensitivity")))
    assert found == json.loads(Path("s.json").read_text())
    assert found["measure"] == "top1"
    assert 0.9 < found["baseline"] <= 1
    assert len(found["groups"]) == 7
    first = found["groups"][0]["points"]
    assert [point["removed"] for point in first] == [4, 14]
    assert first[1]["loss"] == pytest.approx(found["baseline"] - first[1]["figure"])
    assert first[1]["loss"] > 0.2


def test_loss_of_a_metric_is_how_far_it_falls(capsys: pytest.CaptureFixture[str]) -> None:
    Path("m.py").write_text(
        "def accuracy(outputs, labels):\n"
        "    (scores,) = outputs.values()\n"
        "    return float((scores.argmax(1) == labels).mean())\n"
    )
    common = ("sensitivity", VGG, "--data", "images.npz", "--labels", "labels.npy", "--json")
    assert called(*common, "--ratios", "0.9", "-o", "a.json") == 0
    by_labels = json.loads(capsys.readouterr().out)
    metric = ("--metric", "m.py:accuracy")
    assert called(*common, *metric, "--ratios", "0.9", "-o", "b.json", "--jobs", "2") == 0
    by_metric = json.loads(capsys.readouterr().out)
    assert by_metric["measure"] == "metric"
    assert by_metric["metric"]["function"] == "accuracy"
    assert by_metric["baseline"] == by_labels["baseline"]
    assert [e["points"][0]["loss"] for e in by_metric["groups"]] == pytest.approx(
        [e["points"][0]["loss"] for e in by_labels["groups"]], abs=0.011
    )


def test_shrink_by_sensitivity_keeps_the_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    called("sensitivity", VGG, "--data", "images.npz", "--labels", "labels.npy", "-o", "s.json")
    capsys.readouterr()
    shrink = ("shrink", VGG, "--sensitivity", "s.json", "-o", "small.onnx", "--json")
    assert called(*shrink, "--max-loss", "0.01", "--data", "images.npz") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"]["macs"] < 0.5 * found["input"]["macs"]
    assert found["verify"]["drift"]["logits"]["top1"] > 0.9


def test_shrink_by_sensitivity_that_allows_nothing_warns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    called("sensitivity", "chain.onnx", "-q")
    shrink = ("shrink", "chain.onnx", "--sensitivity", "chain.sensitivity.json", "--max-loss", "0")
    assert called(*shrink) == 0
    assert "no group may lose a channel at --max-loss 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("shrink", "chain.onnx", "--max-loss", "0.1", "--ratio", "0.1"), "needs a sensitivity"),
        (("shrink", "chain.onnx", "--sensitivity", "s.json"), "how much may be lost"),
        (
            ("shrink", "chain.onnx", "--sensitivity", "s.json", "--max-loss", "-1"),
            "cannot read 's.json'",
        ),
        (
            *[
                (
                    "shrink",
                    "chain.onnx",
                    "--sensitivity",
                    "s",
                    "--max-loss",
                    "1",
                    "--scope",
                    "global",
                )
            ],
            "what each group loses",
        ),
        (("sensitivity", "chain.onnx", "--ratios", "0.5,x"), "is no list of numbers"),
        (("sensitivity", "chain.onnx", "--ratios", "1.5"), "ratio is 1.5"),
        (("sensitivity", "chain.onnx", "--labels", "labels.npy"), "labels need the data"),
        (("sensitivity", "chain.onnx", "--metric", "none.py:f"), "cannot read 'none.py'"),
        (("sensitivity", "chain.onnx", "--plot", "s.gif"), "neither .png nor .svg"),
        (("sensitivity", "chain.onnx", "-o", "chain.onnx"), "is the input itself"),
        (("sweep", "chain.onnx", "--ratios", ""), "is no list of numbers"),
    ],
)
def test_what_cannot_be_meant_is_exit_2_in_one_line(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    before = sorted(folder.iterdir())
    assert called(*arguments) == 2
    out = capsys.readouterr()
    assert says in out.err
    assert out.err.count("\n") == 1
    assert out.out == ""
    assert sorted(folder.iterdir()) == before


def test_model_of_which_nothing_can_go_is_exit_3(capsys: pytest.CaptureFixture[str]) -> None:
    one = parsed(
        "g (float[1,3,4,4] x) => (float[1,2,4,4] y) {y = Conv(x, w)}",
        w=np.ones((2, 3, 1, 1), np.float32),
    )
    reloaded(one, Path("frozen.onnx"))
    for verb in ("sensitivity", "sweep"):
        assert called(verb, "frozen.onnx") == 3
        assert "nothing can be pruned" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["sensitivity", "sweep"])
def test_plot_without_matplotlib_is_exit_5(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    assert called(verb, "chain.onnx", "--plot", "s.png") == 5
    assert "onnxprune[report]" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["sensitivity", "sweep"])
def test_plot_is_written_in_either_format_the_same_each_time(verb: str) -> None:
    pytest.importorskip("matplotlib")
    for number in (1, 2):
        assert called(verb, "chain.onnx", "-q", "--force", "--plot", f"s{number}.svg") == 0
    assert called(verb, "chain.onnx", "-q", "--force", "--plot", "s.png") == 0
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    first, second = (Path(f"s{number}.svg").read_text() for number in (1, 2))
    assert "<svg" in first
    assert verb == "sweep" or first == second  # latency is never the same


def test_sweep_tells_cost_latency_and_accuracy_at_each_ratio(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = called(
        *("sweep", VGG, "--data", "images.npz", "--labels", "labels.npy"),
        *("--ratios", "0.5,0,0.9", "--scope", "global", "--json", "-o", "w.json"),
    )
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, json.loads(stored("sweep")))
    assert found == json.loads(Path("w.json").read_text())
    points = found["points"]
    assert [point["ratio"] for point in points] == [0.0, 0.5, 0.9]
    assert (points[0]["removed"], points[0]["loss"]) == (0, 0.0)
    assert points[0]["figure"] == found["baseline"] > 0.9
    assert points[1]["loss"] < 0.02
    assert points[2]["loss"] > 0.5
    for name in ("params", "macs", "bytes"):
        assert points[0][name] > points[1][name] > points[2][name]
    assert all(point["latency_ms"] > 0 for point in points)


def test_sweep_prints_a_row_for_each_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("sweep", "chain.onnx", "--ratios", "0,0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["ratio", "params", "MACs", "latency"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "0.5"]
    assert "latency in ONNX Runtime at x 1x3x8x8" in lines[3]


def test_sweep_takes_its_latency_from_the_one_way_of_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def measured(
        loaded: list[object], feeds: object, *, seconds: float, threads: int | None
    ) -> list[Timing]:
        asked.append((len(loaded), seconds, threads))
        return [timing([0.004, 0.002, 0.003]), timing([0.001])]

    monkeypatch.setattr(import_module("onnxprune.sweep"), "measure_sessions", measured)
    assert called("sweep", "chain.onnx", "--ratios", "0,0.5", "--json") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["latency_ms"] for point in points] == [3.0, 1.0]
    assert asked == [(2, pytest.approx(0.4), None)]


@pytest.mark.parametrize("verb", ["sensitivity", "sweep"])
def test_dry_run_says_what_would_be_measured_and_writes_nothing(
    verb: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    Path("old.json").write_text("kept")
    before = sorted(folder.iterdir())
    common = (verb, "chain.onnx", "--ratios", "0.25,0.5", "--dry-run", "-o", "old.json")
    assert called(*common) == 0
    lines = capsys.readouterr().out.splitlines()
    if verb == "sensitivity":
        assert [line.split() for line in lines[:3]] == [
            ["group", "size", "0.25", "0.5"],
            ["w0", "8", "2", "4"],
            ["w1", "12", "3", "6"],
        ]
        assert re.match(r"would measure 4 cuts of 2 groups in about 0:00:\d\d; nothing", lines[-1])
    else:
        assert [line.split()[-2:] for line in lines[1:3]] == [["–", "–"]] * 2
        assert re.match(r"would measure 2 cuts of the model in about 0:00:\d\d;", lines[-1])
    assert called(*common, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, json.loads(stored(verb)))
    assert found["estimate"]["points"] == (4 if verb == "sensitivity" else 2)
    assert found["estimate"]["seconds"] > 0
    assert sorted(folder.iterdir()) == before
    assert Path("old.json").read_text() == "kept"


def test_sensitivity_after_a_refit_loses_less_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ("sensitivity", VGG, "--data", "images.npz", "--labels", "labels.npy")
    common = (*common, "--importance", "l1", "--ratios", "0.5")
    lost = {}
    for restore, jobs in (("none", 1), ("bias", 1), ("refit", 2)):
        options = ("--restore", restore, "--jobs", jobs, "-o", f"{restore}.json")
        assert called(*common, *options) == 0
        assert ("restored: refit" in capsys.readouterr().out) == (restore == "refit")
        found = json.loads(Path(f"{restore}.json").read_text())
        jsonschema.validate(found, json.loads(stored("sensitivity")))
        assert found["restore"] == restore
        lost[restore] = sum(entry["points"][0]["loss"] for entry in found["groups"])
    assert lost["refit"] < lost["bias"] < lost["none"]
    # What was measured one way is not gone on with in another, nor cut another way unsaid.
    assert called(*common, "--restore", "bias", "-o", "refit.json", "--resume") == 2
    assert "made with another restore" in capsys.readouterr().err
    shrink = ("shrink", VGG, "--sensitivity", "refit.json", "--max-loss", "0.01", "--dry-run")
    assert called(*shrink, "--restore", "bias", "--importance", "l1") == 0
    assert "groups were measured with restore refit" in capsys.readouterr().err


def test_refit_without_data_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("sensitivity", "chain.onnx", "--restore", "refit") == 2
    assert "restore refit needs calibration data" in capsys.readouterr().err
