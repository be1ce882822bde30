"""What the reports say of each layer: cost, compute density, alignment."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from onnxprune.cli import run
from onnxprune.report.schemas import stored
from tests.small import MODELS, conv_chain, reloaded

MOBILE = MODELS / "fashion_mobile.onnx"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reloaded(conv_chain((3, 64, 20)), tmp_path / "chain.onnx")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def layers(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, object]]:
    found = json.loads(printed(capsys, *arguments, "--json"))
    jsonschema.validate(found, json.loads(stored("report")))
    shown: list[dict[str, object]] = found["layers"]
    return shown


def test_shrink_gives_cost_density_and_widths_of_each_layer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second, last = layers(
        capsys, "shrink", "chain.onnx", "--ratio", 0.5, "--round-to", "auto", "-o", "small.onnx"
    )
    macs, moved = 64 * 64 * 27, 4 * (3 * 64 + 64 * 27 + 64 * 64)
    assert (first["node"], first["op_type"]) == ("c0", "Conv")
    assert first["macs"] == {"before": macs, "after": macs // 2}
    assert first["bytes"] == {"before": moved, "after": 4 * (3 * 64 + 32 * 27 + 32 * 64)}
    assert first["density"] == {
        "before": pytest.approx(macs / moved),
        "after": pytest.approx(macs / 2 / (4 * (3 * 64 + 32 * 27 + 32 * 64))),
    }
    assert first["thin"] is False
    assert first["inputs"] == {
        "before": 3, "after": 3, "wants": 8, "step": 8, "aligned": False,
        "why": "3 channels of input 'x'",
    }  # fmt: skip
    assert first["outputs"] == {
        "before": 64, "after": 32, "wants": 8, "step": 8, "aligned": True, "why": "8 for float32",
    }  # fmt: skip
    assert second["outputs"] == last["inputs"]
    assert second["outputs"]["after"] == 16  # type: ignore[index]  # JSON
    compared = layers(capsys, "compare", "chain.onnx", "small.onnx")
    for one, other in zip(compared, (first, second, last), strict=True):
        assert [one[k] for k in ("node", "macs", "density", "thin")] == [
            other[k] for k in ("node", "macs", "density", "thin")
        ]
        for side in ("inputs", "outputs"):
            widths = [(w[side]["before"], w[side]["after"]) for w in (one, other)]  # type: ignore[index]  # JSON
            assert widths[0] == widths[1]


def test_layers_left_thin_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    found = layers(capsys, "shrink", MOBILE, "--ratio", 0.3, "--verify", "none", "--dry-run")
    thin = [one["node"] for one in found if one["thin"]]
    assert "/block3/body/depthwise/conv/Conv" in thin  # 51 channels, no multiple of 4
    assert "/stem/conv/Conv" not in thin
    even = layers(
        capsys,
        *("shrink", MOBILE, "--ratio", 0.3, "--round-to", 16, "--verify", "none", "--dry-run"),
    )
    assert not any(one["thin"] for one in even)


def test_inspect_has_the_density_and_what_each_layer_wants(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second, last = layers(capsys, "inspect", "chain.onnx")
    assert first["macs"] == {"before": 64 * 64 * 27, "after": None}
    assert first["density"]["after"] is None  # type: ignore[index]  # JSON
    assert second["inputs"] == {
        "before": 64, "after": None, "wants": 8, "step": 64, "aligned": True,
        "why": "64 costs nothing",
    }  # fmt: skip
    assert last["outputs"]["why"] == "frozen at 4: reaches output 'y' through Gemm 'y'"  # type: ignore[index]  # JSON
    assert {one["thin"] for one in (first, second, last)} == {False}


def test_rounding_tells_how_many_layers_are_aligned_and_why_others_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shrink = ("shrink", "chain.onnx", "--ratio", 0.5, "--dry-run")
    out = printed(capsys, *shrink, "--round-to", "auto")
    assert "aligned for Tensor Cores: 1 of 3 layers" in out
    assert "  3 channels of input 'x': into c0\n" in out
    assert "  frozen at 4: reaches output 'y' through Gemm 'y': out of y\n" in out
    assert "Tensor Cores" not in printed(capsys, *shrink)
    table = printed(capsys, *shrink, "-v")
    assert "aligned for Tensor Cores: 0 of 3 layers" in table
    row = next(line for line in table.splitlines() if line.startswith("c1 "))
    assert row.split("  ")[-1].strip() == (
        "not aligned: 10 are left: a cut by --round-to auto would align them"
    )
