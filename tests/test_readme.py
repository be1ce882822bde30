"""Every command and snippet of README.md, run in a copy of what they need.

Blocks marked ``console`` are commands with their real output, ``python`` blocks are run as they
stand; ``sh`` blocks set up a machine and ``text`` is text.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onnxprune.report.ops import operator_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
_FIGURE = r"-?\d+(\.\d+)?(e-?\d+)?"


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCKS if found == kind]


def run(arguments: list[str], folder: Path) -> str:
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout


def comparable(output: str) -> list[str]:
    """Lines without trailing space; measured figures are left out: their last digit may differ."""
    output = re.sub(r"-?\b\d\.\d{4}\b", "#", output)
    lines = [re.sub(r"\s+", " ", line).strip() for line in output.splitlines()]
    return [
        re.sub(_FIGURE, "#", line) if re.search(r"drift|cosine|held-out|in about", line) else line
        for line in lines
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "models", made / "models")
    return made


def test_readme_has_something_of_every_kind() -> None:
    assert {kind for kind, _ in BLOCKS} == {"console", "sh", "text", "python"}
    assert len(blocks("sh")) == 2


@pytest.mark.parametrize("block", blocks("console"), ids=lambda b: " ".join(b.split()[1:4]))
def test_commands_print_what_the_readme_shows(block: str, folder: Path) -> None:
    first, _, shown = block.partition("\n")
    program, *arguments = shlex.split(first.removeprefix("$ "))
    assert program == "onnxprune"
    if "compare" in arguments:  # by itself it lacks the model that the first command writes
        shrink = shlex.split(blocks("console")[0].partition("\n")[0].removeprefix("$ "))[1:]
        run(["-m", "onnxprune", *shrink], folder)
    for _ in range(2 if "shrink" in arguments else 1):  # what it wrote is not in its way
        assert comparable(run(["-m", "onnxprune", *arguments], folder)) == comparable(shown)


@pytest.mark.parametrize("block", blocks("python"))
def test_snippets_run(block: str, folder: Path) -> None:
    for _ in range(2):
        said = run(["-c", block], folder)
        assert "block1.first.conv.weight" in said or "print(graph)" not in block


def test_operator_table_is_up_to_date() -> None:
    between = re.search(r"<!-- operators -->\n(.*?)<!-- /operators -->", README, re.DOTALL)
    assert between is not None
    assert between[1] == operator_table(), "paste what python -m onnxprune.report.ops prints"


def test_set_up_commands_are_those_of_the_project() -> None:
    first, second = blocks("sh")
    assert "pip install ." in first
    assert "onnxprune shrink models/" in first
    assert "'.[test]'" in second
    for path in re.findall(r"models/\w+\.\w+", first):
        assert (ROOT / path).exists()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings
