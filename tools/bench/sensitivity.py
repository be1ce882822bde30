"""Seconds that `sensitivity` takes on a network of ResNet-50's size, against pruning each cut.

    python tools/bench/sensitivity.py --samples 16 --groups 12 --check 4
    python tools/bench/sensitivity.py --samples 8 --groups 12 --cluster

The naive way cuts the model for real, loads it and runs all of it, once for each group and ratio.
It is measured twice: with the analysis and the original's outputs at hand (only cutting, loading
and running count), and with the verbs `shrink` and `compare`, as one would without `sensitivity`.
Both are measured on the same groups in the same process, ratio 0.5. With --one-core everything runs
on one core and CPU seconds are counted, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

import onnxprune
from onnxprune.analyse import analyse
from onnxprune.data import load_data
from onnxprune.gauges import Drifted, Gauge
from onnxprune.io import load
from onnxprune.jobs import each
from onnxprune.rewrite import operate
from onnxprune.runtime import session
from onnxprune.score import score
from onnxprune.sensitivity import Bench, Study, one_family
from onnxprune.suffix import families

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
BLOCKS = (3, 4, 6, 3)


class Builder:
    """ResNet-50 with random weights, BatchNormalization folded, any batch."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def conv(self, x: str, name: str, ins: int, outs: int, size: int, stride: int = 1) -> str:
        scale = np.sqrt(2 / (ins * size * size))
        weight = self.rng.standard_normal((outs, ins, size, size)) * scale
        bias = self.rng.standard_normal(outs) * 0.1
        for suffix, array in ((".weight", weight), (".bias", bias)):
            self.weights.append(numpy_helper.from_array(array.astype(np.float32), name + suffix))
        pad = size // 2
        self.nodes.append(
            helper.make_node(
                "Conv", [x, f"{name}.weight", f"{name}.bias"], [name], name=name,
                strides=[stride] * 2, pads=[pad] * 4, kernel_shape=[size] * 2,
            )
        )  # fmt: skip
        return name

    def op(self, kind: str, inputs: list[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def build(self) -> onnx.ModelProto:
        x = self.op("Relu", [self.conv("x", "stem", 3, 64, 7, 2)], "stem.relu")
        x = self.op("MaxPool", [x], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        ins = 64
        for stage, blocks in enumerate(BLOCKS):
            width = 64 << stage
            for block in range(blocks):
                name, stride = f"s{stage}b{block}", 2 if stage and not block else 1
                y = self.op("Relu", [self.conv(x, f"{name}.1", ins, width, 1)], f"{name}.1.relu")
                y = self.conv(y, f"{name}.2", width, width, 3, stride)
                y = self.op("Relu", [y], f"{name}.2.relu")
                y = self.conv(y, f"{name}.3", width, 4 * width, 1)
                if not block:
                    x = self.conv(x, f"{name}.down", ins, 4 * width, 1, stride)
                x = self.op("Relu", [self.op("Add", [y, x], f"{name}.sum")], f"{name}.relu")
                ins = 4 * width
        x = self.op("Flatten", [self.op("GlobalAveragePool", [x], "gap")], "flat")
        head = self.rng.standard_normal((1000, ins)) * 0.02
        self.weights.append(numpy_helper.from_array(head.astype(np.float32), "head.weight"))
        self.op("Gemm", [x, "head.weight"], "y", transB=1)
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes, "resnet50",
            [value("x", onnx.TensorProto.FLOAT, ["N", 3, 224, 224])],
            [value("y", onnx.TensorProto.FLOAT, ["N", 1000])], self.weights,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


clock = time.perf_counter


@contextmanager
def timed(spent: list[float]) -> Iterator[None]:
    begun = clock()
    yield
    spent.append(clock() - begun)


def study_of(path: Path, batches: tuple, todo: tuple[int, ...]) -> Study:
    return Study(path, "heads", {}, "l1", 0, RATIOS, batches, Gauge(), 0.0, todo)


def against_naive(path: Path, data_path: Path, groups: int, check: int, verbs: int) -> None:
    data = load_data(data_path, load(path))
    setup: list[float] = []
    with timed(setup):
        model = load(path)
        graph = analyse(model)
        importance = score(graph, "l1")
    every = families(graph)
    chosen = tuple(sorted({round(i) for i in np.linspace(0, len(every) - 1, groups)}))
    batches = tuple(data.batches)
    print(f"{len(every)} groups; measured: {len(chosen)} of them, {data.samples} samples")
    bench = Bench(study_of(path, batches, chosen), graph, importance)
    original = session(model)
    reference = [original.run(batch) for batch in batches]
    ours, border, naive, surgery, worst = [], [], [], [], 0.0
    subset = chosen[:: max(1, len(chosen) // check)][:check]
    for number in chosen:
        with timed(border):  # kept, where it is not yet
            for _ in bench._borders.of(number):
                pass
        with timed(ours):
            points = bench.measure(number)
        if number not in subset:
            continue
        with timed(naive):  # beside it, so that both meet the same load of the machine
            with timed(surgery):
                made = operate(one_family(graph, importance, every[number], 0.5)).model
                loaded = session(made)
            drifted = Drifted()
            for batch, wanted in zip(batches, reference, strict=True):
                drifted.add(wanted, loaded.run(batch))
        point = next(point for point in points if point.ratio == 0.5)
        worst = max(worst, abs(drifted.result() / point.loss - 1))
    chunks = chunks_of(Bench(study_of(path, batches, tuple(range(len(every)))), graph, importance))
    shared = setup[0] + chunks * max(border)
    points_in_all = len(every) * len(RATIOS)
    each_point = statistics.mean(ours) / len(RATIOS) + shared / points_in_all
    one = statistics.mean(naive)
    print(f"once         {shared:7.2f} s: analysis, and {chunks} runs of the original")
    print(f"sensitivity  {each_point:7.2f} s for each group and ratio, its share of that included")
    print(f"naive        {one:7.2f} s, of which cutting and loading {statistics.mean(surgery):.2f}")
    print(f"ratio        {one / each_point:7.2f}  (drift agrees to {worst:.1e})")
    spelled = []
    for number in subset[:verbs]:
        only = [graph.groups[number].name for number in every[number]]
        with timed(spelled):
            small = path.with_name("small.onnx")
            onnxprune.shrink(path, ratio=0.5, only=only, verify="none", output=small, force=True)
            onnxprune.compare(path, small, data=data)
    if spelled:
        verb = statistics.mean(spelled)
        print(f"with verbs   {verb:7.2f} s, ratio {verb / each_point:.2f}")
    total = each_point * points_in_all
    print(f"all {len(every)} groups x {len(RATIOS)} ratios: {total:.0f} s (extrapolated)")


def chunks_of(bench: Bench) -> int:
    """How often the original is run when all groups are measured."""
    borders, count, number = bench._borders, 0, 0
    order = list(borders._wanted)
    while number < len(order):
        number += max(1, len(borders._together(order[number])))
        count += 1
    return count


def in_clusters(path: Path, data_path: Path, groups: int, rounds: int) -> None:
    from distributed import Client, LocalCluster

    batches = tuple(load_data(data_path, load(path), batch=8).batches)
    every = len(families(analyse(load(path))))
    chosen = tuple(sorted({round(i) for i in np.linspace(0, every - 1, groups)}))
    study = study_of(path, batches, chosen)
    wall: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}  # of the worker that did most

    def cluster(workers: int) -> LocalCluster:
        return LocalCluster(
            n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        )

    with cluster(1) as one, cluster(2) as two, Client(one) as first, Client(two) as second:
        for _ in range(rounds):
            shares = {}
            for workers, made, client in ((1, one, first), (2, two, second)):
                before = client.run(time.process_time)
                with timed(wall[workers]):
                    results = dict(each(study, chosen, scheduler=made.scheduler_address))
                assert len(results) == len(chosen)
                after = client.run(time.process_time)
                shares[workers] = [after[name] - before[name] for name in after]
                cpu[workers].append(max(shares[workers]))
            print(
                f"wall s: 1 worker {wall[1][-1]:.1f}, 2 workers {wall[2][-1]:.1f}; CPU s: "
                f"{shares[1][0]:.1f} and {' + '.join(f'{one:.1f}' for one in shares[2])}; "
                f"load average {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    for name, spent in (("wall s", wall), ("CPU s of the busiest worker", cpu)):
        ratios = [a / b for a, b in zip(spent[1], spent[2], strict=True)]
        print(f"{name}: median ratio {statistics.median(ratios):.2f}, best {max(ratios):.2f}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--groups", type=int, default=12, help="evenly spread over the depth")
    parser.add_argument("--check", type=int, default=4, help="groups done the naive way too")
    parser.add_argument("--verbs", type=int, default=2, help="of them, groups done with the verbs")
    parser.add_argument("--cluster", action="store_true", help="one Dask worker against two")
    parser.add_argument("--rounds", type=int, default=3, help="of that, taken in turns")
    parser.add_argument("--one-core", action="store_true", help="count CPU seconds on one core")
    args = parser.parse_args()
    if args.one_core:
        global clock  # noqa: PLW0603  (for the whole run)
        clock = time.process_time
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        path, data = Path(folder, "resnet50.onnx"), Path(folder, "data.npz")
        onnx.save(Builder().build(), path)
        rng = np.random.default_rng(1)
        np.savez(data, x=rng.standard_normal((args.samples, 3, 224, 224)).astype(np.float32))
        if args.cluster:
            in_clusters(path, data, args.groups, args.rounds)
        else:
            against_naive(path, data, args.groups, args.check, args.verbs)


if __name__ == "__main__":
    main()
