"""Read and write models: external data, files over 2 GiB, atomic saves.

A model on disk is one protobuf message with its weights inside, or beside it in external data
files.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxprune import definitions, meaning, stream, validate
from onnxprune.errors import ModelError, UsageError
from onnxprune.files import named, text_job, write_files
from onnxprune.messages import external_files, tensors
from onnxprune.model import Model
from onnxprune.skeleton import skeleton


def load(path: str | Path) -> Model:
    """Read and check a model. External data is memory-mapped when it is used, never read whole.

    Raises:
        ModelError: The file is no ONNX model, or an invalid one; the message says what to do.
    """
    path = Path(path)
    validate.check_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror}") from error
    proto = _parse(data, str(path))
    del data  # twice the model's size until here
    try:
        _check(Model(proto, path.parent, path=path))
    except ModelError as error:
        raise ModelError(f"'{path}': {error.message}", hint=error.hint, node=error.node) from error
    sources = (path, *external_files(proto, path.parent))
    size = sum(file.stat().st_size for file in sources)
    return Model(proto, path.parent, path=path, file_bytes=size, sources=sources)


def as_model(model: Model | onnx.ModelProto | bytes | str | Path) -> Model:
    """A checked ``Model`` of whatever the caller has; a ``ModelProto`` is shared, not copied."""
    match model:
        case Model():
            return model
        case str() | Path():
            return load(model)
        case bytes():
            made = Model(_parse(model, "the given bytes"))
        case _:
            made = Model(model)
    _check(made)
    return made


@contextlib.contextmanager
def runnable(model: Model) -> Iterator[bytes | str]:
    """What an ``InferenceSession`` takes: bytes, or over 2 GiB the path of a temporary file."""
    if stream.fits_inline(model):
        yield stream.serialize(model)
        return
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = Path(folder, "model.onnx")
        write_files(stream.model_jobs(model, path, path.with_name(path.name + ".data")))
        yield str(path)


def save(model: Model, path: str | Path, *, force: bool = False) -> int:
    """Write the model atomically: all of it, or nothing and no leftovers.

    Weights stay inside the file where the original had them there and 2 GiB allow it; otherwise
    those over 1 KiB go to ``<path>.data`` beside it, page-aligned, and the model is written last.

    Returns:
        Bytes written.

    Raises:
        UsageError: The output is the input, exists and ``force`` is not given, or cannot be
            written.
    """
    return sum(save_with(model, path, {}, force=force).values())


def save_with(
    model: Model,
    path: str | Path,
    texts: Mapping[Path, str],
    *,
    force: bool = False,
    check: Callable[[Model], None] | None = None,
) -> Mapping[Path, int]:
    """``save``, together with text files: all of them or none.

    Args:
        model: What to write.
        path: Where to.
        texts: More files, by path; whether they may be overwritten is for the caller to check.
        force: Overwrite the model's files.
        check: Called with the model as the written files give it, before they are put in place;
            what it raises leaves no file.

    Returns:
        Bytes of each file that was written; the model itself comes last.

    Raises:
        UsageError: As in ``save``.
    """
    path = Path(path)
    inline = len(model.sources) <= 1 and not external_files(model.proto, model.directory)
    inline = inline and stream.fits_inline(model)
    data_path = None if inline else path.with_name(path.name + ".data")
    for target in (path, data_path):
        if target is not None:
            with named(target):
                _check_output(model, target, force)
    beside = {target: text_job(text) for target, text in texts.items()}

    def written(temporary: Mapping[Path, Path]) -> None:
        if check is not None:
            moved = {} if data_path is None else {data_path.name: temporary[data_path].name}
            check(_reread(temporary[path], moved))

    return write_files(beside | stream.model_jobs(model, path, data_path), written)


def _parse(data: bytes, source: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise validate.not_a_model(data, source) from None
    if not proto.HasField("graph"):
        raise validate.not_a_model(data, source)
    return proto


def _check(model: Model) -> None:
    definitions.check_structure(model.proto)
    validate.check_data(model.proto, model.directory, model.path)
    meaning.check_meaning(skeleton(model))


def _reread(path: Path, moved: Mapping[str, str]) -> Model:
    """A model just written, whose external data lies where ``moved`` says as yet."""
    proto = _parse(path.read_bytes(), str(path))
    for tensor, _ in tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = moved.get(entry.value, entry.value)
    return Model(proto, path.parent)


def _check_output(model: Model, target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise UsageError(f"folder '{target.parent}' does not exist", hint="create it first")
    if target.is_dir():
        raise UsageError(f"'{target}' is a directory", hint="give the output a file name")
    sources = {*model.sources, *external_files(model.proto, model.directory)}
    if model.path is not None:
        sources.add(model.path)
    real = target.resolve()
    for source in sources:
        if source.resolve() == real or (
            target.exists() and source.exists() and target.samefile(source)
        ):
            raise UsageError(
                f"'{target}' is the input itself, which is never overwritten",
                hint="choose another output",
            )
    if target.exists() and not target.is_file():
        raise UsageError(f"'{target}' is not a regular file", hint="choose another output")
    if os.path.lexists(target) and not force:
        raise UsageError(
            f"'{target}' exists", hint="give --force to overwrite it, in Python force=True"
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"folder '{target.parent}' is not writable", hint="choose another output")
