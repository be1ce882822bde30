"""Items of work in processes and in a Dask cluster, a worker dying on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import onnxprune
from onnxprune import curves, jobs
from onnxprune.errors import MissingExtraError, UsageError, VerificationError
from onnxprune.jobs import each
from tests.small import MODELS

RESNET = MODELS / "fashion_resnet.onnx"


@dataclass(frozen=True)
class Squares:
    """A study that notes who did what; ``deadly`` items kill whoever tries them first."""

    folder: Path
    deadly: tuple[int, ...] = ()

    def open(self, threads: int | None) -> Callable[[int], int]:
        (self.folder / f"opened-{os.getpid()}").touch()
        return self._do

    def _do(self, item: int) -> int:
        tried = self.folder / f"tried-{item}"
        if item in self.deadly and not tried.exists():
            tried.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return item * item

    @property
    def opened(self) -> int:
        return len(list(self.folder.glob("opened-*")))


def test_one_job_works_here(tmp_path: Path) -> None:
    assert dict(each(Squares(tmp_path), [1, 2])) == {1: 1, 2: 4}
    assert (tmp_path / f"opened-{os.getpid()}").exists()


def test_each_process_opens_the_study_once(tmp_path: Path) -> None:
    study = Squares(tmp_path)
    assert dict(each(study, range(8), jobs=2)) == {n: n * n for n in range(8)}
    assert 1 <= study.opened <= 2
    assert not (tmp_path / f"opened-{os.getpid()}").exists()


def test_process_that_dies_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="a worker process died") as caught:
        dict(each(Squares(tmp_path, deadly=(3,)), range(8), jobs=2))
    assert "--resume" in str(caught.value)


def test_two_processes_find_what_one_finds() -> None:
    one = onnxprune.sensitivity(RESNET, ratios=(0.3, 0.6))
    two = onnxprune.sensitivity(RESNET, ratios=(0.3, 0.6), jobs=2)
    assert len(one.groups) == len(two.groups) == 9
    for a, b in zip(one.groups, two.groups, strict=True):
        assert a.groups == b.groups
        assert [p.loss for p in a.points] == pytest.approx([p.loss for p in b.points], rel=1e-4)


def test_without_dask_a_scheduler_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"onnxprune\[dask\]"):
        onnxprune.sensitivity(RESNET, scheduler="tcp://127.0.0.1:1")


# -- Dask ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> object:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as made:
        yield made


def test_killed_worker_costs_nothing_but_time(cluster: object, tmp_path: Path) -> None:
    study = Squares(tmp_path, deadly=(5, 11))
    found = dict(each(study, range(16), scheduler=cluster.scheduler_address))  # type: ignore[attr-defined]
    assert found == {n: n * n for n in range(16)}
    assert (tmp_path / "tried-5").exists()
    assert 3 <= study.opened <= 6  # the two at first, and one in the place of each that died


def test_cluster_finds_what_one_process_finds(cluster: object) -> None:
    address = cluster.scheduler_address  # type: ignore[attr-defined]
    here = onnxprune.sensitivity(RESNET, ratios=(0.5,))
    there = onnxprune.sensitivity(RESNET, ratios=(0.5,), scheduler=address)
    assert [e.groups for e in there.groups] == [e.groups for e in here.groups]
    losses = [[e.points[0].loss for e in found.groups] for found in (here, there)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_worker_killed_in_the_middle_leaves_the_result_complete_and_right(
    cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, killed = curves.write, list[int]()

    def write_and_kill(path: Path, found: curves.Sensitivity) -> None:
        plain(path, found)
        if not killed:
            killed.append(next(iter(cluster.workers.values())).pid)  # type: ignore[attr-defined]
            os.kill(killed[0], signal.SIGKILL)

    here = onnxprune.sensitivity(RESNET, ratios=(0.3, 0.5))
    monkeypatch.setattr(curves, "write", write_and_kill)
    there = onnxprune.sensitivity(
        RESNET,
        ratios=(0.3, 0.5),
        scheduler=cluster.scheduler_address,  # type: ignore[attr-defined]
        output=tmp_path / "s.json",
    )
    assert len(killed) == 1
    assert there.complete
    assert [e.groups for e in there.groups] == [e.groups for e in here.groups]
    for a, b in zip(here.groups, there.groups, strict=True):
        assert [p.loss for p in a.points] == pytest.approx([p.loss for p in b.points], rel=1e-4)


def test_scheduler_that_is_not_there_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = pytest.importorskip("onnxprune.cluster")
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 1)
    with pytest.raises(UsageError, match="cannot reach the Dask scheduler"):
        onnxprune.sensitivity(RESNET, scheduler="tcp://127.0.0.1:1")
