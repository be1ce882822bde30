"""The order of the modules, and other things that hold for the package as a whole."""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnxprune

PACKAGE = Path(onnxprune.__file__).parent
ROOT = PACKAGE.parent

# A module may import only from modules above it, inside functions too.
ORDER = tuple(
    """
    errors types dims messages validate definitions meaning functions patterns permute
    model skeleton files stream io chains presented weights replaced
    thin held
    effects fields moves rows intervals
    graph runtime affines foldbn simplify feeds sequences fold prepare shapes standins data
    slots
    ops.view ops.registry ops.elementwise ops.conv ops.norm ops.linear ops.einsum ops.join
    ops.movement ops.places ops.plain ops.pool ops.reduce ops.contrib ops.heads ops.rotary
    ops.attention ops
    copies runs trace survivors groups shapefix analyse
    bounds.view bounds.layers bounds.pointwise bounds.space bounds
    layers norms moments calibrate pictures obs score select readers lossless
    record slices emit patches selections absorb twin rewrite reorder
    extents staircase timing timed latency
    stepwise through sums refit sparsegpt patterned
    shown activations weighed sites affine carried bases products problem unfuse reach lean
    restore compensate recentre expand
    alignment cost density budget aim planning unseen iterate latency_target recipe recording
    replay impose valued drift verify tidy
    quantize quantize.ready quantize.typed quantize.lowered quantize.ranges quantize.calibration
    quantize.asked quantize.int8 quantize.convert
    gauges cluster jobs restored_twin suffix sensitivity curves sweep
    estimate
    targets targets.findings targets.support targets.nodes targets.operators targets.quantized
    targets.profiles targets.files targets.layered targets.trtexec targets.builder targets.worker
    targets.tensorrt
    report report.clock report.model report.checks report.ops report.layers report.build
    report.schemas report.layout report.channels report.widths report.costs report.sparse
    report.restored report.quantized report.endings report.tables report.tuned report.plots
    report.studies
    checks restoring request analysing checking verdicts writing shrinking pipeline thinning
    sparsifying quantizing subjects studies
    train train.protocol train.wire train.updates train.own train.worker train.copying
    train.rewrites train.losses train.spatial train.place train.ort
    train.torch_ops.lazy train.torch_ops.registry train.torch_ops.window
    train.torch_ops.elementwise train.torch_ops.activation train.torch_ops.conv
    train.torch_ops.pool train.torch_ops.norm train.torch_ops.movement train.torch_ops.index
    train.torch_ops.reduce train.torch_ops.linear train.torch_ops.attention train.torch_ops.resize
    train.torch_ops.recurrent train.torch_ops.control train.torch_ops
    train.torch_graph train.torch_trainer
    train.backends train.batching train.zeros
    train.classes train.objective train.samples train.given train.gradcheck train.schedule
    train.checkpoint train.interrupts train.judge train.loop train.session tuning rounds
    terminal
    commands commands.options commands.finetune commands.training
    commands.inspect commands.shrink commands.sparsify commands.quantize
    commands.sensitivity commands.sweep commands.compare commands.check commands.schema
    cli __main__
    """.split()  # noqa: SIM905  (read as lines)
)

# Imported inside functions only: they take long, and `--help` does not need them.
HEAVY = {"onnxruntime", "polygraphy", "onnx_graphsurgeon", "matplotlib", "tensorrt_rtx", "torch"}
# Third-party packages by their import name, as pyproject.toml lists them.
THIRD_PARTY = {
    "distributed": "dask",
    "google": "protobuf",
    "matplotlib": "matplotlib",
    "ml_dtypes": "ml_dtypes",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnx_graphsurgeon": "onnx-graphsurgeon",
    "polygraphy": "polygraphy",
    "pydantic": "pydantic",
    "rich": "typer",  # which brings it
    "threadpoolctl": "threadpoolctl",
    "tensorrt_rtx": "tensorrt-rtx-cu12",
    "torch": "torch",
    "typer": "typer",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    return {inner for block in blocks for inner in ast.walk(block)}


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """What a file imports, wherever: full name, line, whether when it is loaded."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped, top = for_types_only(tree), set(tree.body)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node in top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, node in top


def own(name: str) -> str | None:
    """The module of ours that an imported name is, or is in; None for other packages."""
    parts = name.split(".")
    if parts[0] != "onnxprune":
        return None
    inner = parts[1:]
    while inner and ".".join(inner) not in MODULES:
        inner = inner[:-1]
    return ".".join(inner)


def test_every_module_has_its_place_in_the_order() -> None:
    assert set(ORDER) == set(MODULES) - {""}, "put it into ORDER above what imports it"
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", [module for module in ORDER if module in MODULES])
def test_imports_go_up_the_order_only(module: str) -> None:
    place = {name: number for number, name in enumerate(ORDER)}
    wrong = [
        f"{module}:{line} imports {name}"
        for name, line, _ in imports(MODULES[module])
        if own(name) and place[own(name) or ""] >= place[module]
    ]
    assert wrong == []


def test_package_itself_imports_the_errors_only() -> None:
    found = {own(name) for name, _, _ in imports(MODULES[""]) if name.startswith("onnxprune")}
    assert found == {"errors"}


def test_heavy_packages_are_imported_inside_functions() -> None:
    wrong = [
        f"{module}:{line} imports {name}"
        for module, path in MODULES.items()
        for name, line, at_load in imports(path)
        if at_load and name.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_sessions_are_made_in_one_place() -> None:
    found = [m for m, path in MODULES.items() if "InferenceSession(" in path.read_text("utf-8")]
    # Reading a model asks the runtime what it thinks of a doubtful one, before there is a `Model`.
    assert found == ["meaning", "runtime"]


def test_third_party_imports_are_declared_dependencies() -> None:
    import sys

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = [one for name in ("dask", "report", "tensorrt", "torch") for one in extras[name]]
    declared = " ".join([*project["dependencies"], *optional])
    used = {
        name.split(".")[0]
        for path in MODULES.values()
        for name, _, _ in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names | {"onnxprune"}
    }
    assert used <= set(THIRD_PARTY)
    assert all(THIRD_PARTY[name] in declared for name in used)


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == onnxprune.__version__


@pytest.mark.parametrize("name", onnxprune.__all__)
def test_public_name_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(onnxprune, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        assert value.__doc__
        assert not value.__doc__.startswith(f"{name}("), "that is what dataclass makes"


def test_only_the_command_line_catches_everything() -> None:
    found = [
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (
            node.type is None or "Exception" in [getattr(n, "id", "") for n in ast.walk(node.type)]
        )
    ]
    # The second runs users' code; the third is a process of its own, and hands on what went wrong.
    assert set(found) <= {"cli", "functions", "train.worker"}


def test_nothing_but_the_terminal_prints() -> None:
    found = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert found <= {"cli", "terminal"}
