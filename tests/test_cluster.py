"""A Ray cluster: whatever becomes of its actors and nodes, the store is that of one process."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import picture

from micl_zoo import __version__
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import Interrupted, MiclZooError, SourceError, StoreError, UsageError
from micl_zoo.extraction import cluster, engines
from micl_zoo.extraction.cluster import Cluster, Embedder, _connect, _cores_a_gpu, _cores_a_process
from micl_zoo.extraction.engines import Job
from micl_zoo.extraction.extract import extract
from micl_zoo.extraction.options import ExtractOptions
from micl_zoo.extraction.runner import Event
from micl_zoo.extraction.work import Work
from micl_zoo.stores.store import Store, open_store

# What older Ray leaves open: the logs of its processes, and those until they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file .*/ray/session_:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
NODE = {"num_gpus": 0, "object_store_memory": 80 << 20}
SMALL: dict[str, Any] = {"shard_rows": 6, "batch_size": 3, "workers": 1, "precision": "fp32"}

JOB = Job(ExtractOptions(model="vit_ti16"), backend="torch", precision="fp32", batch_size=3, workers=1)


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


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command of every process below this one."""
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if folder.name.isdecimal():
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(folder.name)] = (parent, (folder / "cmdline").read_text())

    def below(number: int) -> bool:
        return number == os.getpid() or (number in found and below(found[number][0]))

    return {number: named for number, named in found.items() if below(number)}


def actors() -> list[int]:
    return [number for number, (_, name) in processes().items() if name.startswith("ray::Embedder")]


@pytest.fixture
def at_first(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has something done at the first batch, or as soon as a first shard is finished."""
    inner = Cluster.run

    def plan(act: Callable[[], None], *, shard: bool = True) -> None:
        def run(self: Cluster, job: Job, encoder: Encoder, store: Store, work: Work) -> Iterator[Event]:
            waiting = True
            for event in inner(self, job, encoder, store, work):
                yield event
                if waiting and event.finished == shard:
                    waiting = False
                    act()

        monkeypatch.setattr(Cluster, "run", run)

    return plan


@linux
def test_actors_that_are_killed_leave_the_store_of_one_process(
    nodes: Any, pictures: Path, encoder_folder: Path, whole: dict[str, bytes], tmp_path: Path, at_first: Any
) -> None:
    decoding: list[Path] = []

    def kill_all() -> None:
        running = actors()
        decoding.extend(Path(f"/proc/{number}") for number, (parent, _) in processes().items() if parent in running)
        for actor in running:
            os.kill(actor, signal.SIGKILL)

    at_first(kill_all)
    summary = extract(pictures, tmp_path / "s", weights=encoder_folder, engine="ray", processes=2, **SMALL)
    assert files(tmp_path / "s") == whole
    assert summary.devices == ["cpu", "cpu"]
    assert (summary.embedded, summary.refused, summary.failed) == (100, 1, {})
    assert decoding
    deadline = time.monotonic() + 20
    while any(process.exists() for process in decoding):  # they end with their actors
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stop_keeps_the_beginning_of_a_shard_and_one_process_goes_on(
    nodes: Any, pictures: Path, encoder_folder: Path, tmp_path: Path, at_first: Any
) -> None:
    one_shard = SMALL | {"shard_rows": 1000, "weights": encoder_folder}
    at_first(lambda: os.kill(os.getpid(), signal.SIGTERM), shard=False)
    with pytest.raises(Interrupted, match="run the same command to go on"):
        extract(pictures, tmp_path / "s", engine="ray", **one_shard)
    begun = open_store(tmp_path / "s").beginning(0)
    assert begun is not None
    assert 0 < begun.images < 101
    assert extract(pictures, tmp_path / "s", **one_shard).computed == 101 - begun.images
    extract(pictures, tmp_path / "other", **one_shard)
    assert files(tmp_path / "s") == files(tmp_path / "other")


@pytest.mark.slow
def test_what_was_refused_is_tried_again_on_a_cluster(
    nodes: Any, pictures: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    folder, out = Path(shutil.copytree(pictures, tmp_path / "in")), tmp_path / "s"
    (folder / "011.jpg").rename(tmp_path / "away.jpg")
    (folder / "011.jpg").symlink_to(tmp_path / "mount.jpg")
    extract(folder, out, weights=encoder_folder, **SMALL)
    (tmp_path / "away.jpg").rename(tmp_path / "mount.jpg")
    summary = extract(folder, out, weights=encoder_folder, engine="ray", processes=2, **SMALL)
    assert (summary.tried_again, summary.recovered, summary.embedded, summary.refused) == (1, 1, 100, 1)
    extract(folder, tmp_path / "other", weights=encoder_folder, **SMALL)
    assert files(out) == files(tmp_path / "other")


@pytest.mark.slow
def test_a_node_that_is_lost(
    nodes: Any, pictures: Path, encoder_folder: Path, whole: dict[str, bytes], tmp_path: Path, at_first: Any
) -> None:
    node = nodes.add_node(**NODE, num_cpus=1)
    at_first(lambda: nodes.remove_node(node, allow_graceful=False))
    summary = extract(pictures, tmp_path / "s", weights=encoder_folder, engine="ray", **SMALL)
    assert summary.devices == ["cpu", "cpu"]
    assert files(tmp_path / "s") == whole


@linux
@pytest.mark.slow
def test_an_actor_that_hangs(
    nodes: Any,
    pictures: Path,
    encoder_folder: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    at_first: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped: list[int] = []

    def freeze() -> None:
        stopped.extend(actors())
        for actor in stopped:
            os.kill(actor, signal.SIGSTOP)

    monkeypatch.setattr(engines, "HANG", 0.05)
    at_first(freeze)
    extract(pictures, tmp_path / "s", weights=encoder_folder, engine="ray", processes=1, **SMALL)
    assert stopped
    assert files(tmp_path / "s") == whole


@pytest.mark.slow
def test_an_actor_says_what_is_wrong(
    nodes: Any, pictures: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "__version__", "0.0.0")
    with pytest.raises(MiclZooError, match=r"node .* has micl-zoo .*, not 0\.0\.0: install the same on all nodes"):
        extract(pictures, tmp_path / "s", weights=encoder_folder, engine="ray", **SMALL)


def test_a_node_that_does_not_see_what_it_must(tmp_path: Path) -> None:
    pytest.importorskip("ray")

    def said(location: Path, witness: str) -> object:
        return next(Embedder(JOB, "cpu", str(location), witness, __version__).events())

    unseen = said(tmp_path, "")
    assert isinstance(unseen, StoreError)
    assert re.match(r"node .* does not see the store: .* has no manifest\.json\. All nodes must see it", str(unseen))
    unseen = said(tmp_path, str(tmp_path / "gone"))
    assert isinstance(unseen, SourceError)
    assert re.match(r"node .* does not see the source: it has no folder '.*gone'", str(unseen))


@pytest.mark.parametrize(
    ("hosts", "processes", "cores"),
    [
        ([8, 2], None, [8, 2]),
        ([8, 8], 2, [8, 8]),
        ([8, 8], 3, [4, 4, 4]),
        ([8, 2], 5, [2] * 5),
        ([1, 1], 3, [0.5] * 3),
    ],
)
def test_cores_are_shared_evenly(hosts: list[int], processes: int | None, cores: list[float]) -> None:
    assert _cores_a_process([{"CPU": count} for count in hosts], processes) == cores


def test_a_gpu_has_its_share_of_the_cores() -> None:
    hosts: list[dict[str, float]] = [{"CPU": 16, "GPU": 2}, {"CPU": 9, "GPU": 1}]
    assert _cores_a_gpu(hosts, None) == [8, 8, 9]
    assert _cores_a_gpu(hosts, 1) == [8]
    assert _cores_a_gpu(hosts, 4) == [8, 8, 9, 8]
    there = Cluster(["cuda"] * 3, [8, 8, 9], ["a", "b"], joined=False)
    assert str(there) == "3 GPUs of a Ray cluster of 2 nodes"
    assert (there.kind, there.threads, there.precision("fp16")) == ("cuda", 0, "fp16")
    assert [there.workers(wanted) for wanted in (None, 0, 1, 6)] == [9, 0, 1, 4]
    assert there.asks(2)["num_gpus"] == 1


def test_a_process_has_what_its_node_gives() -> None:
    there = Cluster(["cpu"] * 2, [8, 2], ["a", "b"], joined=False)
    job = replace(JOB, threads=there.threads, workers=there.workers(None))
    assert [(there.part(job, place).threads, there.part(job, place).workers) for place in (0, 1)] == [(8, 8), (2, 2)]
    assert str(there) == "2 processes of a Ray cluster of 2 nodes"


def test_clusters_that_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MiclZooError, match=r"needs Ray: pip install 'micl-zoo\[ray\]'"):
        Cluster.join(None, None)
    with pytest.raises(UsageError, match=r"is an address of the Ray client, .* run this on a node of the cluster"):
        _connect(None, "ray://head:10001")
