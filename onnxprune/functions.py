"""A user's own function, given as ``path.py:function``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from onnxprune.errors import UsageError


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function and the text it comes from, so that another process can have it too.

    Attributes:
        path: File it was read from, for messages.
        name: Its name there.
        source: Text of the file.
    """

    path: str
    name: str
    source: str

    @classmethod
    def read(cls, spelled: str) -> UserFunction:
        """Read ``path.py:function``.

        Raises:
            UsageError: There is no such file, or it cannot be run, or has no such function.
        """
        path, colon, name = spelled.rpartition(":")
        if not colon or not path.endswith(".py") or not name.isidentifier():
            raise UsageError(f"'{spelled}' is not path.py:function")
        try:
            source = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"cannot read '{path}': {reason}") from error
        made = cls(path, name, source)
        made.load()
        return made

    def load(self) -> Callable[..., object]:
        """Run the file, the first time, and give the function."""
        found = _space(self.path, self.source).get(self.name)
        if not callable(found):
            raise UsageError(f"'{self.path}' has no function '{self.name}'")
        return found


@cache
def _space(path: str, source: str) -> dict[str, object]:
    """Names that a file defines; it is run once."""
    space: dict[str, object] = {"__name__": "onnxprune_user", "__file__": path}
    try:
        exec(compile(source, path, "exec"), space)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"'{path}' cannot be run: {what}") from error
    return space
