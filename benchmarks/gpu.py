"""One GPU for fifteen minutes, in two commands; each job has a time limit and writes its result at once.

    python benchmarks/gpu.py first --out OUT --seconds 240 --work WORK --commit COMMIT
    python benchmarks/gpu.py train --out OUT --seconds 470 --data DATA --work WORK --commit COMMIT
    python benchmarks/gpu.py join OUT encoder.safetensors

`first`: matrix and copy rate of the card, attention at the shapes of the recipes, `pytest -m gpu`, the training step of
three recipes beside a straightforward one, and extraction with a ViT-B/16. `train`: a recipe on DATA/train-*.parquet,
with as many epochs as there is time for, learned from 120 steps; its encoder is left in OUT in float16, in pieces that
`join` puts together.
OUT gets at most eight files of 15 MB, which a machine without storage can hand back; the run itself stays in WORK.

micl-zoo need not be installed, only what it depends on. `--trial` runs all of it at a small size on a CPU.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
STEP_RECIPES = ("vit_b16.in1k", "vit_l16.in1k", "vit_s16.tin200")
STEP_FIGURES = ("batch_size", "images_per_second", "ratio", "share_of_matrix_rate", "peak_memory_gib")
# (sequences, heads, tokens): two views of the batch each, 64 numbers per head
ATTENTION = {"vit_s16.tin200": (6144, 6, 4), "vit_s16.tin200, mask 0.69": (6144, 6, 6), "vit_b16.in1k": (3600, 12, 20)}
ATTENTION_TRIAL = {"toy": (8, 2, 4)}
COPY_BYTES = {"cuda": 2**32, "cpu": 2**26}
PIECE_BYTES, PIECES = 15 * 10**6, 4  # with the four other files of a run, eight in all
METRIC_LINES = 4000  # of metrics.jsonl, evenly spaced
PROBE_STEPS, PROBE_STEPS_TRIAL = 120, 12
CLOSING_SECONDS = 25  # from the last step to the last piece of the encoder
MARGIN = 0.95  # of the time that is left: a card slows down as it warms up
SHORTEST_JOB = 5  # seconds: below it a job is not started
STOP_SECONDS = 15  # for a job to write a checkpoint after SIGTERM


class Stopped(Exception):
    """A job ran past its time limit."""


@dataclass
class Session:
    """One command: its time, its folders, and its results so far, which session.json repeats."""

    out: Path
    work: Path
    seconds: float
    trial: bool
    results: dict[str, Any]
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.site = lay_out(self.work / "site")

    @property
    def photos(self) -> Path:
        """Photographs for the extraction."""
        return self.work / "photographs"

    @property
    def device(self) -> str:
        """Where the jobs compute."""
        return "cpu" if self.trial else "cuda"

    def left(self) -> float:
        """Seconds until the command must be over."""
        return self.seconds - (time.monotonic() - self.start)

    def job(self, name: str, limit: float, work: Callable[[float], Any], *, least: float = 0) -> None:
        """Run `work(seconds)` and write its result, or why there is none: the next job runs in any case.

        Args:
            name: key of the result.
            limit: seconds, at most what is left.
            work: the job.
            least: seconds that it gets even where nothing is left.
        """
        limit *= 3 if self.trial else 1  # a trial shares its machine
        begun, limit = time.monotonic(), max(least, min(limit, self.left()))
        try:
            self.results[name] = work(limit) if limit > SHORTEST_JOB else "not started: no time left"
        except Exception as error:  # the machine is lent for minutes
            self.results[name] = f"failed: {type(error).__name__}: {error}"[-2000:]
        self.results["seconds"] |= {
            name: round(time.monotonic() - begun, 1),
            "all": round(self.seconds - self.left(), 1),
        }
        (self.out / "session.json").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        click.echo(f"{name}: {json.dumps(self.results[name])}")

    def run(self, words: list[str], limit: float, log: Path | None = None) -> str:
        """Run Python on `words` and return its output; past the limit it is told to stop, then killed.

        Raises:
            Stopped: it ran past the limit.
            RuntimeError: it failed; with the end of what it wrote.
        """
        log = log or self.work / "job.log"
        environment = {**os.environ, "PYTHONPATH": str(self.site)}
        if self.trial:
            environment["OMP_NUM_THREADS"] = "1"  # networks this small are slowed down by a second thread
        # Away from the checkout, whose micl_zoo/ has no micl_zoo.training below it; in a process group of its own, so
        # that what the job has started goes with it.
        with log.open("w", encoding="utf-8") as said:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=self.work,
                env=environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            try:
                process.wait(max(0.0, limit))
            except subprocess.TimeoutExpired:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
                raise Stopped(f"after {limit:.0f} seconds") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {text[-1500:]}")
        return text

    def lines(self, what: str, limit: float) -> dict[str, Any]:
        """Figures that the hidden command `what` of this file prints, one JSON object per line, until it is stopped."""
        log, stopped = self.work / f"{what}.log", {}
        try:
            self.run([__file__, what, "--device", self.device], limit, log)
        except Stopped as error:
            stopped = {"stopped": str(error)}
        found = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        return {key: value for line in found for key, value in line.items()} | stopped


def lay_out(site: Path) -> Path:
    """Link the checkout's packages together as an installation lays them out; returns what belongs on sys.path."""
    package = site / "micl_zoo"
    package.mkdir(parents=True, exist_ok=True)
    for place in [*(ROOT / "micl_zoo").iterdir(), ROOT / "training", ROOT / "export"]:
        link = package / place.name
        if place.name != "__pycache__" and not link.is_symlink():
            link.symlink_to(place)
    return site


@click.group()
def main() -> None:
    """Measure and train on a GPU that is there for minutes only."""


def session_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of both commands."""
    folder = click.Path(path_type=Path, resolve_path=True)
    for option in (
        click.option("--out", required=True, type=folder, help="Folder for the results."),
        click.option("--work", default="work", show_default=True, type=folder, help="Folder for all that is bigger."),
        click.option("--data", default="data", show_default=True, type=folder, help="Folder with train-*.parquet."),
        click.option("--commit", envvar="MICL_ZOO_COMMIT", help="Commit of this code, where no .git lies beside it."),
        click.option("--trial", is_flag=True, help="Small sizes on the CPU."),
    ):
        command = option(command)
    return command


def started(what: str, out: Path, work: Path, seconds: float, commit: str | None, trial: bool) -> Session:
    """A session whose jobs know the commit."""
    if commit:
        os.environ["MICL_ZOO_COMMIT"] = commit
    command = f"python benchmarks/gpu.py {what} --seconds {seconds:g}" + " --trial" * trial
    return Session(out, work, seconds, trial, {"what": what, "command": command, "seconds": {}})


@main.command()
@session_options
@click.option("--seconds", type=float, default=240, show_default=True, help="Time for all of it.")
def first(out: Path, work: Path, data: Path, commit: str | None, trial: bool, seconds: float) -> None:
    """Measure the card, attention, the training step and extraction, and run the tests that need a GPU."""
    session = started("first", out, work, seconds, commit, trial)
    session.job("card", 60, lambda limit: session.lines("card", limit))
    session.job("attention", 75, lambda limit: session.lines("attention", limit))
    session.job("tests", 90, lambda limit: gpu_tests(session, limit))
    for recipe in STEP_RECIPES:
        session.job(f"step {recipe}", 90, partial(step, session, recipe))
    count = "9" if trial else "128"
    session.job("photographs", 30, partial(session.run, [__file__, "photographs", str(session.photos), count]))
    session.job("extract", 90, lambda limit: extraction(session, limit))


def gpu_tests(session: Session, limit: float) -> str:
    """The last line of pytest."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-c", str(ROOT / "pyproject.toml")]
    return session.run([*words, "--rootdir", str(ROOT), str(ROOT / "tests" / "test_gpu.py")], limit).splitlines()[-1]


def step(session: Session, recipe: str, limit: float) -> dict[str, Any]:
    """The main figures of a record of benchmarks/step.py, which is left in OUT."""
    file = session.out / f"step-{recipe}.json"
    words = [str(BENCHMARKS / "step.py"), recipe, "--device", session.device, "-o", str(file)]
    session.run([*words, *["--trial"] * session.trial], limit)
    found = json.loads(file.read_text(encoding="utf-8"))
    return {key: found[key] for key in STEP_FIGURES}


def extraction(session: Session, limit: float) -> dict[str, Any]:
    """Figures of `micl-zoo extract` and of its model alone; no other contenders, whose processors would wait."""
    file = session.out / "extract.json"
    words = [str(BENCHMARKS / "extract.py"), str(session.photos), "--device", session.device, "--out", str(file)]
    words += ["--trial"] if session.trial else ["--images", "4096", "--batch-size", "256", "--seconds", "8"]
    only = ("extract auto", "model fp32" if session.trial else "model bf16")
    session.run([*words, *(word for name in only for word in ("--only", name))], limit)
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["figures"]
    return figures


@main.command()
@session_options
@click.option("--seconds", type=float, default=470, show_default=True, help="Time for all of it.")
@click.option("--recipe", default="vit_s16.tin200", show_default=True, help="Recipe to train.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one number of the recipe.")
def train(
    out: Path,
    work: Path,
    data: Path,
    commit: str | None,
    trial: bool,
    seconds: float,
    recipe: str,
    changes: tuple[str, ...],
) -> None:
    """Train a recipe for the time there is, to the end of its schedule. k-NN is left to `micl-zoo eval`, elsewhere."""
    session = started("train", out, work, seconds, commit, trial)
    session.results["command"] += f" --recipe {recipe}" + "".join(f" --set {change}" for change in changes)
    base = ["-m", "micl_zoo", "train", recipe, "--data", str(data / "train-*.parquet"), "--device", session.device]
    base += ["--smoke"] * trial

    def words(run: str, **chosen: float | str) -> list[str]:
        """The command of a run; what was asked for on the command line wins over what is chosen here."""
        sets = [*(f"{key}={value}" for key, value in chosen.items()), *changes]
        return [*base, "--out", str(work / run), *(word for change in sets for word in ("--set", change))]

    session.job("rate", 150, lambda limit: learn_rate(session, words("probe"), limit))
    if isinstance(session.results["rate"], dict):
        session.job("train", seconds, lambda limit: train_run(session, partial(words, "run"), limit))
    session.job("encoder", seconds, lambda limit: hand_over(session, limit), least=CLOSING_SECONDS)


def learn_rate(session: Session, words: list[str], limit: float) -> dict[str, float]:
    """Images/s in the second half of a short run, the size of the corpus, and the seconds beside the steps."""
    run, begun = session.work / "probe", time.monotonic()
    steps = PROBE_STEPS_TRIAL if session.trial else PROBE_STEPS
    session.run([*words, "--max-steps", str(steps)], limit)
    spent = time.monotonic() - begun
    rates = [line["images_per_second"] for line in metrics(run) if "loss" in line]
    rate = statistics.median(rates[len(rates) // 2 :])
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    start_up = max(0.0, spent - len(rates) * record["recipe"]["batch_size"] / rate)
    return {"images_per_second": rate, "images": record["data"]["images"], "start_up_seconds": round(start_up, 1)}


def train_run(session: Session, words: Callable[..., list[str]], limit: float) -> dict[str, Any]:
    """Train for as many epochs as end in time; past it, the run is told to stop and leaves a checkpoint."""
    found = session.results["rate"]
    seconds = MARGIN * (limit - CLOSING_SECONDS - found["start_up_seconds"])
    epochs = round(seconds * found["images_per_second"] / found["images"], 2)
    if epochs <= 0:
        raise RuntimeError(
            f"too little time for a run: {limit:.0f} seconds are left, starting takes {found['start_up_seconds']}"
        )
    warm_up = round(0.04 * epochs, 3)
    told = {"epochs": epochs, "warmup_epochs": warm_up}
    # No checkpoint but the last: each would take time from the steps.
    command = words(epochs=epochs, warmup_epochs=warm_up, save_dtype="float16", checkpoint_minutes=60)
    try:
        session.run(command, limit - CLOSING_SECONDS)
    except Stopped as error:
        return {**told, "stopped": str(error)}
    return {**told, "finished": True}


def hand_over(session: Session, limit: float) -> dict[str, Any]:
    """Put the run's record, its metrics and its encoder into OUT."""
    run = session.work / "run"
    if not (run / "run.json").exists():
        raise RuntimeError("there was no run")
    (session.out / "run.json").write_bytes((run / "run.json").read_bytes())
    lines = metrics(run)
    with gzip.open(session.out / "metrics.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines[:: 1 + len(lines) // METRIC_LINES])
    encoder = run / "encoder"
    if not encoder.exists():
        encoder = session.work / "stopped"
        session.run([__file__, "rescue", str(run), str(encoder)], limit)
    (session.out / "config.json").write_bytes((encoder / "config.json").read_bytes())
    weights = (encoder / "model.safetensors").read_bytes()
    pieces = [weights[at : at + PIECE_BYTES] for at in range(0, len(weights), PIECE_BYTES)]
    for number, piece in enumerate(pieces):
        (session.out / f"weights.{number:02d}").write_bytes(piece)
    found = {"pieces": len(pieces), "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    return found if len(pieces) <= PIECES else {**found, "note": f"more than {PIECES} pieces: over eight files in all"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without one that was cut off."""
    file = run / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@main.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("file", type=click.Path(path_type=Path))
def join(out: Path, file: Path) -> None:
    """Put the pieces of an encoder in OUT together to FILE, and its config.json beside it."""
    wanted = json.loads((out / "session.json").read_text(encoding="utf-8")).get("encoder")
    if not isinstance(wanted, dict) or "sha256" not in wanted:
        raise click.ClickException(f"session.json in {str(out)!r} tells of no encoder: {wanted}")
    weights = b"".join(piece.read_bytes() for piece in sorted(out.glob("weights.*")))
    found = hashlib.sha256(weights).hexdigest()
    if not weights or found != wanted["sha256"]:
        raise click.ClickException(
            f"the pieces in {str(out)!r} have {len(weights):,} bytes and sha256 {found}, session.json says "
            f"{wanted['bytes']:,} and {wanted['sha256']}: fetch all weights.* again"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(weights)
    file.with_name("config.json").write_bytes((out / "config.json").read_bytes())
    click.echo(f"{file}: {len(weights):,} bytes, sha256 {found}")


@main.command(hidden=True)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def rescue(run: Path, folder: Path) -> None:
    """Write the encoder of a stopped run, that of its newest checkpoint, into FOLDER in float16."""
    import micl_zoo
    from micl_zoo.zoo.weights import save_weights

    encoder = micl_zoo.load(weights=run, device="cpu")
    provenance = {"run": "stopped before its end", "weights_sha256": encoder.weights_sha256}
    save_weights(folder, encoder.vit.state_dict(), encoder.config, provenance, "float16")


@main.command("photographs", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("count", type=int)
def photographs_command(folder: Path, count: int) -> None:
    """Make the photographs of the extraction job, unless they are there."""
    from toys import photographs

    if not folder.exists():
        photographs(folder, count)
    show({"images": count})


@main.command(hidden=True)
@click.option("--device", required=True)
def card(device: str) -> None:
    """Print where this runs, the matrix rate and the copy rate."""
    import torch
    from record import made_on

    from micl_zoo.training.pretraining.bench import matrix_rate, timed

    target = torch.device(device)
    show(made_on(target))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    show({"matrix_tflops": round(matrix_rate(target, dtype, seconds=1) / 1e12, 3), "matrix_dtype": str(dtype)})
    block = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=target).random_()
    other = torch.empty_like(block)
    copy = min(timed(lambda: other.copy_(block), target) for _ in range(5))
    show({"copy_tb_per_s": round(2 * COPY_BYTES[device] / copy / 1e12, 4)})  # read once and written once


@main.command(hidden=True)
@click.option("--device", required=True)
def attention(device: str) -> None:
    """Print milliseconds of attention forward and backward, by shape and way to compute it."""
    import torch
    from torch import Tensor
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from micl_zoo.training.pretraining.bench import timed

    target = torch.device(device)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v  # (S, H, T, 64)

    def broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Without matrix products; the compiler makes one kernel of it."""
        scores = (q[:, :, :, None].float() * k[:, :, None].float()).sum(-1) * q.shape[-1] ** -0.5  # (S, H, T, T)
        return (scores.softmax(-1)[..., None] * v[:, :, None].float()).sum(3).to(v.dtype)

    def by(backend: SDPBackend) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    ways: dict[str, Callable[..., Tensor]] = {
        "default": F.scaled_dot_product_attention,
        "flash": by(SDPBackend.FLASH_ATTENTION),
        "cudnn": by(SDPBackend.CUDNN_ATTENTION),
        "efficient": by(SDPBackend.EFFICIENT_ATTENTION),
        "plain": plain,
        "plain compiled": torch.compile(plain, dynamic=False),
        "broadcast compiled": torch.compile(broadcast, dynamic=False),
    }
    for label, (sequences, heads, tokens) in (ATTENTION if device == "cuda" else ATTENTION_TRIAL).items():
        shape = (sequences, heads, tokens, 64)
        q, k, v, up = (torch.randn(shape, device=target, dtype=torch.bfloat16) for _ in range(4))
        given = [one.requires_grad_() for one in (q, k, v)]
        for name, way in ways.items():

            def once(way: Callable[..., Tensor] = way, given: list[Tensor] = given, up: Tensor = up) -> None:
                torch.autograd.grad(way(*given), given, up)

            def several(once: Callable[[], None] = once) -> None:
                for _ in range(20):  # in a row, so that the card and not the launch of its kernels is timed
                    once()

            try:
                once()
                several()
                milliseconds: Any = round(1e3 / 20 * statistics.median(timed(several, target) for _ in range(5)), 4)
            except Exception as error:  # not every backend takes every shape
                milliseconds = f"{type(error).__name__}: {error}"[:120]
            show({f"{label}: {name}": milliseconds})


def show(found: dict[str, Any]) -> None:
    """One line of JSON, at once."""
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
