"""How near a sentence encoder's embeddings stay when heads, or their dimensions, and units go.

    python tools/bench/minilm_export.py FOLDER OUT
    python tools/bench/minilm_shrink.py FOLDER OUT/torchscript.onnx OUT/dynamo.onnx \
        --markdown tools/bench/results/minilm.md

FOLDER as in `minilm.py`, whose texts these are: 256 to refit on, 400 others to measure on. Defaults
otherwise. Milliseconds are of 32 texts of 64 tokens, both models measured in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from minilm import embeddings, nearness, samples

from onnxprune.io import load
from onnxprune.pipeline import shrink
from onnxprune.timing import measure

RATIOS = (0.25, 0.5)


def rows(folder: Path, files: Sequence[Path], ratios: Sequence[float]) -> Iterator[str]:
    """Each file at each ratio, by what `--attention auto` takes, by heads, and not restored."""
    calibration, evaluation = samples(folder)
    yield (
        "| export | cut | attention | restored | cosine, mean | least | parameters left "
        "| MACs left | ms, before | after | s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for file in files:
        dense = load(file)
        aim = embeddings(dense, evaluation)
        for ratio in ratios:
            for attention, restore in (("auto", "refit"), ("heads", "refit"), ("heads", "none")):
                made, report = shrink(
                    dense, ratio=ratio, attention=attention, restore=restore,
                    data=calibration, verify="twin",
                )  # fmt: skip
                got, after = nearness(embeddings(made, evaluation), aim), report.after
                assert after is not None
                before, now = measure([dense, made], evaluation.batches[0])
                yield (
                    f"| {file.stem} | {ratio:.0%} | {attention} | {restore} | {got.mean:.3f} "
                    f"| {got.least:.3f} | {after.params / report.before.params:.3f} "
                    f"| {after.macs / report.before.macs:.3f} | {1e3 * before.seconds:.0f} "
                    f"| {1e3 * now.seconds:.0f} | {sum(report.seconds.values()):.0f} |"
                )


def main() -> None:
    """Print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--ratios", default=",".join(map(str, RATIOS)))
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    lines = ["# MiniLM, heads and units", "", "`tools/bench/minilm_shrink.py`.", ""]
    for line in rows(given.folder, given.files, [float(r) for r in given.ratios.split(",")]):
        print(line, flush=True)
        lines.append(line)
        if given.markdown is not None:
            given.markdown.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
