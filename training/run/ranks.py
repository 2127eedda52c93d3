"""Several processes that train one encoder: who is which, what they agree on, and how they are started.

Every process ("rank") computes one share of each batch. Gradients travel by NCCL between GPUs and by gloo between CPUs;
words between hosts (a signal, a loss, a bad image) always travel by gloo, so that no GPU has to wait for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from micl_zoo.encoders.device import resolve_device
from micl_zoo.errors import Interrupted, TrainingError, UsageError

WAIT = timedelta(hours=2)  # for a rank that reads a large corpus, or that measures k-NN while the others wait
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0  # number of this process, from 0; rank 0 writes
    world: int = 1  # number of processes
    words: Any = None  # gloo group, or None for a process alone
    parent: int | None = None  # process that started this one together with others and looks after them, or None

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Whether whoever started the ranks is gone, so that nobody would stop them any more."""
        return self.parent is not None and os.getppid() != self.parent

    def gather(self, thing: T) -> list[T]:
        """Gather one picklable object of every rank, by rank; all ranks get all."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing, group=self.words)
        return things

    def any(self, *flags: bool) -> list[bool]:
        """Raise each flag on all ranks that is True on one; in a fraction of a millisecond, so every step can ask."""
        if self.world == 1:
            return list(flags)
        words = torch.tensor([float(flag) for flag in flags])
        try:
            dist.all_reduce(words, dist.ReduceOp.MAX, group=self.words)
        except RuntimeError as error:  # gloo says no more than that a connection is closed
            raise TrainingError(f"another rank is gone, see what it said ({str(error)[:200]})") from None
        return words.bool().tolist()

    def first(self, thing: T) -> T:
        """Give every rank what rank 0 has."""
        return self.gather(thing)[0]

    def all_rows(self, rows: Tensor) -> Tensor:
        """Gather (b, ...) of each rank as (world * b, ...), by rank; gradients flow back to the rows' owners."""
        return rows if self.world == 1 else _AllRows.apply(rows, self.rank, self.world)


class _AllRows(torch.autograd.Function):
    """Rows of all ranks; backwards, each rank's rows get the sum of the gradients that all ranks have for them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world: int) -> Tensor:
        ctx.first, ctx.count = rank * len(rows), len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole = gradients[0].contiguous()
        dist.all_reduce(whole)
        return whole[ctx.first : ctx.first + ctx.count], None, None


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the other ranks when torchrun or SLURM started several; leave them at the end.

    The device is "auto", "cpu", "cuda" or "cuda:N"; with several ranks on GPUs each takes the one of its local rank.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 and "RANK" not in os.environ:
        yield Ranks(), resolve_device(device)
        return
    target = resolve_device(device)
    if target.type == "cuda":
        local, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= cards:
            raise UsageError(
                f"rank {local} of this machine has no GPU, {cards} are visible: "
                "give --gpus that number at most, or --device cpu"
            )
        target = torch.device("cuda", local)
        torch.cuda.set_device(target)
    store, rank, world = next(rendezvous("env://", timeout=WAIT))
    # The store outlives a restart, with the dead ranks' ports in it.
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if target.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAIT)
    try:
        parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        yield Ranks(rank, world, dist.new_group(backend="gloo", timeout=WAIT), parent), target
    finally:
        dist.destroy_process_group()


def says() -> bool:
    """Tell whether this process is the one that speaks to the person: rank 0."""
    return os.environ.get("RANK", "0") == "0"


def launch(
    words: Sequence[str],  # of `micl-zoo`, from `train` or `eval` on, without the options on the number of processes
    *,
    gpus: int = 1,  # processes on this machine, one per GPU
    nodes: int = 1,  # machines; the same call runs on each of them
    rdzv: str | None = None,  # rendezvous endpoint, "host:port" of one of the machines; required for more than one
    restarts: int = 0,  # how often all ranks start again, from the last checkpoint, after one has failed
) -> None:
    """Run `python -m micl_zoo.training WORDS` in `gpus` processes on this machine, by torchrun's elastic agent."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if nodes > 1 and not rdzv:
        raise UsageError("--nodes needs --rdzv HOST:PORT, the address of one machine, the same on all of them")
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=gpus,
        run_id=os.environ.get("SLURM_JOB_ID", "micl-zoo"),
        rdzv_backend="c10d",
        rdzv_endpoint=rdzv or "localhost:0",  # 0: any free port
        max_restarts=restarts,
        monitor_interval=0.5,
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "micl_zoo.training", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise TrainingError(f"rank {rank} ended with code {failure.exitcode}; see its output above") from None
    except SignalException as error:
        raise Interrupted("the ranks were told to stop; see their output above", signal=error.sigval) from None
