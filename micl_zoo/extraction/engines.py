"""Who embeds the shards: this process, several on this machine, or a Ray cluster. The store comes out the same."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from logging import getLogger
from typing import Any, cast

import torch

from ..encoders.device import (
    Backend,
    Precision,
    autocast_dtype,
    default_workers,
    resolve_device,
    resolve_precision,
    usable_cores,
)
from ..encoders.encoder import Encoder
from ..encoders.load import load
from ..errors import MiclZooError, UsageError
from ..files import Folder
from ..limits import refused_by_system
from ..stores.store import Store, open_store
from .options import ExtractOptions
from .processes import CAN_START, Child, parent_pipe, wait_for_message
from .runner import Event, Runner
from .work import Work

AHEAD = 2  # shards that a process knows of: it decodes the next while it finishes one
STARTS = 3  # of processes in one place that die before they come to work, in a row
HANG = 5  # times the image timeout without a word, and a process is replaced


@dataclass(frozen=True)
class Job:
    """All that a process must know to embed shards of a store."""

    options: ExtractOptions  # as given, but for `model`, which is a name, and `weights`, an absolute path
    backend: Backend  # "torch", "openvino" or "onnx"
    precision: str  # "fp32", "bf16" or "fp16"; with ONNX files also "int8"
    batch_size: int  # images per batch
    workers: int  # decoding processes per model process
    threads: int = 0  # threads of a process on the CPU; 0 leaves torch's default

    def encoder(self, device: str) -> Encoder:
        """Load the model onto a device."""
        if self.threads:
            torch.set_num_threads(self.threads)
        options, name = self.options, cast(str, self.options.model)
        more: Any = {"image_size": options.image_size, "providers": options.providers}
        encoder = load(name, weights=options.weights, device=device, backend=self.backend, **more)
        if options.compile:
            encoder.compile_blocks(self.batch_size)
        return encoder

    def runner(self, encoder: Encoder) -> Runner:
        """Start the decoding processes beside a model."""
        return Runner(encoder, self.options, self.batch_size, self.workers, autocast_dtype(self.precision))


def run_here(job: Job, encoder: Encoder, store: Store, work: Work) -> Iterator[Event]:
    """Embed in this process."""
    with job.runner(encoder) as runner, contextlib.closing(runner.run(store, work)) as events:
        yield from events


class Lost(Exception):
    """A process has died; the text says of what."""


# What a process says: the node it is on, once its model is loaded; events; an error; None as its last word.
Said = str | list[Event] | MiclZooError | Lost | None


def embed_elsewhere(job: Job, device: str, find: Callable[[], Store], work: Work) -> Iterator[Said]:
    """Embed shards in a process of their own, and tell of it. An error is one that other processes would meet, too."""
    try:
        store = find()
        with job.runner(job.encoder(device)) as runner:
            yield ""
            for event in runner.run(store, work):
                yield [event]
    except MiclZooError as error:
        yield error


class Worker:
    """A process that runs the model, as the run knows it: a child of this process or an actor of a Ray cluster."""

    what: str  # names it to a person

    def __init__(self, work: Work) -> None:
        self.work = work
        self.shards: list[int] = []  # that it was given and has not finished, in order
        self.node = ""  # id of its node in a Ray cluster
        self.ready = False  # it has loaded its model
        self.left = False  # it does no more
        self.since = time.monotonic()  # when it was last heard of, or was given work when it had none
        self.listener = threading.Thread(target=self._listen, name="listen", daemon=True)
        self.listener.start()

    def order(self, shard: int | None) -> None:
        """Send it a shard; or None, to keep what it has and leave."""
        raise NotImplementedError

    def listen(self) -> Iterator[Said]:
        """Receive what it says, until it leaves; raises Lost if it dies."""
        raise NotImplementedError

    def end(self) -> str:
        """End it at once; how it had ended before, if it had."""
        raise NotImplementedError

    def guilty(self) -> bool:
        """Whether its loss counts as a failure of the shard it was at."""
        return True

    def _listen(self) -> None:
        try:
            for said in self.listen():
                self.work.tell((self, said))
            self.work.tell((self, None))
        except Lost as lost:
            self.work.tell((self, lost))

    def feed(self) -> None:
        """Give it shards, so that it always knows the next; none before it can work."""
        while self.ready and len(self.shards) < AHEAD and (shard := self.work.take()) is not None:
            self.since = self.since if self.shards else time.monotonic()
            self.shards.append(shard)
            self.order(shard)

    def dismiss(self) -> None:
        """Tell it to leave. One that has not come to work need not come."""
        if self.ready:
            self.order(None)
        self.left |= not self.ready

    def heard(self, said: Said) -> Iterator[Event]:
        """Note what it has said."""
        self.since = time.monotonic()
        if isinstance(said, MiclZooError | Lost):
            raise said
        if isinstance(said, str):
            self.ready, self.node = True, said
            return
        self.left |= said is None
        for event in said or ():
            if event.finished:
                self.shards.remove(event.shard)
            yield event

    def seconds_left(self, patience: float) -> float:
        """Seconds until it counts as hung; infinite while it has nothing to do."""
        return self.since + patience - time.monotonic() if self.shards and not self.left else math.inf


def run_crew(start: Callable[[int], Worker], count: int, work: Work, image_timeout: float) -> Iterator[Event]:
    """Keep a number of workers fed until there is no more work; replace one that dies or hangs."""
    crew = [start(place) for place in range(count)]
    lost = [0] * count  # by place: workers in a row that died before they came to work
    ending = False

    def replace(place: int, why: str) -> None:
        worker = crew[place]
        how = f"{worker.what} {worker.end()}{why}"
        lost[place] = 0 if worker.ready else lost[place] + 1
        if lost[place] >= STARTS:
            raise MiclZooError(f"the model does not start: {how}. See its output above.")
        work.give_back(worker.shards, how, guilty=worker.guilty())
        worker.left = ending
        crew[place] = worker if ending else start(place)

    try:
        while not all(worker.left for worker in crew):
            if not ending:
                ending = work.stopped or (work.over and not any(worker.shards for worker in crew))
                for worker in crew:
                    worker.dismiss() if ending else worker.feed()
            patience = min(worker.seconds_left(HANG * image_timeout) for worker in crew)
            for worker, said in work.hear(None if patience == math.inf else max(0.0, patience)):
                if worker in crew and not worker.left:  # else another has its place
                    try:
                        yield from worker.heard(said)
                    except Lost as died:
                        replace(crew.index(worker), str(died))
            for place, worker in enumerate(crew):
                if worker.seconds_left(HANG * image_timeout) <= 0:
                    replace(place, ": it hung")
    finally:
        for worker in crew:
            worker.end()


class _Process(Worker):
    """A process on this machine."""

    def __init__(self, job: Job, device: str, location: str, work: Work) -> None:
        self.child = Child("micl_zoo.extraction.engines:serve")
        self.what = f"the process on {device}"
        super().__init__(work)
        self.child.send((job, device, location))

    def order(self, shard: int | None) -> None:
        self.child.send(shard)

    def listen(self) -> Iterator[Said]:
        try:
            while (said := self.child.connection.recv()) is not None:
                yield said
        except (EOFError, OSError):
            raise Lost(": it was killed or has crashed") from None

    def end(self) -> str:
        ended = self.child.kill()
        self.listener.join()  # which reads from the pipe until it is at its end
        self.child.connection.close()
        return ended


def serve(connection: int) -> None:
    """Run a process that embeds shards until it is dismissed or its parent is gone."""
    pipe, work = parent_pipe(connection), Work()  # in come the job and numbers of shards, out goes what `Said` lists

    def take_orders() -> None:
        with contextlib.suppress(EOFError, OSError):  # of the pipe, whose other end is gone
            while wait_for_message(pipe) and (shard := pipe.recv()) is not None:
                work.put(shard)
        work.stop()

    def say(said: Said) -> None:
        with contextlib.suppress(OSError):
            pipe.send(said)

    if not wait_for_message(pipe):
        return
    job, device, location = pipe.recv()
    getLogger("micl_zoo.files").disabled = True  # its parent writes there, too, and has said what is missing
    threading.Thread(target=take_orders, name="orders", daemon=True).start()
    try:
        for said in embed_elsewhere(job, device, lambda: open_store(Folder(location)), work):
            say(said)
    except Exception as error:
        if (refused := refused_by_system(error)) is None:
            raise
        say(MiclZooError(f"{refused}, in a process that writes to {location!r}"))
    say(None)


@dataclass(frozen=True)
class Local:
    """This machine, and the device of each process that runs the model on it."""

    devices: list[str]  # one name per process; the same name twice stands for two processes that share the device

    @classmethod
    def find(cls, devices: str, processes: int | None) -> Local:
        """Resolve `devices` and `processes` of `ExtractOptions`."""
        names = [name.strip() for name in devices.split(",") if name.strip()]
        if "all" in names and not (names := [f"cuda:{number}" for number in range(torch.cuda.device_count())]):
            raise UsageError('devices "all" means every GPU, and there is none here: give "cpu" or "auto"')
        if not names:
            raise UsageError(f"no device in {devices!r}. Valid: auto, all, cpu, cuda, cuda:N, mps, or several of them")
        count = processes or len(names)
        if count > 1 and not CAN_START:
            raise UsageError(f"{count} processes were asked for, and this system can only run one")
        if count < len(names):
            raise UsageError(f"{count} process{'es' * (count > 1)} cannot run on {len(names)} devices: name fewer")
        resolved = [str(resolve_device(name)) for name in names]
        return cls([resolved[place % len(names)] for place in range(count)])

    @property
    def several(self) -> bool:
        """Whether the model runs in processes of its own."""
        return len(self.devices) > 1

    @property
    def threads(self) -> int:
        """Threads per process where several share the CPU; else 0, which leaves torch's default."""
        return max(1, usable_cores() // len(self.devices)) if self.several and "cpu" in self.devices[0] else 0

    def precision(self, wanted: Precision) -> str:
        """Resolve "auto" for the devices."""
        return resolve_precision(wanted, torch.device(self.devices[0]))

    def workers(self, wanted: int | None) -> int:
        """Decoding processes per model process."""
        return math.ceil((default_workers() if wanted is None else wanted) / len(self.devices))

    def run(self, job: Job, encoder: Encoder, store: Store, work: Work) -> Iterator[Event]:
        """Embed the shards; a single process does it with this very encoder."""
        if not self.several:
            return run_here(job, encoder, store, work)

        def start(place: int) -> Worker:
            return _Process(job, self.devices[place], store.folder.location, work)

        return run_crew(start, len(self.devices), work, job.options.image_timeout)

    def __str__(self) -> str:
        counts = Counter(self.devices)
        return " and ".join(f"{count} processes on {name}" if count > 1 else name for name, count in counts.items())
