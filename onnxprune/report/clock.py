"""How long each stage took, how much memory there ever was, and what was warned of."""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = (
    "load", "prepare", "analyse", "time", "score", "select", "rewrite", "restore", "verify", "save"
)  # fmt: skip
Progress = Callable[[str], None]


@dataclass
class Clock:
    """Wall-clock seconds by stage; ``progress`` hears of every stage that begins."""

    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; the same stage may come again."""
        if self.progress is not None:
            self.progress(name)
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def step(self, done: int, of: int, what: str) -> None:
        """Tell how far the stage that runs has come."""
        if self.progress is not None:
            self.progress(f"restore {done + 1}/{of} {what}")


class Heard(logging.Handler):
    """Collects the warnings of the package while it is entered, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Remember one warning."""
        message = record.getMessage()
        if message not in self.messages:
            self.messages.append(message)

    def __enter__(self) -> Heard:
        logging.getLogger("onnxprune").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("onnxprune").removeHandler(self)


def peak_memory() -> int:
    """Most bytes the process ever had in memory, 0 where the system does not say."""
    if sys.platform == "win32":
        return _windows_peak()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _MemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of the Windows API."""

    _fields_ = [
        ("cb", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_working_set", ctypes.c_size_t),
        *((name, ctypes.c_size_t) for name in "abcdefg"),
    ]


def _windows_peak() -> int:
    counters = _MemoryCounters(cb=ctypes.sizeof(_MemoryCounters))
    windows = getattr(ctypes, "windll", None)
    if windows is None:
        return 0
    process = ctypes.c_void_p(windows.kernel32.GetCurrentProcess())
    known = windows.kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return int(counters.peak_working_set) if known else 0
