"""A Ray cluster embeds the shards: an actor for each process that runs the model, on the nodes that have room for it.

Ray starts the actors, notices those that are lost with their process or their node, and starts others where there is
room again. Which shard is whose is decided here, as it is for processes on one machine (see `engines`). So the parts
are the same however many nodes there are and whatever becomes of them.

Every node reads the source and writes the store by itself; nothing but progress passes through this process. Both must
be where all nodes see them: on object storage, with the nodes' own credentials, or in the same place of a file system
that they share. All nodes need the same micl-zoo.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from logging import getLogger
from math import ceil
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..encoders.device import MAX_WORKERS, Precision, resolve_precision, usable_cores
from ..encoders.encoder import Encoder
from ..errors import MiclZooError, SourceError, StoreError, UsageError
from ..files import Folder
from ..sources.index import ImageIndex
from ..stores.store import Store, open_store
from .engines import AHEAD, HANG, STARTS, Engine, Job, Work
from .runner import Event

TELL_SECONDS = 0.25  # between two messages of an actor: of a thousand actors, 4,000 a second come here
ASK_SECONDS = 120.0  # for a node to start a process and say what its hardware can do
ROOM_SECONDS = 60.0  # without a process at work, after which a person is told what Ray was asked for
OBJECT_STORE = 100 << 20  # bytes, of a cluster that is started here: Ray's least is 75 MiB, and only progress passes

logger = getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what the processes that run the model take of it.

    Attributes:
        devices: one name a process, "cuda" or "cpu".
        cores: of each process, which Ray keeps for it.
        nodes: ids of those that can hold such a process.
        joined: for this run alone, which leaves it, or ends it where it was started for that.
    """

    devices: list[str]
    cores: list[float]
    nodes: list[str]
    joined: bool

    @classmethod
    def join(cls, address: str | None, processes: int | None) -> Cluster:
        """Join a cluster, or start one on this machine.

        Args:
            address: host:port; "auto" is the cluster that RAY_ADDRESS names or that this machine belongs to, and None
                starts one where there is none. Where this process is in a cluster already, it is that one.
            processes: that run the model. None is one a GPU or, where there are none, one a node. More than there are
                GPUs wait for nodes that come later; on processors they share the cores.

        Raises:
            MiclZooError: Ray is not installed, or there is no such cluster, or it has no processors.
            UsageError: the address is one of the Ray client.
        """
        ray = _ray()
        joined = not ray.is_initialized()
        if joined:
            _connect(ray, address)
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        kind, unit = ("cuda", "GPU") if any(node.get("GPU", 0) >= 1 for node in alive.values()) else ("cpu", "CPU")
        hosts = {name: node for name, node in alive.items() if node.get(unit, 0) >= 1}
        if not hosts:
            raise MiclZooError("the Ray cluster has neither GPUs nor processors to give: see `ray status`")
        cores = (_cores_a_gpu if kind == "cuda" else _cores_a_process)(list(hosts.values()), processes)
        return cls([kind] * len(cores), cores, list(hosts), joined)

    @property
    def kind(self) -> str:
        """ "cuda" or "cpu"."""
        return self.devices[0]

    @property
    def several(self) -> bool:
        """The model runs in processes of its own, even if it is one."""
        return True

    @property
    def threads(self) -> int:
        """Of the process with the most cores; 0, which leaves torch's default, on GPUs."""
        return max(1, int(max(self.cores))) if self.kind == "cpu" else 0

    def precision(self, wanted: Precision) -> str:
        """That all nodes run in; "auto" asks each, and is bf16 where all of them compute it fast.

        Raises:
            UsageError: a precision that does not exist.
            MiclZooError: a node cannot tell.
        """
        if wanted != "auto":
            return resolve_precision(wanted, torch.device(self.kind))[1]
        ray = _ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(_fast_precision)
        share = 0.01 if self.kind == "cuda" else 0  # of a GPU: enough to see it, and there is room for it at once
        there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in self.nodes]
        asked = [task.options(num_cpus=0, num_gpus=share, scheduling_strategy=node).remote(self.kind) for node in there]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ASK_SECONDS)
        if not answered:
            raise MiclZooError(
                f"no node of the Ray cluster has answered in {ASK_SECONDS:g} s: see `ray status` for what is free"
            )
        try:
            return "bf16" if set(ray.get(answered)) == {"bf16"} else "fp32"
        except ray.exceptions.RayError as error:
            raise MiclZooError(f"a node of the Ray cluster cannot run micl-zoo {__version__}: {_text(error)}") from None

    def workers(self, wanted: int | None) -> int:
        """Processes that decode, for each that runs the model; for one with fewer cores than others it is fewer."""
        if wanted is None:
            return min(MAX_WORKERS, max(1, int(max(self.cores))))
        return min(wanted, ceil(wanted * len(self.nodes) / len(self.devices)))

    def engine(self, job: Job, encoder: Encoder) -> Engine:
        """What embeds the shards; this process has the encoder only to know what it is."""
        return lambda store, work, stop: _Crew(self, job, store, work).run(stop)

    def asks(self, place: int) -> dict[str, Any]:
        """What Ray must have free for a process. They are spread, so that no node reads and decodes for all."""
        gpus = 1 if self.kind == "cuda" else 0
        return {"num_cpus": self.cores[place], "num_gpus": gpus, "scheduling_strategy": "SPREAD"}

    def part(self, job: Job, place: int) -> Job:
        """The job of one process, cut to its cores."""
        own, most = (max(1, int(cores)) for cores in (self.cores[place], max(self.cores)))
        return replace(job, threads=own if job.threads else 0, workers=ceil(job.workers * own / most))

    def __str__(self) -> str:
        count, nodes = len(self.devices), len(self.nodes)
        what = "GPU" if self.kind == "cuda" else "process"
        many = ("s" if self.kind == "cuda" else "es") * (count > 1)
        return f"{count} {what}{many} of a Ray cluster of {nodes} node{'s' * (nodes > 1)}"


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MiclZooError("--engine ray needs Ray: pip install 'micl-zoo[ray]'") from None
    return ray


def _connect(ray: Any, address: str | None) -> None:
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    if "://" in where:
        raise UsageError(
            f"{where!r} is an address of the Ray client, which passes no progress on: run this on a node of the "
            "cluster with --address auto, or by `ray job submit`"
        )
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(where, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if where == "auto" and not address and isinstance(error, ConnectionError):
            ray.init("local", num_cpus=usable_cores(), object_store_memory=OBJECT_STORE, **quiet)
            return
        raise MiclZooError(
            f"cannot join the Ray cluster at {where!r}: {_text(error)} `ray start` makes this machine a node of it; "
            "without --address, and where no cluster runs, one of this machine alone is started."
        ) from None


def _cores_a_gpu(hosts: list[dict[str, float]], processes: int | None) -> list[float]:
    """Of each process: a node's cores, shared evenly by its GPUs."""
    cores = [host.get("CPU", 0) // int(host["GPU"]) for host in hosts for _ in range(int(host["GPU"]))]
    return [cores[place % len(cores)] for place in range(processes or len(cores))]


def _cores_a_process(hosts: list[dict[str, float]], processes: int | None) -> list[float]:
    """Of each process: all of a node or, for a number of processes, as many as leave room for all of them."""
    counts = [int(host["CPU"]) for host in hosts]
    if processes is None:
        return [float(count) for count in counts]
    if processes > sum(counts):
        return [1 / ceil(processes / sum(counts))] * processes
    fitting = [cores for cores in range(1, max(counts) + 1) if sum(count // cores for count in counts) >= processes]
    return [float(fitting[-1])] * processes


def _fast_precision(kind: str) -> str:
    """Of the node that this runs on."""
    return resolve_precision("auto", torch.device(kind))[1]


def _text(error: BaseException) -> str:
    """What happened, in a line: of an exception in another process, its own last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    because = [line for line in lines if line.startswith("The actor is dead because")]
    return (because or lines[-1:])[0][:300]


class Embedder:
    """The life of an actor: shards in, events out, until it is dismissed.

    Orders come in a thread of their own (Ray's concurrency group "orders") while `events` is at work, so that the
    next shard is being decoded while one is finished.
    """

    def __init__(self, job: Job, device: str, location: str, witness: str, version: str) -> None:
        """Know what to do, and begin with nothing.

        Args:
            job, device: what to embed with.
            location: of the store.
            witness: a folder of the source, to be seen from here as well; "" where there is none to see.
            version: of micl-zoo where the run was started.
        """
        self.job, self.device, self.location, self.witness, self.version = job, device, location, witness, version
        self.shards: deque[int] = deque()
        self.dismissed = False

    def give(self, shard: int) -> None:
        """One more shard to do."""
        self.shards.append(shard)

    def dismiss(self) -> None:
        """Keep what there is of unfinished shards, and leave."""
        self.dismissed = True

    def events(self) -> Iterator[str | list[Event] | MiclZooError]:
        """The id of the node when the model is loaded, then what happens; an error that others would meet as well."""
        import ray

        try:
            store, encoder = self._store(), self.job.encoder(self.device)
            with self.job.runner(encoder) as runner:
                yield str(ray.get_runtime_context().get_node_id())
                held, told = list[Event](), time.monotonic()
                for event in runner.run(store, self._given(), lambda: self.dismissed):
                    held.append(event)
                    if event.finished or time.monotonic() - told > TELL_SECONDS:
                        yield held
                        held, told = [], time.monotonic()
            yield held
        except MiclZooError as error:
            yield error

    def _given(self) -> Iterator[int | None]:
        while not self.dismissed:
            yield self.shards.popleft() if self.shards else None

    def _store(self) -> Store:
        node = f"node {platform.node()} of the Ray cluster"
        if self.version != __version__:
            raise MiclZooError(f"{node} has micl-zoo {__version__}, not {self.version}: install the same on all nodes")
        remedy = "All nodes must see it in the same place: on a file system that they share, or on object storage."
        if self.witness and not Path(self.witness).is_dir():
            raise SourceError(f"{node} does not see the source: it has no folder {self.witness!r}. {remedy}")
        try:
            return open_store(Folder(self.location))
        except (StoreError, OSError) as error:
            raise StoreError(f"{node} does not see the store: {error}. {remedy}") from None


class _Actor:
    """An actor as it is known here, and the shards that it was given and has not finished, in order.

    Attributes:
        node: that it is on; "" until it has loaded its model.
        left: it does no more.
        dismissed: it was told to leave.
        since: when it was last heard of, or was given work when it had none (monotonic seconds).
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.stream = handle.events.options(num_returns="streaming").remote()
        self.node = ""
        self.shards: list[int] = []
        self.left = self.dismissed = False
        self.since = time.monotonic()

    def feed(self, take: Callable[[], int | None]) -> None:
        """Give it shards, so that it always knows the next; none before it can work."""
        while self.node and len(self.shards) < AHEAD and (shard := take()) is not None:
            self.since = self.since if self.shards else time.monotonic()
            self.shards.append(shard)
            self.handle.give.options(concurrency_group="orders").remote(shard)

    def dismiss(self) -> None:
        """Tell it to keep what it has and to leave; one that has not come to work need not come."""
        if self.node and not self.dismissed:
            self.handle.dismiss.options(concurrency_group="orders").remote()
        self.left |= not self.node
        self.dismissed = True

    def hear(self, ray: Any) -> Iterator[Event]:
        """The next that it has said.

        Raises:
            RayError: it is lost, or has ended by an exception.
            MiclZooError: it cannot do what was asked, and nor could another in its place.
        """
        try:
            said = ray.get(next(self.stream))
        except StopIteration:
            self.left = True
            return
        self.since = time.monotonic()
        if isinstance(said, MiclZooError):
            raise said
        if isinstance(said, str):
            self.node = said
            return
        for event in said:
            if event.finished:
                self.shards.remove(event.shard)
            yield event

    def hangs(self, seconds: float) -> bool:
        """It has work and has not been heard of for so long."""
        return bool(self.shards) and not self.left and time.monotonic() - self.since > seconds


class _Crew:
    """The actors of a run."""

    def __init__(self, cluster: Cluster, job: Job, store: Store, work: Work) -> None:
        self.ray = _ray()
        self.embedder = self.ray.remote(concurrency_groups={"orders": 1})(Embedder)
        self.cluster, self.job, self.store, self.work = cluster, job, store, work
        local = store.folder.local
        self.location = store.folder.location if local is None else str(local.absolute())
        self.witness = ""
        self.taken: deque[int] = deque()  # from the work, and not given out yet
        self.actors: list[_Actor] = []
        self.lost = [0] * len(cluster.devices)  # by place: actors in a row that did not come to work
        self.begun: float | None = time.monotonic()  # None once an actor is at work, or that none is has been said

    def run(self, stop: Callable[[], bool]) -> Iterator[Event]:
        """Keep all at work until there is none.

        Raises:
            MiclZooError: actors do not start, or say themselves what is wrong.
        """
        with contextlib.redirect_stdout(sys.stderr):  # where Ray reports losses; standard output is for results
            try:
                if self._begin(stop):
                    yield from self._work(stop)
            finally:
                for actor in self.actors:
                    self.ray.kill(actor.handle)
                if self.cluster.joined:
                    self.ray.shutdown()

    def _work(self, stop: Callable[[], bool]) -> Iterator[Event]:
        while waiting := [actor for actor in self.actors if not actor.left]:
            self._direct(waiting, ending=stop())
            streams = [actor.stream for actor in waiting]
            self.ray.wait(streams, num_returns=1, timeout=0.05)
            ready, _ = self.ray.wait(streams, num_returns=len(streams), timeout=0)
            yield from self._hear({id(stream) for stream in ready})

    def _begin(self, stop: Callable[[], bool]) -> bool:
        """Ask for actors as soon as there is a shard; False where none comes."""
        while (found := self.work.take()) is None and not self.work.exhausted and not stop():
            time.sleep(0.05)
        if found is None:
            return False
        self.taken.append(found)
        self.witness = _witness(self.store.shard(found))
        self.actors = [self._start(place) for place in range(len(self.cluster.devices))]
        return True

    def _start(self, place: int) -> _Actor:
        """Ask for an actor; it comes when there is room."""
        job, device = self.cluster.part(self.job, place), self.cluster.devices[place]
        actor = self.embedder.options(**self.cluster.asks(place))
        return _Actor(actor.remote(job, device, self.location, self.witness, __version__))

    def _take(self) -> int | None:
        return self.taken.popleft() if self.taken else self.work.take()

    def _direct(self, waiting: list[_Actor], *, ending: bool) -> None:
        """Give shards out or, at the end, dismiss."""
        ending |= self.work.exhausted and not self.taken and not any(actor.shards for actor in waiting)
        for actor in waiting:
            if ending:
                actor.dismiss()
            else:
                actor.feed(self._take)
        if any(actor.node for actor in waiting):
            self.begun = None
        elif self.begun is not None and time.monotonic() - self.begun > ROOM_SECONDS:
            self.begun = None
            logger.warning(
                "no process that runs the model has started in %g s. Each asks Ray for %g cores and %d GPUs: "
                "`ray status` says what is free",
                *(ROOM_SECONDS, self.cluster.cores[0], self.cluster.kind == "cuda"),
            )

    def _hear(self, ready: set[int]) -> Iterator[Event]:
        """What those that are ready have said; the lost and the silent are replaced."""
        for place, actor in enumerate(self.actors):
            try:
                if id(actor.stream) in ready:
                    yield from actor.hear(self.ray)
                elif actor.hangs(HANG * self.job.image_timeout):
                    self._replace(place, "it hung")
            except self.ray.exceptions.RayError as error:
                self._replace(place, _text(error))

    def _replace(self, place: int, why: str) -> None:
        """Give back what an actor had and ask for another, unless all is to end."""
        actor = self.actors[place]
        self.ray.kill(actor.handle)
        self.lost[place] = 0 if actor.node else self.lost[place] + 1
        if self.lost[place] >= STARTS:
            raise MiclZooError(f"a process that runs the model does not start on the Ray cluster: {why}")
        gone = bool(actor.node) and not any(one["NodeID"] == actor.node and one["Alive"] for one in self.ray.nodes())
        self.work.give_back(actor.shards, f"a process on the Ray cluster: {why}", guilty=not gone)
        if actor.dismissed:
            actor.left = True
        else:
            self.actors[place] = self._start(place)


def _witness(index: ImageIndex) -> str:
    """A folder on this machine that holds images of an index; "" where none of the first does."""
    uris = [entry.uri for entry in islice(index.entries(), 100)]
    folders = (Path(uri).parent for uri in uris if "://" not in uri)
    return next((str(folder) for folder in folders if folder.is_dir()), "")
