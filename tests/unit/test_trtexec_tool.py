"""`tools/bench/trtexec.sh` with a program in trtexec's place."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "bench" / "trtexec.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Says what trtexec says of an engine whose file is a hundredth of the time.
FAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
for argument; do
  case "$argument" in
    --onnx=*small*) time=0.5 rate=2000 size=10 ;;
    --onnx=*bad*) echo "[09/01/2026-12:00:00] [E] Error: no such layer"; exit 1 ;;
    --onnx=*silent*) exit 0 ;;
    --onnx=*) time=2 rate=500 size=40 ;;
    --saveEngine=*) engine="${argument#--saveEngine=}" ;;
  esac
done
head -c "$size" /dev/zero > "$engine"
echo "[09/01/2026-12:00:00] [I] Throughput: $rate qps"
echo "[09/01/2026-12:00:00] [I] Latency: min = 0.1 ms, max = 9 ms, mean = 3 ms, \
median = $time ms, percentile(90%) = 4 ms"
echo "[09/01/2026-12:00:00] [I] Enqueue Time: min = 0.1 ms, median = 77 ms"
"""
ONNXPRUNE = """#!/bin/sh
echo '{"next": {"command": "trtexec --onnx=x --minShapes='"'a b:1x3'"' --sparsity=enable"}}'
exit 4
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("trtexec", FAKE),):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name in ("big.onnx", "small model.onnx", "bad.onnx", "silent.onnx"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.chdir(tmp_path)
    return folder


def run(tools: Path, *arguments: str, path: str = "/usr/bin:/bin") -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, "PATH": f"{tools}:{path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_two_models_are_put_side_by_side(tools: Path, tmp_path: Path) -> None:
    code, out, err = run(tools, "big.onnx", "small model.onnx", "--", "--fp16")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[1] == ["median", "latency,", "ms", "2", "0.5", "0.250"]
    assert rows[2] == ["throughput,", "qps", "500", "2000", "4.000"]
    assert rows[3] == ["engine,", "bytes", "40", "10", "0.250"]
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("--onnx=big.onnx ")
    assert second.startswith("--onnx=small model.onnx ")
    assert first.endswith(" --fp16")


def test_each_file_gets_the_flags_that_check_recommends(tools: Path, tmp_path: Path) -> None:
    (tools / "onnxprune").write_text(ONNXPRUNE)
    (tools / "onnxprune").chmod(0o755)
    assert run(tools, "big.onnx", "small model.onnx")[0] == 0
    assert "--minShapes=a b:1x3 --sparsity=enable" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["big.onnx"], 2, "give two models"),
        (["big.onnx", "none.onnx"], 2, "'none.onnx' is not a file"),
        (["big.onnx", "bad.onnx"], 4, "Error: no such layer"),
        (["big.onnx", "silent.onnx"], 4, "no latency in what trtexec said"),
    ],
    ids=["one", "missing", "failed", "silent"],
)
def test_what_goes_wrong_is_one_line(
    tools: Path, arguments: list[str], code: int, said: str
) -> None:
    got, out, err = run(tools, *arguments)
    assert (got, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1


def test_missing_trtexec_is_named(tools: Path) -> None:
    (tools / "trtexec").unlink()
    code, out, err = run(tools, "big.onnx", "small model.onnx")
    assert (code, out) == (5, "")
    assert "TRTEXEC" in err
