"""Who embeds the shards: this process, several on this machine, or a Ray cluster. The store comes out the same."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

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
from ..encoders.encoder import Encoder, Pool
from ..encoders.load import load
from ..errors import MiclZooError, UsageError
from ..files import Folder
from ..images.decode import Decoding
from ..stores.store import Store, open_store
from .processes import CAN_START, Child, parent_pipe, wait_for_message
from .runner import Event, Runner

AHEAD = 2  # shards that a process knows of: it decodes the next while it finishes one
TRIES = 2  # of a shard
STARTS = 3  # of a process that does not come to work
HANG = 5  # times the image timeout without a word, and a process is replaced


@dataclass(frozen=True)
class Job:
    """All that a process must know to embed shards of a store.

    Attributes:
        model, weights, backend, providers: see `load`.
        compile: see `Encoder.compile_blocks`.
        precision: "fp32", "bf16" or "fp16", of ONNX files "int8", too.
        pool, normalize, decoding: of the embeddings.
        batch_size: images a batch.
        workers: processes that decode, for each one that runs the model.
        image_timeout: seconds an image may take to read and decode.
        threads: of a process on the CPU; 0 leaves torch's default.
    """

    model: str
    weights: str | None
    backend: Backend
    compile: bool
    precision: str
    pool: Pool
    normalize: bool
    decoding: Decoding
    batch_size: int
    workers: int
    image_timeout: float
    threads: int = 0
    providers: tuple[str, ...] | None = None

    def encoder(self, device: str) -> Encoder:
        """Load the model onto a device."""
        if self.threads:
            torch.set_num_threads(self.threads)
        encoder = load(self.model, weights=self.weights, device=device, backend=self.backend, providers=self.providers)
        if self.compile:
            encoder.compile_blocks(self.batch_size)
        return encoder

    def runner(self, encoder: Encoder) -> Runner:
        """Processes that decode, and the model at work."""
        return Runner(
            encoder,
            pool=self.pool,
            normalize=self.normalize,
            autocast=autocast_dtype(self.precision),
            decoding=self.decoding,
            batch_size=self.batch_size,
            workers=self.workers,
            image_timeout=self.image_timeout,
        )


@dataclass
class Work:
    """The shards of a run, given out to whoever asks, and taken back from those that die.

    Attributes:
        source: shards to do, None where none is listed yet.
        failed: shards that failed too often, and how they did last.
        error: that ended the source, to be raised when the shards before it are done.
    """

    source: Iterator[int | None]
    failed: dict[int, str] = field(default_factory=dict)
    error: MiclZooError | None = None
    _again: deque[int] = field(default_factory=deque)
    _tries: Counter[int] = field(default_factory=Counter)
    _exhausted: bool = False

    def take(self) -> int | None:
        """The next shard; None when there is none for now."""
        if self._again:
            return self._again.popleft()
        if self._exhausted:
            return None
        try:
            return next(self.source)
        except StopIteration:
            self._exhausted = True
        except MiclZooError as error:
            self._exhausted, self.error = True, error
        return None

    @property
    def exhausted(self) -> bool:
        """No other shard comes, unless one is given back."""
        return self._exhausted and not self._again

    def give_back(self, shards: Sequence[int], why: str, *, guilty: bool = True) -> None:
        """Shards of a process that has died: the first is the one it was at, and has failed once more if it is guilty.

        It is not where a whole machine is gone, and such a shard is tried for as long as there are others.
        """
        for place, shard in enumerate(shards):
            self._tries[shard] += guilty and place == 0
            if self._tries[shard] >= TRIES:
                self.failed[shard] = why
            else:
                self._again.append(shard)

    def __iter__(self) -> Iterator[int | None]:
        while not self.exhausted:
            shard = self.take()
            if shard is not None or not self.exhausted:
                yield shard


Engine = Callable[[Store, Work, Callable[[], bool]], Iterator[Event]]


def run_here(job: Job, encoder: Encoder, store: Store, work: Work, stop: Callable[[], bool]) -> Iterator[Event]:
    """In this process."""
    with job.runner(encoder) as runner, contextlib.closing(runner.run(store, iter(work), stop)) as events:
        yield from events


class _Model(Child):
    """A process that runs the model, and the shards that it was given and has not finished, in order."""

    def __init__(self, job: Job, device: str, location: str) -> None:
        super().__init__("micl_zoo.extraction.engines:serve")
        self.device = device
        self.shards: list[int] = []
        self.left = self._dismissed = False
        self.send((job, device, location))

    def feed(self, work: Work) -> None:
        """Give it shards, so that it always knows the next."""
        while len(self.shards) < AHEAD and (shard := work.take()) is not None:
            self.since = self.since if self.shards else time.monotonic()
            self.shards.append(shard)
            self.send(shard)

    def dismiss(self) -> None:
        """Tell it to keep what it has and to leave."""
        if not self._dismissed:
            self._dismissed = True
            self.send(None)

    def hear(self) -> Iterator[Event]:
        """What it has said.

        Raises:
            EOFError: it has died.
            MiclZooError: it cannot do what was asked, and nor could another in its place.
        """
        while not self.left and self.connection.poll():
            said = self.connection.recv()
            self.since, self.ready = time.monotonic(), True
            if isinstance(said, MiclZooError):
                raise said
            self.left = said == "left"
            if isinstance(said, Event):
                if said.finished:
                    self.shards.remove(said.shard)
                yield said


def run_in_processes(
    job: Job, devices: Sequence[str], store: Store, work: Work, stop: Callable[[], bool]
) -> Iterator[Event]:
    """In one process for each device, all on this machine; one that dies or hangs is replaced.

    Raises:
        MiclZooError: processes do not start.
    """
    location = store.folder.location
    models = [_Model(job, device, location) for device in devices]
    lost: Counter[int] = Counter()  # before they came to work, by place
    try:
        while not all(model.left for model in models):
            ending = stop() or (work.exhausted and not any(model.shards for model in models))
            for place, model in enumerate(models):
                if ending:
                    model.dismiss()
                elif not model.left:
                    model.feed(work)
                why = "it was killed or has crashed"
                try:
                    yield from model.hear()
                    why = "it hung" if _hangs(model, HANG * job.image_timeout) else ""
                except (EOFError, OSError):
                    pass
                if not why:
                    continue
                ended = model.end()
                lost[place] += not model.ready
                if lost[place] >= STARTS:
                    raise MiclZooError(f"a process for {model.device} does not start: it {ended}. See above.")
                work.give_back(model.shards, f"the process on {model.device} {ended}: {why}")
                models[place] = _Model(job, model.device, location)
            wait([model.connection for model in models if not model.left], 0.05)
    finally:
        for model in models:
            model.end()


def _hangs(model: _Model, seconds: float) -> bool:
    return bool(model.ready and model.shards and not model.left and time.monotonic() - model.since > seconds)


def serve(connection: int) -> None:
    """The life of a process that runs the model: shards in, events out, until it is dismissed or its parent is gone."""
    pipe = parent_pipe(connection)
    inbox: deque[int | None] = deque()

    def dismissed() -> bool:
        while None not in inbox and pipe.poll():
            inbox.append(pipe.recv())
        return None in inbox

    def shards() -> Iterator[int | None]:
        while not dismissed() or inbox[0] is not None:
            yield inbox.popleft() if inbox else None

    with contextlib.suppress(EOFError, OSError):  # of the pipe, whose other end is gone
        if not wait_for_message(pipe):
            return
        job, device, location = pipe.recv()
        try:
            store = open_store(Folder(location))
            with job.runner(job.encoder(device)) as runner:
                pipe.send("ready")
                for event in runner.run(store, shards(), dismissed):
                    pipe.send(event)
        except MiclZooError as error:
            pipe.send(error)
        except OSError as error:  # a full disk
            pipe.send(MiclZooError(f"{error.strerror or error}: {error.filename or location}"))
        else:
            pipe.send("left")


@dataclass(frozen=True)
class Local:
    """This machine, and the device of each process that runs the model on it.

    Attributes:
        devices: one name a process; the same name twice are two processes that share it.
    """

    devices: list[str]

    @classmethod
    def find(cls, devices: str, processes: int | None) -> Local:
        """Resolve names.

        Args:
            devices: "auto", "all" (every GPU), or names with commas between them.
            processes: how many, that share the devices; None is one for each.

        Raises:
            UsageError: a device that is not there, "all" where there is no GPU, or more devices than processes.
        """
        names = [name.strip() for name in devices.split(",") if name.strip()]
        if "all" in names:
            names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
            if not names:
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
    def kind(self) -> str:
        """ "cuda", "cpu" or "mps"."""
        return self.devices[0].partition(":")[0]

    @property
    def several(self) -> bool:
        """The model runs in processes of its own."""
        return len(self.devices) > 1

    @property
    def threads(self) -> int:
        """Of each process, where several share the processor; else 0, which leaves torch's default."""
        return max(1, usable_cores() // len(self.devices)) if self.several and self.kind == "cpu" else 0

    def precision(self, wanted: Precision) -> str:
        """That the devices run in."""
        return resolve_precision(wanted, torch.device(self.devices[0]))[1]

    def workers(self, wanted: int | None) -> int:
        """Processes that decode, for each that runs the model."""
        total = default_workers() if wanted is None else wanted
        return -(-total // len(self.devices))

    def engine(self, job: Job, encoder: Encoder) -> Engine:
        """What embeds the shards; a single process does it with this very encoder."""
        if self.several:
            return lambda store, work, stop: run_in_processes(job, self.devices, store, work, stop)
        return lambda store, work, stop: run_here(job, encoder, store, work, stop)

    def __str__(self) -> str:
        counts = Counter(self.devices)
        return " and ".join(f"{count} processes on {name}" if count > 1 else name for name, count in counts.items())
