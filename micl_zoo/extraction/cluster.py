"""A Ray cluster embeds the shards: an actor per process that runs the model, on the nodes that have room for it.

Ray starts the actors, notices those that are lost with their process or their node, and starts others where there is
room again. Which shard is whose is decided by `engines.run_crew`, as it is for processes on one machine. So the parts
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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from logging import getLogger
from math import ceil
from pathlib import Path
from threading import Timer
from typing import Any, ClassVar

import torch

from .._version import __version__
from ..encoders.device import MAX_WORKERS, Precision, fast_precision, resolve_precision, usable_cores
from ..encoders.encoder import Encoder
from ..errors import MiclZooError, SourceError, StoreError, UsageError
from ..files import Folder
from ..sources.index import ImageIndex
from ..stores.store import Store, open_store
from ..telemetry import no_telemetry
from .engines import Job, Lost, Said, Worker, embed_elsewhere, run_crew
from .runner import Event
from .work import Work

TELL_SECONDS = 0.25  # between two messages of an actor: from a thousand actors, 4,000 per second come here
ASK_SECONDS = 120.0  # for a node to start a process and say what its hardware can do
ROOM_SECONDS = 60.0  # without a process at work, after which a person is told what Ray was asked for
OBJECT_STORE = 100 << 20  # bytes, of a cluster that is started here: Ray's least is 75 MiB, and only progress passes

logger = getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what the processes that run the model take of it."""

    several: ClassVar[bool] = True  # the model runs in processes of its own, even if it is one
    devices: list[str]  # "cuda" or "cpu", per process
    cores: list[float]  # cores that Ray reserves, per process
    nodes: list[str]  # ids of the nodes that can hold such a process
    joined: bool  # True if this run joined or started the cluster, and leaves or ends it

    @classmethod
    def join(cls, address: str | None, processes: int | None) -> Cluster:
        """Join the cluster at host:port, or start one on this machine.

        Address "auto" is the cluster that RAY_ADDRESS names or that this machine belongs to, and None starts one where
        there is none. A process that is in a cluster already stays in that one. Processes are one per GPU by default
        or, where there are none, one per node. More than there are GPUs wait for later nodes; on CPUs they share cores.
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
    def threads(self) -> int:
        """Threads of the process with the most cores; 0, which leaves torch's default, on GPUs."""
        return max(1, int(max(self.cores))) if self.kind == "cpu" else 0

    def precision(self, wanted: Precision) -> str:
        """Resolve "auto" by asking every node: bf16 where all of them compute it fast, else fp32."""
        if wanted != "auto":
            return resolve_precision(wanted, torch.device(self.kind))
        ray = _ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task, kind = ray.remote(fast_precision), torch.device(self.kind)
        share = 0.01 if self.kind == "cuda" else 0  # of a GPU: enough to see it, and there is room for it at once
        there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in self.nodes]
        asked = [task.options(num_cpus=0, num_gpus=share, scheduling_strategy=node).remote(kind) for node in there]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ASK_SECONDS)
        if not answered:
            raise MiclZooError(f"no Ray node has answered in {ASK_SECONDS:g} s: `ray status` says what is free")
        try:
            return "bf16" if set(ray.get(answered)) == {"bf16"} else "fp32"
        except ray.exceptions.RayError as error:
            raise MiclZooError(f"a node of the Ray cluster cannot run micl-zoo {__version__}: {_text(error)}") from None

    def workers(self, wanted: int | None) -> int:
        """Decoding processes of the model process with the most cores; see `part` for the others."""
        if wanted is None:
            return min(MAX_WORKERS, max(1, int(max(self.cores))))
        return min(wanted, ceil(wanted * len(self.nodes) / len(self.devices)))

    def run(self, job: Job, encoder: Encoder, store: Store, work: Work) -> Iterator[Event]:
        """Keep actors at work until there is no more. They are asked for as soon as there is a shard."""
        ray, actors = _ray(), list[_Actor]()
        waiting = Timer(ROOM_SECONDS, self._say_what_is_asked, [actors])
        waiting.daemon = True
        with contextlib.redirect_stdout(sys.stderr):  # where Ray reports losses; standard output is for results
            try:
                if (first := next(iter(work), None)) is None:
                    return
                work.give_back([first], "", guilty=False)
                witness, local = _witness(store.shard(first)), store.folder.local
                location = store.folder.location if local is None else str(local.absolute())
                embedder = ray.remote(concurrency_groups={"orders": 1})(Embedder)

                def start(place: int) -> Worker:
                    ours = (self.part(job, place), self.devices[place], location, witness, __version__)
                    actors.append(_Actor(embedder.options(**self.asks(place)).remote(*ours), work))
                    return actors[-1]

                waiting.start()
                yield from run_crew(start, len(self.devices), work, job.options.image_timeout)
            finally:
                waiting.cancel()
                for actor in actors:
                    actor.listener.join(5)
                if self.joined:
                    ray.shutdown()

    def _say_what_is_asked(self, actors: list[_Actor]) -> None:
        if not any(actor.ready for actor in actors):
            logger.warning(
                "no process that runs the model has started in %g s. Each asks Ray for %g cores and %d GPUs: "
                "`ray status` says what is free",
                *(ROOM_SECONDS, self.cores[0], self.kind == "cuda"),
            )

    def asks(self, place: int) -> dict[str, Any]:
        """What Ray must have free for a process. They are spread, so that no node reads and decodes for all others."""
        gpus = int(self.kind == "cuda")
        return {"num_cpus": self.cores[place], "num_gpus": gpus, "scheduling_strategy": "SPREAD"}

    def part(self, job: Job, place: int) -> Job:
        """Cut the job to the cores of one process."""
        own, most = (max(1, int(cores)) for cores in (self.cores[place], max(self.cores)))
        return replace(job, threads=own if job.threads else 0, workers=ceil(job.workers * own / most))

    def __str__(self) -> str:
        count, nodes = len(self.devices), len(self.nodes)
        what = ("GPU", "GPUs") if self.kind == "cuda" else ("process", "processes")
        return f"{count} {what[count > 1]} of a Ray cluster of {nodes} node{'s' * (nodes > 1)}"


def _ray() -> Any:
    no_telemetry()
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
    """Cores per process: those of a node, shared evenly by its GPUs."""
    cores = [host.get("CPU", 0) // int(host["GPU"]) for host in hosts for _ in range(int(host["GPU"]))]
    return [cores[place % len(cores)] for place in range(processes or len(cores))]


def _cores_a_process(hosts: list[dict[str, float]], processes: int | None) -> list[float]:
    """Cores per process: all of a node or, for a number of processes, as many as leave room for all of them."""
    counts = [int(host["CPU"]) for host in hosts]
    if processes is None:
        return [float(count) for count in counts]
    if processes > sum(counts):
        return [1 / ceil(processes / sum(counts))] * processes
    fitting = [cores for cores in range(1, max(counts) + 1) if sum(count // cores for count in counts) >= processes]
    return [float(fitting[-1])] * processes


def _text(error: BaseException) -> str:
    """What happened, in a line: of an exception in another process, its own last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    because = [line for line in lines if line.startswith("The actor is dead because")]
    return (because or lines[-1:])[0][:300]


@dataclass
class Embedder:
    """An actor: shards in, events out, until it is dismissed.

    Orders come in a thread of their own (Ray's concurrency group "orders") while `events` is at work, so that the
    next shard is being decoded while one is finished.
    """

    job: Job
    device: str
    location: str  # of the store
    witness: str  # a folder of the source that must be visible from here as well, or ""
    version: str  # of micl-zoo where the run was started
    work: Work = field(default_factory=Work)

    def order(self, shard: int | None) -> None:
        """Add a shard to do; or None, to keep what there is of unfinished shards and leave."""
        self.work.stop() if shard is None else self.work.put(shard)

    def events(self) -> Iterator[Said]:
        """Embed shards: `embed_elsewhere`, whose events come in groups."""
        import ray

        held, told = list[Event](), time.monotonic()
        for said in embed_elsewhere(self.job, self.device, self._store, self.work):
            if not isinstance(said, list):
                yield str(ray.get_runtime_context().get_node_id()) if said == "" else said
                continue
            held += said
            if held[-1].finished or time.monotonic() - told > TELL_SECONDS:
                yield held
                held, told = [], time.monotonic()
        yield held

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


class _Actor(Worker):
    """An actor, as the run knows it."""

    what = "a process on the Ray cluster"

    def __init__(self, handle: Any, work: Work) -> None:
        self.ray, self.handle = _ray(), handle
        self.stream = handle.events.options(num_returns="streaming").remote()
        super().__init__(work)

    def order(self, shard: int | None) -> None:
        self.handle.order.options(concurrency_group="orders").remote(shard)

    def listen(self) -> Iterator[Said]:
        try:
            for said in self.stream:
                yield self.ray.get(said)
        except self.ray.exceptions.RayError as error:
            raise Lost(f"was lost: {_text(error)}") from None

    def end(self) -> str:
        self.ray.kill(self.handle)
        return ""

    def guilty(self) -> bool:
        """Whether its node is still there."""
        return any(one["NodeID"] == self.node and one["Alive"] for one in self.ray.nodes())


def _witness(index: ImageIndex) -> str:
    """A folder on this machine that holds images of an index; "" where none of the first does."""
    uris = (entry.uri for entry in islice(index.entries(), 100))
    folders = (Path(uri).parent for uri in uris if "://" not in uri)
    return next((str(folder) for folder in folders if folder.is_dir()), "")
