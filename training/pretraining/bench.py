"""Measures a recipe on this machine: the rate of a training step beside the matrix rate, and the rate of the data."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import torch

from micl_zoo.encoders.device import autocast_dtype, default_workers, resolve_device, resolve_precision, usable_cores
from micl_zoo.progress import progress
from micl_zoo.sources.index import ImageIndex
from micl_zoo.sources.listing import index_source

from ..recipes import Recipe, get_recipe
from ..run.optim import set_learning_rate
from ..run.provenance import made_with
from ..run.step import resolve_autocast
from .data import MemoryCorpus, Seen, StreamedCorpus, draw, made_up_patches, normalise
from .plan import step_flops
from .pretrain import make_model
from .step import TrainStep

T = TypeVar("T")

WARM_UP_STEPS = 3  # the compiler and the allocator are done after these
CPU_BATCH = 64  # images a step where no GPU's memory asks for more
MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}
CACHED_IMAGES = 4096  # random images in the place of a corpus in memory
DATA_BATCH = 128  # images a worker prepares at a time


class Rates:
    """Figures of a measurement, the fields of a dataclass."""

    def json(self) -> str:
        """Write a record: the figures, and what they were measured with."""
        return json.dumps({**vars(self), **made_with(torch.device("cpu"))}, indent=1)


@dataclass(frozen=True)
class StepRates(Rates):
    """Rates of a training step."""

    recipe: str
    device: str
    precision: str
    batch_size: int
    images_per_second: float  # with the preparation of the batches
    gflop_per_image: float  # work of the model, forward and backward, see `plan.step_flops`
    model_tflops: float  # images_per_second times gflop_per_image
    matrix_tflops: float  # rate of a large product of random matrices in the same precision
    share: float  # model_tflops / matrix_tflops, from 0 to 1 (MFU against the measured rate)
    data_wait: float  # share of the time that preparing batches adds
    peak_memory_gib: float  # of the device; on a CPU of the whole process

    def text(self) -> str:
        """Write the figures for a person."""
        rate = f"{self.images_per_second:,.1f}"
        return (
            f"{self.recipe} on {self.device} in {self.precision}, {self.batch_size} images per step\n"
            f"images/s      {rate}\n"
            f"model         {self.model_tflops:,.3f} TFLOP/s ({rate} x {self.gflop_per_image:.2f} GFLOP per image)\n"
            f"matrix rate   {self.matrix_tflops:,.3f} TFLOP/s, measured; the step reaches {self.share:.1%} of it\n"
            f"data wait     {self.data_wait:.1%} of the time\n"
            f"peak memory   {self.peak_memory_gib:.2f} GiB"
        )


@dataclass(frozen=True)
class DataRates(Rates):
    """Rates of the data path."""

    recipe: str
    images: int
    workers: int
    cores: int
    alone: float  # images/s of one core, in this process
    together: float  # images/s of all workers
    wanted: float  # images/s that the GPUs take
    cores_wanted: int  # cores that deliver as much, at the rate of one core among those that worked together

    def text(self) -> str:
        """Write the figures for a person."""
        return (
            f"{self.recipe}, {self.images:,} images: read, decoded, cut to the visible patches\n"
            f"one core      {self.alone:,.1f} images/s\n"
            f"{self.workers} workers     {self.together:,.1f} images/s on {self.cores} cores\n"
            f"wanted        {self.wanted:,.0f} images/s: {self.cores_wanted} cores like these"
        )


def bench_step(
    recipe: str,
    *,
    overrides: Sequence[str] = (),
    batch_size: int | None = None,
    seconds: float = 20,
    device: str = "auto",
) -> StepRates:
    """Train for some seconds, after the compiler is done, on made-up pixels; nothing is written.

    By default a step takes the recipe's group, on a GPU halved until it fits, on a CPU 64 images at most.
    """
    target, chosen = resolve_device(device), get_recipe(recipe, overrides)
    precision = resolve_precision(chosen.precision, target)
    size = batch_size or (min(chosen.contrast_size, CPU_BATCH) if target.type == "cpu" else chosen.contrast_size)
    chosen, (rate, alone, peak) = at_a_size_that_fits(
        chosen, size, batch_size is None, lambda sized: _step_rates(sized, target, seconds)
    )
    matrix, flops = matrix_rate(target, autocast_dtype(precision) or torch.float32), step_flops(chosen).total
    return StepRates(
        recipe=chosen.name,
        device=device_name(target),
        precision=precision,
        batch_size=chosen.batch_size,
        images_per_second=round(rate, 2),
        gflop_per_image=round(flops / 1e9, 3),
        model_tflops=round(rate * flops / 1e12, 4),
        matrix_tflops=round(matrix / 1e12, 4),
        share=round(rate * flops / matrix, 4),
        data_wait=round(max(0.0, 1 - rate / alone), 4),
        peak_memory_gib=round(peak / 2**30, 2),
    )


def bench_data(
    recipe: str,
    data: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    seconds: float = 20,
    wanted: float = 8500,
) -> DataRates:
    """Read, decode and cut images, half of the seconds in one process and half in all workers.

    By default there is a worker per core, 16 at most; `wanted` are the images/s that the GPUs take.
    """
    index, cores = index_source(data), usable_cores()
    workers = max(1, default_workers() if workers is None else workers)
    size = max(2, min(DATA_BATCH, len(index)))
    chosen = dataclasses.replace(get_recipe(recipe, overrides), batch_size=size, contrast_batch=0, cache="none")
    alone, together = (_data_rate(index, chosen, seconds / 2, number) for number in (0, workers))
    return DataRates(
        recipe=chosen.name,
        images=len(index),
        workers=workers,
        cores=cores,
        alone=round(alone, 1),
        together=round(together, 1),
        wanted=wanted,
        cores_wanted=-(-int(wanted) // max(1, int(together / min(workers, cores)))),
    )


def at_a_size_that_fits(recipe: Recipe, size: int, halve: bool, measure: Callable[[Recipe], T]) -> tuple[Recipe, T]:
    """Measure a recipe at a batch of `size` images, or at the first half of it that fits into the memory."""
    while True:
        sized = dataclasses.replace(recipe, batch_size=size, contrast_batch=0)
        try:
            return sized, measure(sized)
        except torch.OutOfMemoryError:
            if not halve or size < 4:
                raise
        size //= 2
        torch.cuda.empty_cache()


def matrix_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 2) -> float:
    """Measure the FLOP/s of a large product of random matrices, the best of several tries."""
    side = MATRIX_SIDE.get(device.type, 2048)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times, stop = list[float](), time.monotonic() + seconds
    while len(times) < 4 or time.monotonic() < stop:
        times.append(timed(lambda: left @ right, device))
    return float(2 * side**3 / min(times))


def timed(what: Callable[[], object], device: torch.device) -> float:
    """Measure the seconds until the device has done it."""
    settle(device)
    start = time.perf_counter()
    what()
    settle(device)
    return time.perf_counter() - start


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Name the card, or the processor and its threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type


def _batches(recipe: Recipe, device: torch.device) -> Iterator[Seen]:
    """Made-up batches without end, prepared on the device as those of a run are."""
    if recipe.cache == "memory":
        shape = (max(CACHED_IMAGES, recipe.batch_size), 3, recipe.source_size, recipe.source_size)
        images = torch.randint(256, shape, dtype=torch.uint8).to(device)
        corpus = MemoryCorpus(images, torch.ones(len(images)), torch.arange(len(images)), [])
        yield from corpus.batches(recipe, 0, sys.maxsize)
    pixels, views = made_up_patches(recipe, device)
    for step in count():
        draws = draw(recipe, step).to(device)
        yield Seen(step, normalise(pixels.to(device, non_blocking=True), draws, recipe), views)


def _step_rates(recipe: Recipe, device: torch.device, seconds: float) -> tuple[float, float, int]:
    """Images/s with preparing the batches and without, and the peak memory in bytes."""
    autocast = resolve_autocast(recipe, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step, batches = TrainStep(make_model(recipe, device), recipe, autocast=autocast), _batches(recipe, device)
    set_learning_rate(step.optimizer, 1e-6)
    seen = next(batches)
    for _ in range(WARM_UP_STEPS):
        step(seen.patches, seen.views)

    def whole() -> None:
        fresh = next(batches)
        step(fresh.patches, fresh.views)

    with_data, without = list[float](), list[float]()
    with progress(recipe.name, round(seconds), unit="s") as tick:
        stop = time.monotonic() + seconds
        while not with_data or time.monotonic() < stop:
            before = time.monotonic()  # in turn, so that a slower minute of the machine hits both alike
            with_data.append(timed(whole, device))
            without.append(timed(lambda: step(seen.patches, seen.views), device))
            tick(int(time.monotonic()) - int(before))
    rates = [recipe.batch_size * len(times) / sum(times) for times in (with_data, without)]
    return rates[0], rates[1], _peak_memory(device)


def _data_rate(index: ImageIndex, recipe: Recipe, seconds: float, workers: int) -> float:
    batches = iter(StreamedCorpus(index, workers, torch.device("cpu")).batches(recipe, 0, 1_000_000))
    with progress(f"{workers or 'no'} workers", round(seconds), unit="s") as tick:
        for _ in range(max(1, workers)):  # all of them have started, and the queue is as full as it stays
            next(batches)
        start, done = time.monotonic(), 0
        while (now := time.monotonic() - start) < seconds or not done:
            next(batches)
            done += recipe.batch_size
            tick(int(time.monotonic() - start) - int(now))
    return done / (time.monotonic() - start)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
