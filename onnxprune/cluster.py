"""Items of work in a Dask cluster. Importing this module needs Dask: ``jobs`` does it when asked.

What the workers need travels as a worker plugin: once to each of them, also to those that join
later or take the place of one that died.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4

from distributed import Client, KilledWorker, WorkerPlugin, as_completed, get_worker

from onnxprune.errors import UsageError, VerificationError

_CONNECT_SECONDS = 15
_RETRIES = 3  # of an item whose worker died, besides what the scheduler allows


class StudyPlugin(WorkerPlugin):
    """Carries a study to a worker, and does its items there, one at a time."""

    def __init__(self, study: Any) -> None:
        self.study = study
        self.threads = 1
        self._work: Callable[[int], object] | None = None
        self._lock: threading.Lock | None = None

    def setup(self, worker: Any) -> None:
        """Called by Dask on the worker."""
        self.threads = worker.state.nthreads
        self._lock = threading.Lock()

    def do(self, item: int) -> object:
        """Do one item with all threads of the worker; the first sets up."""
        assert self._lock is not None
        with self._lock:
            if self._work is None:
                self._work = self.study.open(self.threads)
            return self._work(item)


def _do(name: str, item: int) -> object:
    return get_worker().plugins[name].do(item)


def in_cluster(study: Any, items: Sequence[int], address: str) -> Iterator[tuple[int, Any]]:
    """Do every item on the workers of a Dask scheduler; results in the order they are ready.

    Raises:
        UsageError: The scheduler cannot be reached, or has no worker.
        VerificationError: Workers died again and again.
    """
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot reach the Dask scheduler at '{address}'", hint="--scheduler tcp://HOST:8786"
        ) from error
    name = f"onnxprune-{uuid4()}"
    with client:
        if not client.scheduler_info()["workers"]:
            raise UsageError(
                f"the Dask scheduler at '{address}' has no worker", hint=f"dask worker {address}"
            )
        client.register_plugin(StudyPlugin(study), name=name)
        futures = []
        try:
            futures += [
                client.submit(_do, name, item, pure=False, retries=_RETRIES) for item in items
            ]
            number = {future.key: item for future, item in zip(futures, items, strict=True)}
            for future in as_completed(futures, loop=client.loop):
                yield number[future.key], future.result()
        except KilledWorker as error:
            raise VerificationError(
                "workers died again and again at the same item, perhaps for want of memory",
                hint="--resume goes on from here",
            ) from error
        finally:
            client.cancel(futures)
            client.unregister_worker_plugin(name)
