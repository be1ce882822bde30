"""Shapes for which an engine of a dynamic model is built: TensorRT asks for three of each input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnxprune.dims import size_of
from onnxprune.errors import UsageError
from onnxprune.model import Model
from onnxprune.targets.findings import Profile
from onnxprune.types import Shape

Shapes = Mapping[str, Shape]
_FLAGS = ("--min-shape", "--opt-shape", "--max-shape")
_Range = tuple[int, int, int]


@dataclass(frozen=True)
class Wanted:
    """The inputs of a model, and the shapes that a user wants of them.

    Attributes:
        open: Dimensions of each input whose shape is open: a number, or a symbol.
        bound: Smallest, best and largest size of each symbol that is given.
    """

    open: Mapping[str, Sequence[int | str]]
    bound: Mapping[str, _Range]

    @classmethod
    def read(
        cls,
        model: Model,
        *,
        least: Shapes | None = None,
        best: Shapes | None = None,
        most: Shapes | None = None,
    ) -> Wanted:
        """What options say; of one or two shapes the rest is that in the middle, or the largest.

        Raises:
            UsageError: A shape does not fit its input or the others, or names none.
        """
        declared = _declared(model)
        given = _given(declared, (least or {}, best or {}, most or {}))
        open_ = {
            name: dims
            for name, dims in declared.items()
            if any(isinstance(dim, str) for dim in dims)
        }
        return cls(open_, _bound(open_, given))

    @property
    def settled(self) -> dict[str, Shape]:
        """Best shapes of the inputs of which no dimension is left open."""
        return {
            name: tuple(dim if isinstance(dim, int) else self.bound[dim][1] for dim in dims)
            for name, dims in self.open.items()
            if all(isinstance(dim, int) or dim in self.bound for dim in dims)
        }

    def profiles(self, known: Sequence[Shapes]) -> dict[str, Profile]:
        """A profile for every input whose shape is open.

        Where a symbol stands in several inputs, its sizes hold in all of them. What is left open
        lies between the sizes at which the model is analysed.

        Args:
            known: Those sizes.
        """
        found = {}
        for name, dims in self.open.items():
            ranges = [
                (dim, dim, dim)
                if isinstance(dim, int)
                else self.bound.get(dim) or _between(known, name, axis)
                for axis, dim in enumerate(dims)
            ]
            low, middle, high = (tuple(one[at] for one in ranges) for at in range(3))
            given = any(dim in self.bound for dim in dims)
            found[name] = Profile(low, middle, high, given=given)
        return found


def _declared(model: Model) -> dict[str, list[int | str]]:
    """Dimensions of the inputs that a caller feeds; a symbol, or a name of our own, where open."""
    graph = model.proto.graph
    defaults = {tensor.name for tensor in graph.initializer}
    return {
        value.name: [
            (dim.dim_param or f"{value.name}.{axis}") if size_of(dim) is None else dim.dim_value
            for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        ]
        for value in graph.input
        if value.name not in defaults
    }


def _given(
    declared: Mapping[str, Sequence[int | str]], asked: tuple[Shapes, Shapes, Shapes]
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """All three shapes of each input that some are given for."""
    for flag, shapes in zip(_FLAGS, asked, strict=True):
        for name, shape in shapes.items():
            _check(flag, name, shape, declared)
    found = {}
    for name in dict.fromkeys(name for shapes in asked for name in shapes):
        low, middle, high = (shapes.get(name) for shapes in asked)
        middle = middle or high or low
        assert middle is not None
        three = (low or middle, middle, high or middle)
        for axis, sizes in enumerate(zip(*three, strict=True)):
            if list(sizes) != sorted(sizes):
                raise UsageError(
                    f"dimension {axis} of '{name}' is {sizes[0]} at least, {sizes[1]} at best and "
                    f"{sizes[2]} at most",
                    hint="give min <= opt <= max",
                )
        found[name] = three
    return found


def _check(flag: str, name: str, shape: Shape, declared: Mapping[str, Sequence[int | str]]) -> None:
    if name not in declared:
        raise UsageError(
            f"{flag}: the model has no input '{name}'", hint=f"it has {', '.join(declared)}"
        )
    dims = declared[name]
    if len(dims) != len(shape):
        raise UsageError(
            f"{flag}: input '{name}' has {len(dims)} dimensions, {len(shape)} were given"
        )
    for axis, (dim, size) in enumerate(zip(dims, shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            raise UsageError(f"{flag}: dimension {axis} of '{name}' is fixed at {dim}, not {size}")


def _bound(
    open_: Mapping[str, Sequence[int | str]], given: Mapping[str, tuple[Shape, Shape, Shape]]
) -> dict[str, _Range]:
    """Sizes of the symbols that are given."""
    found: dict[str, _Range] = {}
    for name, shapes in given.items():
        for axis, dim in enumerate(open_.get(name, ())):
            sizes = (shapes[0][axis], shapes[1][axis], shapes[2][axis])
            if isinstance(dim, str) and found.setdefault(dim, sizes) != sizes:
                raise UsageError(
                    f"dimension {axis} of '{name}' is the same as another, '{dim}', but is given "
                    "other sizes",
                    hint="give equal sizes",
                )
    return found


def _between(sizes: Sequence[Shapes], name: str, axis: int) -> _Range:
    """From the smallest to the largest size at which the model is analysed; best is the first."""
    all_ = [shapes[name][axis] for shapes in sizes]
    return min(all_), all_[0], max(all_)


def spelled(profiles: Mapping[str, Profile], which: Callable[[Profile], Shape]) -> str:
    """Shapes as ``trtexec`` and our own options write them, one after another."""
    return ",".join(
        f"{name}:{'x'.join(map(str, which(profile)))}" for name, profile in profiles.items()
    )
