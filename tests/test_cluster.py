"""A Ray cluster: whatever becomes of its actors and nodes, the store is that of one process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from micl_zoo.cluster import Cluster
from micl_zoo.encoder import Encoder
from micl_zoo.engines import Engine, Job, Work
from micl_zoo.errors import Interrupted
from micl_zoo.extract import extract
from micl_zoo.runner import Event
from micl_zoo.store import Store, open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the end of the process
    pytest.mark.filterwarnings("ignore:.*accelerator visible devices:FutureWarning:ray"),
]
NODE = {"num_gpus": 0, "object_store_memory": 80 << 20}
SMALL: dict[str, Any] = {"shard_rows": 6, "batch_size": 3, "workers": 1, "precision": "fp32"}


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of one node with two cores, which this process has joined."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    nodes = Nodes()
    nodes.add_node(**NODE, num_cpus=2, include_dashboard=False)
    ray.init(nodes.address, **quiet)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import picture

    folder = tmp_path_factory.mktemp("pictures")
    for number in range(100):
        picture(number, 40 + number % 9, 44).save(folder / f"{number:03d}.jpg")
    (folder / "050-bad.jpg").write_bytes(b"no")
    return folder


@pytest.fixture(scope="module")
def whole(pictures: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that one process makes."""
    out = tmp_path_factory.mktemp("whole") / "s"
    extract(pictures, out, weights=encoder_folder, **SMALL)
    return files(out)


def actors() -> list[int]:
    """Processes of actors below this one."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (folder / "cmdline").exists():
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()

    def below(number: int) -> bool:
        return number == os.getpid() or (number in parents and below(parents[number]))

    return [number for number, name in names.items() if "Embedder" in name and below(number)]


@pytest.fixture
def after_first_shard(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something done as soon as a first shard is finished."""

    inner = Cluster.engine

    def plan(act: Callable[[], None]) -> None:
        def engine(self: Cluster, job: Job, encoder: Encoder) -> Engine:
            def run(store: Store, work: Work, stop: Callable[[], bool]) -> Iterator[Event]:
                waiting = True
                for event in inner(self, job, encoder)(store, work, stop):
                    yield event
                    if waiting and event.finished:
                        waiting = False
                        act()

            return run

        monkeypatch.setattr(Cluster, "engine", engine)

    return plan


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_an_actor_killed_and_a_stop_leave_the_store_of_one_process(
    nodes: Any, pictures: Path, encoder_folder: Path, whole: dict[str, bytes], tmp_path: Path, after_first_shard: Any
) -> None:
    def kill() -> None:
        os.kill(actors()[0], signal.SIGKILL)

    after_first_shard(kill)
    summary = extract(pictures, tmp_path / "s", weights=encoder_folder, engine="ray", processes=2, **SMALL)
    assert files(tmp_path / "s") == whole
    assert summary.devices == ["cpu", "cpu"]
    assert (summary.embedded, summary.refused, summary.failed) == (100, 1, {})


@pytest.mark.slow
def test_stopped_and_gone_on_with_a_node_that_is_lost(
    nodes: Any, pictures: Path, encoder_folder: Path, whole: dict[str, bytes], tmp_path: Path, after_first_shard: Any
) -> None:
    after_first_shard(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="run the same command to go on"):
        extract(pictures, tmp_path / "s", weights=encoder_folder, engine="ray", **SMALL)
    assert 0 < len(open_store(tmp_path / "s").done()) < 17
    assert list((tmp_path / "s").glob(".beginning-*"))
    node = nodes.add_node(**NODE, num_cpus=1)
    after_first_shard(lambda: nodes.remove_node(node, allow_graceful=False))
    summary = extract(pictures, tmp_path / "s", weights=encoder_folder, engine="ray", **SMALL)
    assert summary.devices == ["cpu", "cpu"]
    assert files(tmp_path / "s") == whole
