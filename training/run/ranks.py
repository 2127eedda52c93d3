"""Several processes that train one encoder: who is which, and what they agree on.

Every process ("rank") computes one share of each batch. Gradients travel by NCCL between GPUs and by gloo between CPUs;
words between hosts (a signal, a loss, a bad image) always travel by gloo, so that no GPU has to wait for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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
from micl_zoo.errors import TrainingError, UsageError

STORE = "MICL_ZOO_STORE"  # variable with the file by which the ranks of one machine meet
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
        """Gather one thing of every rank, by rank; all ranks get all. It is JSON: tuples come back as lists.

        Not by all_gather_object: what comes over a network must not be unpickled.
        """
        text = json.dumps(thing).encode()
        if self.world == 1:
            return [json.loads(text)]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(text)]), group=self.words)
        longest = max(map(int, lengths))
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(texts, torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8), group=self.words)
        return [json.loads(found.numpy().tobytes()) for found in texts]  # JSON does not mind spaces behind it

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
    store, rank = _meeting()
    # The store outlives a restart, with the dead ranks' ports in it.
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if target.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAIT)
    try:
        parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        yield Ranks(rank, world, dist.new_group(backend="gloo", timeout=WAIT), parent), target
    finally:
        dist.destroy_process_group()


def _meeting() -> tuple[Any, int]:
    """Where this rank meets the others, and its number: by a file that `launch` names, else as torchrun says."""
    if STORE not in os.environ:
        store, rank, _ = next(rendezvous("env://", timeout=WAIT))
        return store, rank
    store = dist.FileStore(os.environ[STORE], int(os.environ["WORLD_SIZE"]))  # type: ignore[attr-defined]
    store.set_timeout(WAIT)
    return store, int(os.environ["RANK"])


def says() -> bool:
    """Tell whether this process is the one that speaks to the person: rank 0."""
    return os.environ.get("RANK", "0") == "0"
