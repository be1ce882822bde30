"""Orders to end, put off while something must not be broken off half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ORDERS = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not everywhere


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Run the block to its end; an order to end that comes meanwhile is followed behind it.

    A second order is followed at once, so that a block that hangs can be left. Signals reach the
    main thread only: in any other the block just runs. A signal that nobody handles in Python
    keeps what it does.
    """
    held: dict[int, Callable[[int, FrameType | None], Any]] = {}
    waiting: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            held[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for name in _ORDERS:
            number = getattr(signal, name, None)
            handler = None if number is None else signal.getsignal(number)
            if number is not None and callable(handler):
                held[number] = handler
                signal.signal(number, later)
    try:
        yield
    finally:
        for number, handler in held.items():
            if signal.getsignal(number) is later:  # else it was followed, and others set since
                signal.signal(number, handler)
        if len(waiting) == 1:
            held[waiting[0]](waiting[0], None)
