"""One source through one process, two processes, a Ray cluster and runs killed at random moments: the same bytes?

    python benchmarks/same_parts.py "tin200/train-*.parquet" --out benchmarks/records/parts.json

Also the memory of a run over a tenth of the images beside that over all of them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import torch
from memory import own_bytes, tree, tree_bytes
from record import missing, write
from toys import SMALL, random_encoder

import micl_zoo
from micl_zoo.files import file_sha256
from micl_zoo.training.run.provenance import made_with

SAMPLE_SECONDS = 0.25
KILL_SECONDS_LEAST = 2  # after a start: before it, nothing but imports is killed


class Watched:
    """A command and all its processes, and the most memory that they had together.

    Attributes:
        peak: proportional set size (memory that is shared counts once) of the tree, in bytes.
    """

    def __init__(self, words: list[str]) -> None:
        self.peak = 0
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            self.peak = max(self.peak, tree_bytes(self.process.pid))
            time.sleep(SAMPLE_SECONDS)

    def finish(self) -> str:
        """Wait for the end: its standard output.

        Raises:
            ClickException: it failed.
        """
        out, err = self.process.communicate()
        if self.process.returncode:
            raise click.ClickException(f"{self.process.args!r}: {err}")
        return out


def hashes(store: Path) -> dict[str, str]:
    """Sha256 of the parts, the index and the ledger."""
    names = [*store.glob("part-*.parquet"), *store.glob("index/*.parquet"), store / "errors.jsonl"]
    return {str(path.relative_to(store)): file_sha256(path) for path in sorted(names)}


def killed(command: list[str], store: Path, kills: int, longest: float, seed: int) -> dict[str, Any]:
    """Start a command again and again, kill it after random seconds, and let the last one end."""
    draw = random.Random(seed)
    moments: list[float] = []
    parts: list[int] = []
    survivors = 0
    while len(moments) < kills:
        seconds = draw.uniform(KILL_SECONDS_LEAST, longest)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        below = tree(process.pid)
        if process.poll() is not None:
            raise click.ClickException(f"it had ended before the kill number {len(moments) + 1}: use more --images")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        moments.append(round(seconds, 2))
        parts.append(len(list(store.glob("part-*.parquet"))))
        time.sleep(0.5)
        survivors += sum(own_bytes(one) > 0 for one in below if one != process.pid)  # what has ended has none
    start = time.monotonic()
    Watched(command).finish()
    return {
        "kill_seconds": moments,
        "parts_after_each_kill": parts,
        "processes_left_half_a_second_after_kills": survivors,
        "last_run_seconds": round(time.monotonic() - start, 1),
    }


@click.command()
@click.argument("source")
@click.option("--images", default=20_000, show_default=True)
@click.option("--shard-rows", default=250, show_default=True)
@click.option("--kills", default=20, show_default=True)
@click.option("--longest", default=15.0, show_default=True, help="Most seconds until a kill.")
@click.option(
    "--weights", type=click.Path(exists=True, path_type=Path), help="An encoder.  [default: a small random one]"
)
@click.option("--ray/--no-ray", default=True, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Record to write.")
def main(
    source: str,
    images: int,
    shard_rows: int,
    kills: int,
    longest: float,
    weights: Path | None,
    ray: bool,
    seed: int,
    out: Path | None,
) -> None:
    """Compare the stores of SOURCE, byte by byte."""
    folder = Path(tempfile.mkdtemp())
    weights = weights or random_encoder(folder / "encoder", "vit_ti16.tin200", SMALL)
    base = [sys.executable, "-m", "micl_zoo", "extract", source, "--shard-rows", str(shard_rows), "--precision", "fp32"]
    base += ["--json", "--devices", "cpu", "--weights", str(weights)]
    ways = {"one process": [], "two processes": ["--processes", "2"]}
    if ray and (why := missing("ray")):
        click.echo(f"ray, two actors: left out, {why}")
    elif ray:
        ways["ray, two actors"] = ["--engine", "ray", "--processes", "2"]
    figures: dict[str, Any] = {}
    stores: dict[str, dict[str, str]] = {}
    for name, options in {**ways, "a tenth of the images": [], "killed": []}.items():
        store = folder / name.replace(" ", "-")
        limit = images // 10 if "tenth" in name else images
        command = [*base, "-o", str(store), "--limit", str(limit), *options]
        start = time.monotonic()
        if name == "killed":
            figures[name] = killed(command, store, kills, longest, seed)
        else:
            run = Watched(command)
            said = json.loads(run.finish())
            figures[name] = {
                "images_per_second": round(said["images_per_second"], 1),
                "seconds": round(time.monotonic() - start, 1),
                "peak_memory_mb": round(run.peak / 1e6, 1),
            }
        found = micl_zoo.open_store(store)
        refused = sum(1 for _ in found.refused())
        figures[name] |= {"rows": len(found), "refused": refused, "rows_in": limit, "parts": len(found.done())}
        assert len(found) + refused == limit, name
        stores[name] = hashes(store)
        click.echo(f"{name}: {json.dumps(figures[name])}")
    same = {name: stores[name] == stores["one process"] for name in stores if "tenth" not in name}
    grown = figures["one process"]["peak_memory_mb"] - figures["a tenth of the images"]["peak_memory_mb"]
    click.echo(
        f"the same bytes as one process: {same}; memory grew by {grown:.1f} MB from a tenth of the images to all"
    )
    write(
        {
            **made_with(torch.device("cpu")),
            "command": f"python benchmarks/same_parts.py SOURCE --images {images} --shard-rows {shard_rows} "
            f"--kills {kills} --longest {longest:g} --seed {seed}",
            "source": Path(source).name,
            "encoder": found.manifest.model,
            "figures": figures,
            "same_bytes_as_one_process": same,
            "memory_growth_mb": round(grown, 1),
        },
        out,
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
