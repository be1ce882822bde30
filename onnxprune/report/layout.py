"""How reports for people are laid out: tables, lines, numbers and names."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 1 << 16  # columns where nobody says how wide the page is: what reads it may wrap
_SPARED = 60  # characters of a name before it is shortened


def console(*, terminal: bool) -> Console:
    """Where tables go: stdout."""
    return Console(width=None if terminal else _PIPE_WIDTH, highlight=False, soft_wrap=False)


def new_table(*columns: str) -> Table:
    """A table without lines; a column that starts with ``>`` is set to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
    return table


def text_line(text: str) -> Text:
    """One line, folded where the page ends."""
    return Text(text, overflow="fold")


def number(value: float) -> str:
    """A count in three digits: 25.6 M."""
    for unit in ("", " k", " M", " G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def byte_size(value: float) -> str:
    """Bytes in three digits: 25.6 MB."""
    text = number(value)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def share(value: float | None) -> str:
    """A share in per cent; none as a dash."""
    return "–" if not value else f"{100 * value:.1f} %"


def became(old: str, new: str) -> str:
    """Old and new, once where they are the same."""
    return old if old == new else f"{old} → {new}"


def all_names(names: Sequence[str]) -> str:
    """Every name."""
    return ", ".join(names) or "–"


def some_names(names: Sequence[str]) -> str:
    """The first name, shortened, and how many more there are."""
    if not names:
        return "–"
    first = names[0] if len(names[0]) <= _SPARED else "…" + names[0][-_SPARED:]
    return first if len(names) == 1 else f"{first} (+{len(names) - 1})"


def counted_layers(count: int) -> str:
    """So many layers, in words."""
    return f"{count} layer{'s' if count != 1 else ''}"
