"""How many networks of the zoo are pruned exactly, how far, how fast, beside what the peers did.

    python tools/bench/prunability.py --markdown tools/bench/results/prunability.md

The zoo is `../shared/zoo` beside the repository: graphs without weights, filled one at a time in a
temporary folder. The peers' figures are those of its manifest: they started from the same network
at the same ratio of 0.5 per layer (Torch-Pruning from the PyTorch code). "left" is the share of
parameters that is left. Where Torch-Pruning left less, it cut the stream under the normalisations
or the dimensions of heads: those networks are cut once more with `--attention dims --allow-norm`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from trial import GOOD, SHARED, Trial, short, state, table, trial

TORCH_PRUNING = "torch_pruning_1.6.1"
ONNXSIM = "onnxsim_0.8.1"
MARGIN = 1.02  # as small as Torch-Pruning's, within two per cent
FURTHER = 1.05  # the same with --attention dims --allow-norm
# Layer by layer, found by running the peer again (timm 1.0.31).
_AGAIN = """\
mobilevit_xxs and swiftformer_xs stay 6 % above the manifest's figures with every group cut by half.
Layer by layer there is nothing more to halve: run again with the classifiers named as what stays
and each qkv with its number of heads, Torch-Pruning leaves 0.317 and 0.285 of them, as we do.
Without the heads it leaves 0.273 of mobilevit_xxs, which then does not run; with the list of the
two classifiers of swiftformer_xs named alone it leaves 0.253 and half of the classes."""


@dataclass(frozen=True)
class Row:
    """One network: ours, its entry in the manifest, and ours by dimensions and under norms."""

    name: str
    entry: Mapping[str, object]
    ours: Trial
    further: Trial | None = None

    def peer(self, key: str) -> Mapping[str, object]:
        """What a peer did; {} where it was not tried."""
        found = self.entry.get(key)
        return found if isinstance(found, dict) else {}

    def peer_left(self, key: str) -> float | None:
        """Share of the parameters that a peer left, None where it failed."""
        peer = self.peer(key)
        after, before = peer.get("params_after"), peer.get("params_before", self.entry["params"])
        if peer.get("status") not in ("ok", "noop") or not after or not before:
            return None
        return float(str(after)) / float(str(before))

    @property
    def matched(self) -> bool | None:
        """As small as Torch-Pruning made it; None where it failed."""
        theirs = self.peer_left(TORCH_PRUNING)
        return None if theirs is None else self.ours.left <= theirs * MARGIN

    @property
    def reached(self) -> bool | None:
        """As small, with whatever it takes; None where Torch-Pruning failed."""
        theirs = self.peer_left(TORCH_PRUNING)
        if self.matched is not False or theirs is None or self.further is None:
            return self.matched
        return self.further.status == "ok" and self.further.left <= theirs * FURTHER


def run(zoo: Path, entries: Iterable[Mapping[str, object]], ratio: float) -> Iterable[Row]:
    """Materialise, prune and drop one network after another."""
    for entry in entries:
        file = str(entry["file"])
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, zoo / "materialize.py", zoo / file, "--out", folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            model = Path(folder, Path(file).name.removesuffix(".xz"))
            row = Row(file.removesuffix(".onnx.xz"), entry, trial(model, ratio=ratio))
            if row.matched is False:
                more = trial(model, ratio=ratio, attention="dims", allow_norm=True)
                row = replace(row, further=more)
            yield row


def networks(rows: Sequence[Row]) -> str:
    """The table of all networks."""
    return table(
        ("network", "status", "left", "TP", "onnxsim", "analysis s", "total s", "TP s"),
        (
            (
                row.name,
                state(row.ours),
                f"{row.ours.left:.3f}",
                _peer(row, TORCH_PRUNING),
                _peer(row, ONNXSIM),
                f"{row.ours.analysis:.2f}",
                f"{row.ours.total:.2f}",
                _seconds(row.peer(TORCH_PRUNING).get("prune_s")),
            )
            for row in rows
        ),
    )


def _peer(row: Row, key: str) -> str:
    left = row.peer_left(key)
    return f"{left:.3f}" if left is not None else str(row.peer(key).get("status", "-"))


def _seconds(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"


def totals(rows: Sequence[Row]) -> str:
    """The figures that a reader wants first."""
    exact = [row for row in rows if row.ours.status == "ok"]
    statuses = Counter(state(row.ours) for row in rows)
    compared = [row for row in rows if row.matched is not None]
    rescued = [row for row in exact if row.peer(TORCH_PRUNING).get("status") in ("fail", "timeout")]
    analysis = [row.ours.analysis for row in rows]
    lines = [
        f"- pruned and equal to the masked twin: {len(exact)} of {len(rows)} "
        f"({', '.join(f'{count} {name}' for name, count in statuses.most_common())})",
        f"- parameters left, mean: {_mean(row.ours.left for row in exact)}",
        f"- as small as Torch-Pruning's × {MARGIN:g}: "
        f"{sum(bool(row.matched) for row in compared)} of the {len(compared)} it could do "
        f"(means on those: {_mean(row.ours.left for row in compared)} against "
        f"{_mean(row.peer_left(TORCH_PRUNING) or 1 for row in compared)}); "
        f"{len(rescued)} of ours are networks on which it failed or timed out",
        f"- with --attention dims --allow-norm on the others, × {FURTHER:g}: "
        f"{sum(bool(row.reached) for row in compared)} of {len(compared)}",
        f"- onnxsim: {dict(_peer_statuses(rows, ONNXSIM))}",
        f"- analysis: median {statistics.median(analysis):.2f} s, longest {max(analysis):.2f} s",
    ]
    return "\n".join(lines)


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.mean(found):.3f}" if found else "-"


def _peer_statuses(rows: Sequence[Row], key: str) -> Counter[str]:
    return Counter(str(row.peer(key)["status"]) for row in rows if row.peer(key))


def exceptions(rows: Sequence[Row]) -> str:
    """Networks that Torch-Pruning made smaller, with what we froze in them."""
    worse = [row for row in rows if row.matched is False]
    return table(
        ("network", "left", "dims, norms", "TP", "widest frozen groups and why"),
        (
            (
                row.name,
                f"{row.ours.left:.3f}",
                f"{row.further.left:.3f} {row.further.status}" if row.further is not None else "-",
                _peer(row, TORCH_PRUNING),
                "; ".join(
                    f"{group.width} {group.name}: {short(group.reason)}"
                    for group in (row.further or row.ours).frozen[:3]
                ).replace("|", "/"),
            )
            for row in sorted(worse, key=_behind)
        ),
    )


def _behind(row: Row) -> float:
    return (row.peer_left(TORCH_PRUNING) or 1) / row.ours.left


def problems(rows: Sequence[Row]) -> str:
    """What went wrong, in one line each."""
    wrong = [row for row in rows if state(row.ours) != "ok"]
    return "\n".join(f"- {row.name}: {state(row.ours)}: {row.ours.reason}" for row in wrong)


def report(rows: Sequence[Row], ratio: float) -> str:
    """The whole result in Markdown."""
    parts = [
        "# Prunability of the zoo",
        f"`tools/bench/prunability.py`, ratio {ratio:g} in each group, importance l1; seconds on "
        'two cores. "TP" is Torch-Pruning 1.6.1, "onnxsim" is onnxsim 0.8.1; "left" is the share '
        "of parameters left.",
        totals(rows),
        "## Larger than Torch-Pruning's × 1.02",
        exceptions(rows),
        _AGAIN,
        "## Not simply ok",
        problems(rows) or "None.",
        "## All networks",
        networks(rows),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Exit 1 where some result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, default=SHARED / "zoo")
    parser.add_argument("--only", default="*", help="glob on exporter/network")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--markdown", type=Path, help="write the report here, not to stdout")
    args = parser.parse_args()
    manifest = json.loads(Path(args.zoo, "manifest.json").read_text("utf-8"))
    wanted = [e for e in manifest if fnmatchcase(e["file"].removesuffix(".onnx.xz"), args.only)]
    if not wanted:
        parser.error(f"no network matches {args.only}")
    rows = []
    for row in run(args.zoo, wanted, args.ratio):
        rows.append(row)
        more = "" if row.further is None else f" {state(row.further)} {row.further.left:.3f}"
        print(
            f"{row.name} {state(row.ours)} {row.ours.left:.3f}{more}", file=sys.stderr, flush=True
        )
    text = report(rows, args.ratio)
    if args.markdown:
        args.markdown.write_text(text, "utf-8")
    else:
        print(text)
    if args.json:
        found = {row.name: row.ours.as_json() for row in rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0 if all(row.ours.status in GOOD for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
