"""Independent items of work: in this process, in processes of this machine, or in a Dask cluster.

The study (model, data, options) goes to each worker once; an item is a number, and what comes back
is small. A worker that dies costs the item it was at, which another one then does.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Protocol, TypeVar

from onnxprune.errors import MissingExtraError, VerificationError
from onnxprune.runtime import usable_cores

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Study(Protocol[R_co]):
    """What a worker needs; it is pickled on its way there."""

    def open(self, threads: int | None) -> Callable[[int], R_co]:
        """Set up, once in each worker; the result does one item."""


def each(
    study: Study[R], items: Sequence[int], *, jobs: int = 1, scheduler: str | None = None
) -> Iterator[tuple[int, R]]:
    """Do every item; results in the order they are ready.

    Args:
        study: What is done.
        items: Numbers it knows.
        jobs: Processes on this machine, which share its cores; 1 is this process.
        scheduler: Address of a Dask scheduler, whose workers do it instead.

    Raises:
        MissingExtraError: Dask is not installed.
        UsageError: The scheduler cannot be reached, or has no worker.
        VerificationError: Workers died again and again.
    """
    if scheduler is not None:
        yield from _in_cluster(study, items, scheduler)
    elif jobs > 1 and len(items) > 1:
        yield from _in_processes(study, items, min(jobs, len(items)))
    elif items:
        work = study.open(None)
        yield from ((item, work(item)) for item in items)


# -- processes -------------------------------------------------------------------------------------

_opened: list[Callable[[int], object]] = []  # what this process was started for


def _start(study: Study[object], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends it without a traceback
    _opened[:] = [study.open(threads)]


def _do(item: int) -> object:
    return _opened[0](item)


def _in_processes(study: Study[R], items: Sequence[int], jobs: int) -> Iterator[tuple[int, R]]:
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    threads = max(1, usable_cores() // jobs)
    # Threads of the runtime do not survive a fork, so processes are started afresh.
    pool = ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_start, initargs=(study, threads)
    )
    try:
        futures = {pool.submit(_do, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()  # type: ignore[misc]  # what study gives
    except BrokenProcessPool as error:
        raise VerificationError(
            "a worker process died, perhaps for want of memory",
            hint="--resume goes on from here; try fewer --jobs",
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# -- Dask ------------------------------------------------------------------------------------------


def check_cluster() -> None:
    """Refuse, before any work is done, where Dask is not installed.

    Raises:
        MissingExtraError: It is not.
    """
    if find_spec("distributed") is None:
        raise MissingExtraError("--scheduler needs Dask", hint="pip install 'onnxprune[dask]'")


def _in_cluster(study: Study[R], items: Sequence[int], address: str) -> Iterator[tuple[int, R]]:
    check_cluster()
    from onnxprune.cluster import in_cluster

    return in_cluster(study, items, address)
