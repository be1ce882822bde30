"""The process that computes with onnxruntime-training.

It is started by file name, by an interpreter that may have nothing but numpy and onnx, with the
folder of onnxruntime-training in front of its path: that package replaces ``onnxruntime`` and can
live in no environment that has the other. It gets a model that already computes the loss, and
answers one message at a time until its input ends.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np


def _beside(name: str) -> Any:
    """A module of this folder by its file: whatever onnxprune the interpreter has is another."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wire, updates = _beside("wire"), _beside("updates")
_NEWEST_IR = 10


def _import_training() -> Any:
    """onnxruntime.training without its ``__init__``, which wants torch."""
    import onnx
    import onnxruntime

    package = types.ModuleType("onnxruntime.training")
    package.__path__ = [str(Path(onnxruntime.__file__).parent / "training")]
    sys.modules["onnxruntime.training"] = package
    onnx.IR_VERSION = min(onnx.IR_VERSION, _NEWEST_IR)  # type: ignore[assignment]  # it stamps what it writes with this
    from onnxruntime.training import api, artifacts

    return artifacts, api


class _Training:
    """A model that is being trained."""

    def __init__(self, say: dict[str, Any], arrays: dict[str, Any]) -> None:
        import onnx
        import onnxruntime

        artifacts, api = _import_training()
        model = onnx.ModelProto.FromString(arrays.pop("model").tobytes())
        onnxruntime.set_default_logger_severity(4)
        onnxruntime.set_seed(say["seed"])
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            artifacts.generate_artifacts(
                model,
                requires_grad=say["weights"],
                frozen_params=say["statistics"],
                loss_input_names=[say["loss"]],
                artifact_directory=folder,
            )
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = say["threads"]
            options.log_severity_level = 4
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self.checkpoint = api.CheckpointState.load_checkpoint(str(Path(folder, "checkpoint")))
            self.module = api.Module(
                str(Path(folder, "training_model.onnx")), self.checkpoint, session_options=options
            )
        self.inputs = self.module.input_names()
        # Views of the runtime's own memory, valid as long as the checkpoint is.
        self.held = {
            name: self.checkpoint.parameters[name].data
            for name in (*say["weights"], *say["statistics"])
        }
        self.updates = updates.Updates(
            {name: self.held[name] for name in say["weights"]},
            optimizer=say["optimizer"],
            masks=arrays,
            l1=say["l1"],
            decayed=frozenset(say["decayed"]),
            weight_decay=say["weight_decay"],
            clip=say["clip"],
        )

    def gradients(self, arrays: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        self.module.train()
        self.module.lazy_reset_grad()
        loss = self.module(*(np.ascontiguousarray(arrays[name]) for name in self.inputs))
        names = self.updates.weights
        found = {name: self.checkpoint.parameters[name].grad for name in names}
        return float(np.asarray(loss).reshape(())), found

    def answer(self, say: dict[str, Any], arrays: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        match say["do"]:
            case "gradients":
                return self.gradients(arrays)
            case "step":
                loss, gradients = self.gradients(arrays)
                if np.isfinite(loss):
                    self.updates.apply(gradients, say["rate"], say["l1"])
                return loss, {}
            case "weights":
                return None, self.held
            case "state":
                return None, {**self.held, **self.updates.state()}
            case "load":
                for name, array in self.held.items():
                    if name in arrays:
                        np.copyto(array, arrays[name])
                self.updates.load(arrays)
                self.updates.keep_zeros()
                return None, {}
        raise ValueError(f"no such request: {say['do']}")


def main() -> None:
    """Answer messages until there are none."""
    out = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):  # the runtime writes hundreds of lines while it builds gradients
        os.dup2(nowhere, number)
    training: _Training | None = None
    while True:
        try:
            say, arrays = wire.receive(sys.stdin.buffer)
        except wire.WireError:
            return
        try:
            if say["do"] == "prepare":
                training = _Training(say, arrays)
                answer: tuple[Any, dict[str, Any]] = (None, {})
            else:
                assert training is not None
                answer = training.answer(say, arrays)
        except MemoryError:
            wire.send(out, {"error": "not enough memory"}, {})
        except Exception as error:  # of any kind: the other end tells it
            wire.send(out, {"error": f"{type(error).__name__}: {error}"}, {})
        else:
            wire.send(out, {"value": answer[0]}, answer[1])


if __name__ == "__main__":
    main()
