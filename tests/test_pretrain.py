"""The loop: it learns, goes on to the bit, stops when it must, and leaves all that is promised on disk."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import TWIN, picture
from damaged import encoded
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from traps import set_traps

import micl_zoo
from micl_zoo.errors import SourceError, TrainingError, UsageError
from micl_zoo.extraction.processes import python
from micl_zoo.files import file_sha256
from micl_zoo.training.evaluation import knn as knn_module
from micl_zoo.training.micl import position_table
from micl_zoo.training.pretraining import pretrain as module
from micl_zoo.training.pretraining.pretrain import pretrain
from micl_zoo.training.recipes import RECIPES, get_recipe
from micl_zoo.training.run import rundir
from micl_zoo.training.run.step import fsdp_works_on
from micl_zoo.zoo.ours import DEFAULT
from micl_zoo.zoo.weights import header

RECIPE = "vit_ti16.tin200"


def losses(run: Path) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["accuracy"], line["lr"]) for line in lines if "loss" in line]


def same_end(*runs: Path) -> dict[str, torch.Tensor]:
    """The weights that all of these runs have left, after the same losses."""
    assert all(losses(run) == losses(runs[0]) for run in runs)
    first, *others = (load_file(run / "encoder" / "model.safetensors") for run in runs)
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    return first


def goes_on(folder: Path, place: Path, steps: int, **how: Any) -> dict[str, torch.Tensor]:
    """Interrupt a run after some steps and resume it: to the bit what one gives that was left alone."""
    whole, parts = place / "whole", place / "parts"
    pretrain(RECIPE, folder, whole, device="cpu", workers=0, **how)
    assert pretrain(RECIPE, folder, parts, device="cpu", workers=0, max_steps=steps, **how) == parts
    with (parts / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {steps}, "loss": 0.1}}\n{{"step": {steps + 1}, "lo')  # after the checkpoint; one cut off
    pretrain(RECIPE, folder, parts, device="cpu", workers=0, **how)
    return same_end(whole, parts)


def test_a_run_learns_and_leaves_what_is_promised(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run = image_folder(32), tmp_path / "run"
    made = pretrain(RECIPE, folder, run, overrides=[*TWIN, "epochs=20", "base_lr=0.05"], device="cpu")
    assert made == run / "encoder" / "model.safetensors"
    history = losses(run)
    assert [step for step, *_ in history] == list(range(80))
    first, last = (sum(loss for _, loss, *_ in part) / 8 for part in (history[:8], history[-8:]))
    assert last < first - 0.3

    record = json.loads((run / "run.json").read_text())
    assert record["recipe"]["embed_dim"] == 32
    assert record["data"]["images"] == 32
    assert len(record["data"]["fingerprint"]) == 64
    assert record["result"]["images_seen"] == 640
    assert record["machine"]["cores"] == os.cpu_count()
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert header(made)["provenance"]["recipe"] == record["recipe"]

    before = made.stat().st_mtime_ns
    assert pretrain(RECIPE, folder, run, overrides=[*TWIN, "epochs=20", "base_lr=0.05"], device="cpu") == made
    assert made.stat().st_mtime_ns == before  # a finished run is left alone
    encoder = micl_zoo.load(weights=run / "encoder", device="cpu")
    assert encoder.embed(sorted(folder.glob("*.jpg"))).shape == (16, 32)


@pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < (1, 0, 26),
    reason="timm reads safetensors in a local folder from 1.0.26 on",
)
def test_the_encoder_folder_loads_into_timm_without_us(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(RECIPE, image_folder(8), run, overrides=[*TWIN, "epochs=1", "warmup_epochs=0"], device="cpu")
    model = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True)
    pixels = torch.randn(2, 3, 32, 32)
    encoder = micl_zoo.load(weights=run / "encoder", device="cpu")
    with torch.inference_mode():
        torch.testing.assert_close(encoder(pixels), model.eval()(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_an_interrupted_run_goes_on_to_the_bit(image_folder: Callable[..., Path], tmp_path: Path, cache: str) -> None:
    goes_on(image_folder(24), tmp_path, 5, overrides=[*TWIN, f"cache={cache}"])
    assert len(losses(tmp_path / "whole")) == 12


def test_other_choices_of_the_method_go_on_to_the_bit(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    choices = ["views=3", "mask_ratio=0.2", "pooled_token=mean", "positions=learned", "image_size=64"]  # crops of 32
    options = [*TWIN, "epochs=2", *choices]
    end = goes_on(image_folder(24), tmp_path, 2, overrides=options)
    start = module.initial_model(get_recipe(RECIPE, options)).vit.pos_embed
    moved = (end["pos_embed"].float() - start).abs().amax(2)[0]  # (1 + 64,)
    assert (moved > 0).all()


def test_the_encoder_has_the_class_position_that_it_was_trained_with(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    options = [*TWIN, "epochs=1", "class_position=centre", "save_dtype=float32"]
    pretrain(RECIPE, image_folder(8), tmp_path / "run", overrides=options, device="cpu")
    table = load_file(tmp_path / "run" / "encoder" / "model.safetensors")["pos_embed"]
    assert torch.equal(table[0], position_table(32, (4, 4), (4, 4), class_position="centre"))
    assert table[0, 0].abs().max() > 0


def test_a_run_goes_on_that_is_older_than_a_field_of_its_recipe(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, run = image_folder(16), tmp_path / "run"
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu", max_steps=1)
    record = json.loads((run / "run.json").read_text())
    for field in ("views", "pooled_token", "class_position", "positions", "grey_probability"):
        del record["recipe"][field]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(TrainingError, match="holds another run: views: 2 there, 3 asked for"):
        pretrain(RECIPE, folder, run, overrides=[*TWIN, "views=3"], device="cpu")
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu", max_steps=2)
    assert [step for step, *_ in losses(run)] == [0, 1]
    del record["data"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(TrainingError, match="holds another run: images: None there, 16 asked for"):
        pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu")


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own doings
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compiling needs a C++ compiler")
def test_a_compiled_run_goes_on_to_the_bit_and_is_the_eager_one(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, plain = image_folder(24), [*TWIN, "depth=1"]
    options = [*plain, "compile=true"]
    whole, parts, eager = (tmp_path / name for name in ("whole", "parts", "eager"))
    torch.compiler.reset()  # as in a new process, whatever other tests have compiled
    pretrain(RECIPE, folder, whole, overrides=options, device="cpu")
    pretrain(RECIPE, folder, parts, overrides=options, device="cpu", max_steps=5)
    torch.compiler.reset()
    pretrain(RECIPE, folder, parts, overrides=options, device="cpu")
    pretrain(RECIPE, folder, eager, overrides=plain, device="cpu")
    assert losses(whole) == losses(parts)
    assert [loss for _, loss, *_ in losses(whole)] == pytest.approx([loss for _, loss, *_ in losses(eager)], abs=1e-4)


def until(done: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not done() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done(), f"ended with {process.poll()}"


def train_command(recipe: str, folder: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "micl_zoo", "train", recipe, "--data", str(folder), "--device", "cpu"),
        *("--workers", "0", *options),
    ]


def killed_after(steps: int, command: list[str], run: Path) -> None:
    """Start a run, and kill it once it has taken some steps."""
    process = subprocess.Popen(command)
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= steps, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still running
    assert not (run / "encoder").exists()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != DEFAULT)) for name in sorted(RECIPES)],
)
def test_the_smoke_twin_of_every_recipe_is_killed_and_goes_on(
    image_folder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder, options = image_folder(16), ["epochs=60"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sets = [word for change in options for word in ("--set", change)]
    killed_after(2, train_command(name, folder, "--smoke", *sets, "--out", str(killed)), killed)
    for run in (killed, whole):
        made = pretrain(name, folder, run, overrides=options, smoke=True, device="cpu", workers=0)
    same_end(whole, killed)
    assert len(losses(whole)) == 60
    assert (killed / "encoder/model.safetensors").stat().st_size > 0
    assert micl_zoo.load(weights=made.parent, device="cpu").name == name.partition(".")[0] + ".smoke"


def kill_one_rank(process: subprocess.Popen[bytes], which: int) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("the ranks are found by /proc, which is Linux's")
    pids = [int(pid) for pid in children.read_text().split()]
    ranks = [pid for pid in pids if b"micl_zoo.training" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[which], signal.SIGKILL)


def family(pid: int) -> list[int]:
    """A process and all that come of it."""
    children = [text for one in Path(f"/proc/{pid}/task").glob("*/children") for text in one.read_text().split()]
    return [pid, *(one for child in children for one in family(int(child)))]


def listening(pid: int) -> set[str]:
    """Addresses at which a process waits for connections or datagrams, as /proc writes them."""
    links = [str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
    found = set()
    for table, states in (("tcp", ("0A",)), ("tcp6", ("0A",)), ("udp", ("07",)), ("udp6", ("07",))):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, here, _, state, *rest = line.split()
            if state in states and f"socket:[{rest[5]}]" in links:
                found.add(here.partition(":")[0])
    return found


def test_ranks_of_one_machine_are_out_of_reach_and_say_once_why_they_end(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    if not Path("/proc/net/tcp").exists():
        pytest.skip("what listens is found by /proc, which is Linux's")
    folder, traps, run = image_folder(32), tmp_path / "traps", tmp_path / "run"
    sprung = set_traps(traps)
    words = ["train", RECIPE, "--data", str(folder), "--smoke", "--device", "cpu", "--gpus", "2", "--out", str(run)]
    command = python("from micl_zoo.cli import main; main()", *words, "--set", "epochs=100000")
    refused = subprocess.run(command, cwd=traps, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert refused.stderr.count("2 processes cannot share 1 group alike") == 1
    assert len(refused.stderr.splitlines()) == 1, refused.stderr

    process = subprocess.Popen([*command, "--set", "contrast_batch=8"], cwd=traps, stderr=subprocess.PIPE)
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 2, process)
    here = [address for pid in family(process.pid) for address in listening(pid)]
    assert set(here) == {"0100007F"}, here  # 127.0.0.1
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"stopped by SIGTERM after step" in said
    assert not sprung.exists(), sprung.read_text()


def test_two_ranks_killed_at_a_random_step_go_on_as_one(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, options = image_folder(32), ["contrast_batch=8", "epochs=40"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sets = [word for change in options for word in ("--set", change)]
    command = train_command(RECIPE, folder, "--smoke", *sets, "--gpus", "2", "--out", str(killed))
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    steps = int(torch.randint(2, 40, ()).item())
    until(lambda: (killed / "metrics.jsonl").exists() and len(losses(killed)) >= steps, process)
    kill_one_rank(process, steps % 2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"ended with code -9" in said or b"another rank is gone" in said
    assert not (killed / "encoder").exists()
    for run in (killed, whole):
        pretrain(RECIPE, folder, run, overrides=options, smoke=True, device="cpu")
    assert len(losses(whole)) == 80
    assert [loss for _, loss, *_ in losses(killed)] == pytest.approx([loss for _, loss, *_ in losses(whole)], abs=1e-6)
    assert json.loads((killed / "run.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_ranks_start_again_after_one_has_died(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, options = (
        image_folder(32),
        ["contrast_batch=8", "epochs=100", *["parallel=fsdp"] * fsdp_works_on(torch.device("cpu"))],
    )
    whole, restarted = tmp_path / "whole", tmp_path / "restarted"
    sets = [word for change in options for word in ("--set", change)]
    more = ["--smoke", *sets, "--gpus", "2", "--restarts", "1"]
    process = subprocess.Popen(train_command(RECIPE, folder, *more, "--out", str(restarted)))
    until(lambda: (restarted / "metrics.jsonl").exists() and len(losses(restarted)) >= 5, process)
    kill_one_rank(process, 1)
    assert process.wait(timeout=120) == 0
    pretrain(RECIPE, folder, whole, overrides=options, smoke=True, device="cpu")
    assert len(losses(whole)) == 200
    assert [loss for _, loss, *_ in losses(restarted)] == pytest.approx([n for _, n, *_ in losses(whole)], abs=1e-6)


def test_a_request_to_stop_writes_a_checkpoint(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run = image_folder(16), tmp_path / "run"
    options = ["--smoke", "--set", "epochs=100000", "--set", "checkpoint_minutes=60"]
    process = subprocess.Popen(train_command(RECIPE, folder, *options, "--out", str(run)), stderr=subprocess.PIPE)
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    taken = losses(run)[-1][0] + 1
    assert process.returncode == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM after step {taken}, with a checkpoint" in said.decode()
    assert (run / "checkpoints" / f"step-{taken:08d}.safetensors").exists()


def test_a_folder_in_use_is_refused(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run = image_folder(16), tmp_path / "run"
    process = subprocess.Popen(
        train_command(RECIPE, folder, "--smoke", "--set", "epochs=100000", "--out", str(run)), stderr=subprocess.DEVNULL
    )
    until((run / "run.json").exists, process)
    with pytest.raises(TrainingError, match="another process is training in"):
        pretrain(RECIPE, folder, run, overrides=["epochs=100000"], smoke=True, device="cpu")
    process.kill()
    process.wait()


def test_a_loss_that_stays_not_finite_stops_the_run_at_the_second_try(
    image_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, run = image_folder(16), tmp_path / "r"
    with pytest.raises(TrainingError, match=r"not finite|the loss is nan") as caught:
        pretrain(RECIPE, folder, run, overrides=[*TWIN, "base_lr=1e30"], device="cpu")
    assert "it was not the first time: stopped" in str(caught.value)
    assert "base_lr" in str(caught.value)
    assert "back to the last checkpoint, once" in caplog.text
    assert not (run / "encoder").exists()
    saved = json.loads(next(run.glob("nonfinite-step-*.json")).read_text())
    assert set(saved["ids"]) <= {path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")}
    assert len(saved["ids"]) == 8


def rolls_back(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    """Give a run of 12 steps pixels that are no numbers at its seventh, once: it ends as one that had none."""
    whole, flawed = place / "whole", place / "flawed"
    pretrain(RECIPE, folder, whole, device="cpu", **how)
    step, calls = module.TrainStep.__call__, 0

    def once(self: module.TrainStep, patches: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        return step(self, patches * (float("nan") if calls == 7 else 1), views)

    monkeypatch.setattr(module.TrainStep, "__call__", once)
    pretrain(RECIPE, folder, flawed, device="cpu", **how)
    assert calls > 12
    same_end(whole, flawed)
    events = [json.loads(line) for line in (flawed / "metrics.jsonl").read_text().splitlines() if '"event"' in line]
    assert [(event["event"], event["detail"]) for event in events] == [("rolled back", "the loss is nan at step 6")]


def test_a_loss_that_is_not_finite_once_is_rolled_back(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolls_back(image_folder(24), tmp_path, monkeypatch, overrides=TWIN)


def test_collapse_stops_the_run_with_advice(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(8.0).log(), torch.tensor(0.1)

    monkeypatch.setattr(module.TrainStep, "__call__", collapsed)
    options = [*TWIN, "epochs=200", "checkpoint_minutes=10"]
    with pytest.raises(TrainingError, match=r"gives every image the same embedding \(ln 8 = 2.079\): stopped.*base_lr"):
        pretrain(RECIPE, image_folder(16), tmp_path / "r", overrides=options, device="cpu")
    assert module.COLLAPSE_STEPS <= len(losses(tmp_path / "r")) < 400


def test_a_folder_with_another_run_is_refused(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run = image_folder(16), tmp_path / "run"
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu", max_steps=1)
    with pytest.raises(TrainingError, match=r"holds another run: temperature: 0\.07 there, 0\.1 asked for"):
        pretrain(RECIPE, folder, run, overrides=[*TWIN, "temperature=0.1"], device="cpu")
    (folder / "new.jpg").write_bytes((folder / "000.jpg").read_bytes())
    with pytest.raises(TrainingError, match="images: 16 there, 17 asked for"):
        pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu")
    with pytest.raises(TrainingError, match="exists and is no run folder"):
        pretrain(RECIPE, folder, folder, overrides=TWIN, device="cpu")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    image_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, run, whole = image_folder(24), tmp_path / "run", tmp_path / "whole"
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu", max_steps=7)
    newest = max((run / "checkpoints").glob("*.safetensors"))
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1  # one bit
    newest.write_bytes(data)
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu")
    assert "step-00000007.safetensors is damaged" in caplog.text
    pretrain(RECIPE, folder, whole, overrides=TWIN, device="cpu")
    assert losses(run) == losses(whole)


def test_a_run_whose_checkpoints_are_all_damaged_stops(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run = image_folder(16), tmp_path / "run"
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu", max_steps=2)
    for file in (run / "checkpoints").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"every checkpoint in .* is damaged"):
        pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu")


def test_checkpoints_have_checksums_and_stay_by_policy(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run = image_folder(24), tmp_path / "run"  # 3 steps an epoch, 12 in all
    pretrain(RECIPE, folder, run, overrides=[*TWIN, "keep_epochs=2"], device="cpu")
    files = sorted((run / "checkpoints").glob("*.safetensors"))
    steps = [int(file.stem.removeprefix("step-")) for file in files]
    assert steps == [6, 10, 11, 12]  # every second epoch, and the last two besides those
    for file in files:
        said, name = file.with_name(file.name + ".sha256").read_text().split()
        assert (said, name) == (hashlib.sha256(file.read_bytes()).hexdigest(), file.name)
    assert len(list((run / "checkpoints").iterdir())) == 2 * len(files)


def test_a_full_disk_stops_the_run_and_leaves_what_is_there(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run, whole = image_folder(24), tmp_path / "run", tmp_path / "whole"
    save, saved = rundir.save_file, 0

    def full(tensors: dict[str, torch.Tensor], file: Path, header: dict[str, str]) -> None:
        nonlocal saved
        saved += 1
        if saved == 6:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file, header)

    monkeypatch.setattr(rundir, "save_file", full)
    with pytest.raises(TrainingError, match=r"the disk of .* is full .*make room and run the same command"):
        pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu")
    assert not list((run / "checkpoints").glob("*.tmp"))
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu")  # there is room again
    pretrain(RECIPE, folder, whole, overrides=TWIN, device="cpu")
    assert losses(run) == losses(whole)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(TrainingError, match=r"a checkpoint takes .* MiB, 0 are free"):
        pretrain(RECIPE, folder, tmp_path / "other", overrides=TWIN, device="cpu")


def labelled(folder: Path, name: str, count: int) -> None:
    cells = [{"bytes": encoded(picture(n % 4, 40, 40), "PNG"), "path": f"{n}.png"} for n in range(count)]
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": cells, "label": [n % 4 for n in range(count)]}), folder / f"{name}.parquet")


@pytest.fixture
def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the images of k-NN decoded by the process itself: starting others takes longer than all else here."""
    monkeypatch.setattr(knn_module, "embed_labelled", functools.partial(knn_module.embed_labelled, workers=0))


@pytest.mark.usefixtures("without_processes")
def test_knn_and_the_views_are_shown_while_it_trains(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    run, sets = tmp_path / "run", tmp_path / "four"
    labelled(sets, "train", 16)
    labelled(sets, "test", 8)
    pretrain(RECIPE, image_folder(24), run, overrides=TWIN, device="cpu", knn=[sets], knn_minutes=0, knn_images=16)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["knn"] for line in lines if "knn" in line}
    assert set(found) == set(range(1, 13))
    assert found[12] == {"four": 1.0}  # each picture asked about is among those searched
    with Image.open(run / "views.png") as views:
        assert views.width > 100
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no train part with labels in .* expected train\*\.parquet"):
        pretrain(RECIPE, image_folder(24), tmp_path / "other", overrides=TWIN, device="cpu", knn=[tmp_path / "empty"])


def test_a_damaged_image_is_named_and_the_run_goes_on(
    image_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, run = image_folder(16), tmp_path / "run"
    (folder / "004.jpg").write_bytes(b"not a picture")
    pretrain(RECIPE, folder, run, overrides=[*TWIN, "cache=none"], device="cpu", workers=0)
    refused = json.loads((run / "run.json").read_text())["data"]["refused"]
    assert [line[:2] for line in refused] == [["004.jpg", "not_an_image"]]
    assert "004.jpg is left out" in caplog.text


def test_a_corpus_smaller_than_a_batch_trains_nothing(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has 5 usable images .* takes 8"):
        pretrain(RECIPE, image_folder(5), tmp_path / "r", overrides=TWIN, device="cpu")
    assert not (tmp_path / "r").exists()  # so that the same --out takes more images


def test_a_ratio_that_leaves_no_view_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leaves no patch for three views"):
        pretrain(RECIPE, "nowhere", tmp_path / "r", overrides=["mask_ratio=0.97"], device="cpu")


@pytest.mark.usefixtures("without_processes")
def test_knn_goes_by_the_clock_and_changes_no_number(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, sets, options = image_folder(24), tmp_path / "four", [*TWIN, "checkpoint_minutes=60"]
    labelled(sets, "train", 8)
    labelled(sets, "test", 4)
    asked: dict[str, Any] = {"knn": [sets], "knn_minutes": 0, "knn_images": 8}
    pretrain(RECIPE, folder, tmp_path / "measured", overrides=options, device="cpu", **asked)
    pretrain(RECIPE, folder, tmp_path / "plain", overrides=options, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "measured" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn" in line] == list(range(1, 13))
    assert losses(tmp_path / "measured") == losses(tmp_path / "plain")
    checkpoints = sorted((tmp_path / "measured" / "checkpoints").glob("*.safetensors"))
    assert [file.stem for file in checkpoints] == ["step-00000000", "step-00000012"]


def test_a_checkpoint_alone_is_an_encoder(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run, alone = image_folder(24), tmp_path / "run", tmp_path / "somewhere.safetensors"
    assert pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu", max_steps=5) == run
    shutil.copy(run / "checkpoints" / "step-00000005.safetensors", alone)
    encoder = micl_zoo.load(weights=alone, device="cpu")
    assert (encoder.embed_dim, encoder.transform.size) == (32, (32, 32))
    assert torch.equal(encoder.vit.blocks[0].mlp.fc1.weight, load_file(alone)["model.blocks.0.mlp.fc1.weight"])
    assert header(alone)["provenance"]["recipe"]["epochs"] == 4


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-????????.safetensors"))[-1]


def zeros_in_metrics(run: Path) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    damaged = [b"\0" * 70 + b"\n", b"[" * 100_000 + b"\n", b"\xff\n", b"[]\n", b'{"step": "3"}\n', b"\0" * 5000]
    file.write_bytes(b"".join([lines[0], damaged[0], *lines[1:], *damaged[1:]]))


def half_a_record(run: Path) -> None:
    text = (run / "run.json").read_bytes()
    (run / "run.json").write_bytes(text[: len(text) // 2] + b"\0" * 99)


def no_text_for_a_sum(run: Path) -> None:
    file = newest(run)
    file.with_name(f"{file.name}.sha256").write_bytes(b"\xff\xfe" * 40)


def strange_names(run: Path) -> None:
    for name in ("step-00000003 (copy)", "step-99999999x", "step-", "step-٣٣٣٣٣٣٣٣", "step-000000003"):
        shutil.copy(newest(run), run / "checkpoints" / f"{name}.safetensors")


def other_step_in_header(run: Path) -> None:
    shutil.copy(newest(run), file := run / "checkpoints" / "step-00000099.safetensors")
    file.with_name(f"{file.name}.sha256").write_text(f"{file_sha256(file)}  {file.name}\n")


DAMAGES = [zeros_in_metrics, half_a_record, no_text_for_a_sum, strange_names, other_step_in_header]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_over_what_a_power_cut_leaves(
    image_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    folder, whole, cut = image_folder(16), tmp_path / "whole", tmp_path / "cut"
    options = [*TWIN, "epochs=3", "warmup_epochs=0", "save_dtype=float32"]
    pretrain(RECIPE, folder, whole, overrides=options, device="cpu")
    pretrain(RECIPE, folder, cut, overrides=options, device="cpu", max_steps=4)
    damage(cut)
    made = pretrain(RECIPE, folder, cut, overrides=options, device="cpu")
    assert len(caplog.records) == 1, caplog.text
    same_end(whole, cut)
    mine, theirs = (json.loads((run / "run.json").read_text()) for run in (whole, cut))
    assert mine["recipe"] == theirs["recipe"]
    assert mine["data"]["fingerprint"] == theirs["data"]["fingerprint"]
    assert pretrain(RECIPE, folder, cut, overrides=options, device="cpu") == made


def test_a_record_without_a_checkpoint_to_make_it_again_is_said(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, run = image_folder(16), tmp_path / "run"
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu", max_steps=1)
    shutil.rmtree(run / "checkpoints")
    for text in ("", "{", "[]", '{"recipe": 3}', '{"recipe": {}, "data": []}', "[" * 100_000, "\0" * 50):
        (run / "run.json").write_text(text)
        with pytest.raises(TrainingError, match=r"run\.json' is damaged"):
            pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu")


def test_a_checkpoint_of_another_network_is_named(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run = image_folder(16), tmp_path / "run"
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu", max_steps=1)
    file = newest(run)
    with safe_open(file, framework="pt") as opened:
        header_ = opened.metadata()
    whole = load_file(file)
    integers = whole["model.norm.bias"].long()
    for name, other in (
        ("model.cls_token", torch.zeros(1, 1, 7)),
        ("exp_avg.cls_token", torch.zeros(1, 1, 7)),
        ("exp_avg_sq.norm.weight", None),
        ("model.norm.bias", None),
        ("model.norm.bias", integers),
    ):
        others = {key: value for key, value in whole.items() if key != name}
        save_file(others | ({} if other is None else {name: other}), file, header_)
        file.with_name(f"{file.name}.sha256").write_text(file_sha256(file))
        with pytest.raises(TrainingError, match=rf"is no checkpoint of this run: {name} must be"):
            pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu")
