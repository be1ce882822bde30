"""Slots and their classes: which labels exist, what they belong to, which must go together.

Fields of constants hold slots, positive numbers. Fields of data hold classes, the negative of the
smallest slot of a component, so that the two cannot be mistaken. 0 is kept for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from onnxprune.graph import Graph
from onnxprune.rows import Signature, known_rows
from onnxprune.types import BoolArray, IntArray, Shape

_MOST_ELEMENT_SLOTS = 3_000_000


@dataclass(frozen=True, slots=True)
class Birth:
    """A run of slots born along some axes of a constant.

    Attributes:
        leaf: Name of the constant.
        view: Dimensions under which it is seen; its own, or with an axis split into groups.
        axes: Axes of ``view`` that the slots vary on.
        field: The slots, rank of ``view``.
    """

    leaf: str
    view: Shape
    axes: tuple[int, ...]
    field: IntArray

    @property
    def base(self) -> int:
        """First slot."""
        return int(self.field.flat[0])

    @property
    def size(self) -> int:
        """Number of slots."""
        return self.field.size


@dataclass
class SlotTable:
    """Every slot ever born, in one numbering, and the components they form.

    Attributes:
        labels: Smallest slot of each slot's component.
        frozen: Whether the component with that smallest slot is kept.
        resolved: Class of each slot: minus its label, 0 where that is frozen.
    """

    graph: Graph
    births: list[Birth] = field(default_factory=list)
    _known: dict[tuple[str, Shape, tuple[int, ...]], Birth] = field(default_factory=dict)
    size: int = 1
    labels: IntArray = field(default_factory=lambda: np.zeros(1, np.int64))
    frozen: BoolArray = field(default_factory=lambda: np.ones(1, np.bool_))
    resolved: IntArray = field(default_factory=lambda: np.zeros(1, np.int64))

    def born(self, leaf: str, view: Shape, axes: tuple[int, ...]) -> IntArray | None:
        """The field of a constant on some axes, the same each time; None where it is too big."""
        key = (leaf, view, axes)
        birth = self._known.get(key)
        if birth is None:
            shape = [size if axis in axes else 1 for axis, size in enumerate(view)]
            count = int(np.prod(shape))
            if count > _MOST_ELEMENT_SLOTS:
                return None
            slots = np.arange(self.size, self.size + count).reshape(shape)
            birth = Birth(leaf, view, axes, slots)
            self._known[key] = birth
            self.births.append(birth)
            self.size += count
        return birth.field

    def classes(self, slots: IntArray) -> IntArray:
        """Class of each slot (or class), as far as they were merged."""
        self.grow()
        return self.resolved[np.abs(slots)]

    def grow(self) -> None:
        """Make room for slots born since the last call, and for as many more."""
        if self.labels.size < self.size:
            new = np.arange(self.labels.size, 2 * self.size)
            self.labels = np.concatenate([self.labels, new])
            self.frozen = np.concatenate([self.frozen, np.zeros(new.size, np.bool_)])
            self.resolved = np.concatenate([self.resolved, -new])

    def _refresh(self) -> None:
        self.resolved = np.where(self.frozen[self.labels], 0, -self.labels)

    def merge(self, a: IntArray, b: IntArray, freeze: IntArray) -> bool:
        """Tie ``a`` to ``b`` element by element, freeze slots; tells whether anything changed."""
        self.grow()
        self.labels, self.frozen = self.labels[: self.size], self.frozen[: self.size]
        before = self.resolved[: self.size]
        old = self.labels
        self.labels = connect(self.labels, np.abs(a), np.abs(b))
        frozen = np.zeros_like(self.frozen)
        frozen[self.labels[np.flatnonzero(self.frozen)]] = True
        frozen[self.labels[np.abs(freeze)]] = True
        self.frozen = frozen
        self._refresh()
        return not (np.array_equal(old, self.labels) and np.array_equal(before, self.resolved))


def connect(labels: IntArray, a: IntArray, b: IntArray) -> IntArray:
    """Components after joining a[i] with b[i]; each labelled by its smallest member.

    Min-label hooking with pointer jumping: a few vectorised rounds, whatever the size.
    """
    while True:
        left, right = labels[a], labels[b]
        apart = left != right
        if not apart.any():
            return labels
        a, b = a[apart], b[apart]
        low, high = np.minimum(left[apart], right[apart]), np.maximum(left[apart], right[apart])
        parent = np.arange(labels.size)
        np.minimum.at(parent, high, low)
        while True:
            jumped = parent[parent]
            if np.array_equal(jumped, parent):
                break
            parent = jumped
        labels = parent[labels]


@dataclass
class PassBirths:
    """What rules may ask of the slot table during one pass (``ops.view.Births``).

    Attributes:
        table: The slots.
        shapes: Shape of a tensor.
        same: Tensors that show a constant element by element, and the tensor they show.
        moved: Constant-derived tensors that a movement makes: (source, how labels move).
        scaled: Dequantized constants with a scale for each index of an axis.
        seen: Slots of the elements of moved constants, as far as they were asked for.
        signature: Rows that the last pass found each component in.
    """

    table: SlotTable
    shapes: Callable[[str], Shape | None]
    same: dict[str, str] = field(default_factory=dict)
    moved: dict[str, tuple[str, Callable[[IntArray], IntArray]]] = field(default_factory=dict)
    scaled: set[str] = field(default_factory=set)
    seen: dict[str, IntArray] = field(default_factory=dict)
    signature: Signature = field(default_factory=lambda: np.zeros(1, np.uint64))

    def grid(self, name: str, view: Shape, axes: tuple[int, ...]) -> IntArray | None:
        """Slots of a constant under a view, also through nodes that only present it."""
        leaf = name
        while leaf in self.same:
            leaf = self.same[leaf]
        constant = self.table.graph.constants.get(leaf)
        if constant is None:
            return None
        size = constant.weight.size
        if -1 in view:
            known = -int(np.prod(view))
            view = tuple(size // known if v == -1 else v for v in view)
        return self.table.born(leaf, view, axes) if int(np.prod(view)) == size else None

    def elements(self, name: str) -> IntArray | None:
        """A slot for each element, moved as the constant was."""
        if name in self.scaled:
            return None  # the scale along an axis has no slot for each element
        if name in self.same:
            return self.elements(self.same[name])
        if name in self.moved:
            source, move = self.moved[name]
            found = self.elements(source)
            if found is None:
                return None
            return self.seen.setdefault(name, move(found))
        constant = self.table.graph.constants.get(name)
        if constant is None:
            return None
        shape = constant.weight.shape
        axes = tuple(axis for axis, extent in enumerate(shape) if extent > 1)
        return self.table.born(name, shape, axes)

    def classes(self, f: IntArray) -> IntArray:
        """Classes of a field, as the last pass knew them."""
        return self.table.classes(f)

    def hard_rows(self, f: IntArray) -> tuple[int, ...] | None:
        """Row axes of a grid where use settles them."""
        labels = self.table.classes(f)
        known = np.abs(labels) < self.signature.size
        return known_rows(labels, self.signature) if known.all() else None


def content(labels: IntArray) -> bytes:
    """Identity of a field by its labels and the axes that vary, whatever its rank."""
    shape = tuple(size for size in labels.shape if size > 1)
    return repr(shape).encode() + np.ascontiguousarray(labels).tobytes()
