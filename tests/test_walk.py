"""Every command with every kind of damaged input in each of its arguments: one sentence of our own, whatever it is."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import TWIN, picture
from damaged import encoded
from stores import make_store
from test_cli import every_command

from micl_zoo.cli import main

EVERY = 24  # of the damages, in a test that is not slow
HEAVY = 5  # times fewer of commands that take seconds
SECONDS = 30  # no command on inputs this small takes as long
TWIN_WORDS = [word for change in (*TWIN[:-1], "checkpoint_minutes=0") for word in ("--set", change)]
EXIT_CODES = (0, 1, 2, 3)

# Each command with good arguments; {slot} is what is replaced by a damaged input, one at a time.
COMMANDS = {
    "extract": "extract {source} -o {out} --weights {encoder} --workers 0 --precision fp32",
    "extract again": "extract {pictures} -o {store} --weights {folder} --workers 0 --precision fp32 --shard-rows 4",
    "extract onnx": "extract {pictures} -o {out} --weights {onnx} --backend onnx --workers 0",
    "search": "search {store} {image} --weights {encoder}",
    "search --id": "search {store} --id {name} --picture {sheet}",
    "verify": "verify {store} --weights {encoder} --sample 2",
    "convert": "convert {store} {array}",
    "convert tensors": "convert {store} {out}.safetensors",
    "info": "info {name}",
    "golden": "golden {name} -o {page}",
    "download": "download {name} --to {out}",
    "export": "export {encoder} -o {out} --images {source}",
    "adapt": "adapt {encoder} --data {source} --out {out} --set epochs=1 --max-steps 1 --device cpu --workers 0",
    "train": "train vit_ti16.tin200 {twin} --data {source} --out {out} --max-steps 1 --device cpu --workers 0",
    "train again": "train vit_ti16.tin200 {twin} --data {pictures} --out {begun} --device cpu --workers 0",
    "train --knn": "train vit_ti16.tin200 {twin} --data {pictures} --out {out} --knn {labelled} --workers 0",
    "train --plan": "train {name} --plan --data {source}",
    "bench data": "bench data {name} --data {source} --seconds 0.01 --workers 0",
    "report": "report {run} -o {page}",
    "eval knn": "eval knn {encoder} --data {labelled} --workers 0 -o {record}",
    "eval few-shot": "eval few-shot {encoder} --data {flat} --labels {labels} --workers 0",
    "eval linear": "eval linear --train {store} --test {store} --labels {labels} --epochs 1",
    "eval finetune": "eval finetune {encoder} --data {labelled} --out {out} --smoke --device cpu --workers 0",
    "card": "card {run} --eval {record} -o {page}",
    "card --record": "card {run} --record {page}",
    "card --check": "card vit_ti16.tin200 --check {page}",
    "publish": "publish {run} --repo a/b --dry-run --no-onnx --eval {record} -o {out}",
    "import": "import {checkpoint} -o {out}",
}
WITHOUT_INPUT = {"", "models", "doctor", "bench", "eval", "bench step", "eval all", "eval logreg"}  # as `eval linear`
Damage = Callable[[Path], Any]


class House(NamedTuple):
    """Good inputs by slot, and where damaged ones are made."""

    good: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> House:
    """Make one good input of each kind."""
    folder = tmp_path_factory.mktemp("walk")
    make_store(folder, encoder_folder, count=10)
    for part in ("train", "test"):
        for number in range(12):
            file = folder / "labelled" / part / "ab"[number % 2] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(file)
            flat = folder / "flat" / part / f"{number}.jpg"
            flat.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(flat)
    ids = [f"{number}.jpg" for number in range(12)] + micl_ids(folder / "store")
    lines = [f'"{name.replace(chr(34), chr(34) * 2)}",{"ab"[place % 2]}' for place, name in enumerate(ids)]
    (folder / "labels.csv").write_text("\n".join(["id,label", *lines]) + "\n", encoding="utf-8", newline="")
    torch.save({"model": {"x": torch.zeros(2)}}, folder / "checkpoint.pth")
    good = {
        "source": folder / "images",
        "pictures": folder / "images",
        "store": folder / "store",
        "encoder": encoder_folder,
        "folder": encoder_folder,
        "image": next((folder / "images").glob("0*.jpg")),
        "labelled": folder / "labelled",
        "flat": folder / "flat",
        "labels": folder / "labels.csv",
        "checkpoint": folder / "checkpoint.pth",
        "run": folder / "run",
        "begun": folder / "begun",
        "record": folder / "record.json",
        "onnx": folder / "onnx" / "model.onnx",
    }
    words = {name: str(path) for name, path in good.items()} | {"name": "vit_ti16.tin200"}
    made = House(words, folder)
    assert call([*filled(made, "train again"), "--max-steps", "1"]).code == 0
    assert call(filled(made, "train again", begun=words["run"])).code == 0
    assert call(filled(made, "eval knn")).code == 0
    export = ["export", str(encoder_folder), "-o", str(folder / "onnx")]
    assert call([*export, "--images", words["pictures"]]).code == 0
    (exported,) = (folder / "onnx").glob("*.onnx")
    exported.rename(good["onnx"])
    return made


def micl_ids(store: Path) -> list[str]:
    """The ids of a store."""
    return [name for part in sorted(store.glob("part-*")) for name in pq.read_table(part)["id"].to_pylist()]


class Called(NamedTuple):
    """What a command did."""

    code: int
    said: str
    foreign: BaseException | None  # what came out that is not ours


class Hung(BaseException):
    """No `except Exception` may take it for one of its own."""


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """End what hangs."""

    def ring(*_: object) -> None:
        raise Hung(f"it did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def call(words: list[str]) -> Called:
    """Run a command in this process."""
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # a hang in C, which an alarm does not end
    try:
        with alarm(SECONDS):
            result = CliRunner().invoke(main, words, input="")
    except Hung as hung:
        return Called(1, "", hung)
    finally:
        faulthandler.cancel_dump_traceback_later()
    ours = result.exception is None or isinstance(result.exception, SystemExit)
    return Called(result.exit_code, result.output, None if ours else result.exception)


def filled(house: House, command: str, **changes: str) -> list[str]:
    """The words of a command with good arguments, but for the changes; what it writes is new each time."""
    new = house.folder / "out"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    outs = {"out": "o", "array": "o.npy", "page": "o.html", "sheet": "o.png"}
    slots = {**{slot: str(new / name) for slot, name in outs.items()}, **house.good}
    for slot in ("store", "begun"):  # that commands write to
        if (
            f"{{{slot}}}" in COMMANDS[command]
            and slot not in changes
            and (house.folder / slot).exists()
            and "again" in command
        ):
            shutil.copytree(house.folder / slot, new / slot)
            slots[slot] = str(new / slot)
    slots |= changes
    words: list[str] = []
    for word in COMMANDS[command].split():
        words += TWIN_WORDS if word == "{twin}" else [word.format(**slots)]
    return words


def slots_of(command: str) -> list[str]:
    """What can be damaged."""
    return [word.strip("{}") for word in COMMANDS[command].split() if word[0] == "{" and word != "{twin}"]


# Damaged inputs that may stand in any argument: each makes something at a path, and may return other words instead.


def _bytes(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data) and None


def _absent(path: Path) -> None:
    pass


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _tree(path: Path) -> None:
    (path / "a" / "b").mkdir(parents=True)
    (path / "a" / "readme.md").write_text("x", encoding="utf-8")
    (path / "config.json").write_text("[" * 50_000, encoding="utf-8")


def _parquet(path: Path) -> None:
    pq.write_table(pa.table({"id": [None, "b"], "embedding": [1, 2]}), path)


DEEP = b"[" * 100_000
ANY: dict[str, Damage] = {
    "absent": _absent,
    "empty file": lambda path: path.touch(),
    "empty folder": lambda path: path.mkdir(),
    "folder of others": _tree,
    "noise": _bytes(np.random.default_rng(0).bytes(3000)),
    "text": _bytes(b"Dear Sir or Madam,\nnothing of interest.\n"),
    "not UTF-8": _bytes(b"\xff\xfe\xc3(\0\n" * 40),
    "NUL bytes": _bytes(bytes(5000)),
    "null": _bytes(b"null"),
    "list": _bytes(b'[1, {"a": null}]'),
    "deep JSON": _bytes(DEEP),
    "picture": _bytes(encoded(picture(1), "PNG")),
    "half a picture": _bytes(encoded(picture(1), "JPEG")[:300]),
    "pickle": _bytes(
        b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94."
    ),
    "header of gigabytes": _bytes(b"\xff\xff\xff\xff\xff\xff\0\0" + b"{" * 99),
    "header of another type": _bytes((20).to_bytes(8, "little") + b'[1, 2, {"a": null}] '),
    "tensor without end": _bytes(
        (70).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9999999999,9999],"data_offsets":[0,4]}}    '
    ),
    "parquet": _parquet,
    "half a parquet": _bytes(b"PAR1" + bytes(99) + b"\xff\xff\xff\x7fPAR1"),
    "zip": _bytes(b"PK\5\6" + b"\xff" * 18),
    "tar": _bytes(bytes(1024)),
    "pipe": _fifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "full device": lambda path: path.symlink_to("/dev/full"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": _loop,
    "below a file": lambda path: (path.write_bytes(b"x"), str(path / "below"))[1],
    "name too long": lambda path: str(path) + "x" * 5000,
    "name with escapes": lambda path: f"{path}\x1b[31m\u202e\n[red]",
    "name that is no UTF-8": lambda path: os.fsdecode(bytes(path) + b"\xff\xfe"),
    "empty name": lambda path: "",
    "standard input": lambda path: "-",
    "braces": lambda path: f"{path}{{0..99999999}}{{0..99999999}}.png",
    "stars": lambda path: str(path) + "*a" * 50,
    "bracket": lambda path: str(path) + "[",
    "bare scheme": lambda path: "s3://",
    "unknown scheme": lambda path: "nope://a/b.jpg",
    "broken address": lambda path: "http://[::1",
    "closed port": lambda path: "http://127.0.0.1:9/a.jpg",
}

# Damage inside what was good: by slot, (name, what to do to a copy).


def inside(slot: str, good: Path) -> Iterator[tuple[str, Damage]]:
    """Each file of a folder of ours, or the file itself, cut, emptied, missing, turned into something else."""
    files = [file for file in sorted(good.rglob("*")) if file.is_file()] if good.is_dir() else [good]
    kinds: dict[str, Callable[[Path], object]] = {
        "cut": lambda file: os.truncate(file, file.stat().st_size * 2 // 3),
        "emptied": lambda file: os.truncate(file, 0),
        "gone": lambda file: file.unlink(),
        "a folder": _folder,
        "a pipe": _pipe,
        "deep": lambda file: file.write_bytes(DEEP),
        "zeros": lambda file: file.write_bytes(bytes(2000)),
        "flipped": _flip,
    }
    for file in files:
        name = file.relative_to(good).as_posix() if good.is_dir() else ""
        if file.suffix in (".jpg", ".png") and slot not in ("image",):
            continue
        for what, change in kinds.items():
            yield f"{name or slot} {what}", _changed(good, name, change)
        if file.suffix in (".json", ".jsonl"):
            for at, damage in _json_damages(file):
                yield f"{name or slot} {at}", _changed(good, name, damage)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for at in range(5, len(data), max(1, len(data) // 7)):
        data[at] ^= 0x41
    file.write_bytes(bytes(data))


def _changed(good: Path, name: str, change: Callable[[Path], object]) -> Damage:
    def make(path: Path) -> None:
        if good.is_dir():
            shutil.copytree(good, path)
            change(path / name)
        else:
            shutil.copy(good, path)
            change(path)

    return make


WRONG: dict[str, Any] = {"null": None, "list": [[]], "text": "x\x1b", "huge": 10**40, "negative": -1, "gone": ...}


def _json_damages(file: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Each field of the first object, and of those below it, missing or of another type."""
    text = file.read_text(encoding="utf-8")
    first, *others = text.splitlines() if file.suffix == ".jsonl" else [text]
    for path in _paths(json.loads(first)):
        for what, value in WRONG.items():
            yield f"{'.'.join(map(str, path))} {what}", _with(json.loads(first), path, value, others)


def _with(body: Any, path: tuple[Any, ...], value: Any, others: list[str]) -> Callable[[Path], object]:
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    text = "\n".join([json.dumps(body), *others]) + "\n"
    return lambda file: file.write_text(text, encoding="utf-8")


def _paths(body: Any, depth: int = 2) -> Iterator[tuple[Any, ...]]:
    if isinstance(body, dict):
        for key, below in body.items():
            yield (key,)
            if depth > 1:
                yield from ((key, *rest) for rest in _paths(below, depth - 1))


CASES = [(command, slot) for command in COMMANDS for slot in dict.fromkeys(slots_of(command))]
OUTPUTS = ("out", "array", "page", "sheet")
TEXTS = ("name",)


@pytest.mark.parametrize(("command", "slot"), CASES, ids=lambda one: one)
@pytest.mark.parametrize("every", [EVERY, pytest.param(1, marks=pytest.mark.slow)])
def test_only_our_own_errors_come_out(
    house: House, command: str, slot: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("micl_zoo.sources.remote.WAITS", ())
    here = house.folder / "here"  # an output may be asked for at "-" or "s3:"
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    damages = dict(ANY)
    if slot in house.good and slot not in TEXTS and slot not in ("source", "pictures", "labelled", "flat", "folder"):
        damages |= inside(slot, Path(house.good[slot]))
    wrong = []
    every *= HEAVY if every > 1 and command in ("adapt", "report", "export") else 1
    first = zlib.crc32(f"{command} {slot}".encode()) % every  # so that together they are all kinds
    for place, (name, make) in list(enumerate(damages.items()))[first::every]:
        bad = house.folder / f"bad-{place}"
        words = filled(house, command, **{slot: "{bad}"})
        with contextlib.suppress(OSError, ValueError):
            _remove(bad)
        given = make(bad)
        words = [word.replace("{bad}", given if isinstance(given, str) else str(bad)) for word in words]
        found = call(words)
        if found.foreign is not None:
            last = traceback.extract_tb(found.foreign.__traceback__)[-1]
            wrong.append(f"{name}: {found.foreign!r:.200} in {last.filename}:{last.lineno}")
        elif found.code not in EXIT_CODES or "Traceback" in found.said:
            wrong.append(f"{name}: exit code {found.code}: {found.said[-200:]!r}")
        elif found.code in (1, 2) and not found.said.strip():
            wrong.append(f"{name}: exit code {found.code} without a word")
        for left in (bad, Path(given) if isinstance(given, str) and given.startswith(str(bad)) else bad):
            with contextlib.suppress(OSError, ValueError):
                _remove(left)  # an output by such a name, too: the next command would find it
    assert not wrong, f"{' '.join(filled(house, command, **{slot: 'BAD'}))}\n" + "\n".join(wrong)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def test_the_walk_goes_through_every_command() -> None:
    walked = {line.partition("{")[0].partition("-")[0].strip() for line in COMMANDS.values()}
    walked |= {" ".join(line.split()[:2]) for line in COMMANDS.values()} | {
        line.split()[0] for line in COMMANDS.values()
    }
    assert set(every_command()) - walked <= WITHOUT_INPUT | {"eval few-shot"}, set(every_command()) - walked
