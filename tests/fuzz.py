"""A coverage-guided fuzzer over all that reads files from outside: `python tests/fuzz.py TARGET --seconds 120`.

Needs atheris (`pip install 'micl-zoo[fuzz]'`). Inputs are mutated from good ones; what comes out must be a result or
one of our own errors, in 20 seconds and 1 GB. Prints one line of JSON: target, runs, seconds, largest memory, findings.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HANG = 20  # seconds
MEMORY = 1024  # MB of the process, over what it has before the first input
HERE = Path(__file__).parent
Target = Callable[[bytes], None]


def decode_target(_: Path) -> Target:
    """Bytes of an image, whole and at the scale of a crop."""
    from micl_zoo.errors import Refused
    from micl_zoo.images.decode import Decoding, decode, decode_pixels
    from micl_zoo.images.transform import Transform

    transform = Transform.square(32, 36)

    def run(data: bytes) -> None:
        for one in (lambda: decode(data), lambda: decode_pixels(data, transform, Decoding(fast=True))):
            with contextlib.suppress(Refused):
                one()

    return run


def listing_target(folder: Path) -> Target:
    """A file that is listed and read, its kind by the first byte: archives, parquet, lists; and text as a glob."""
    from micl_zoo.errors import MiclZooError, Refused
    from micl_zoo.sources.listing import list_source
    from micl_zoo.sources.reader import Reader

    (folder / "a.png").write_bytes(dict(_images())["png"])
    kinds = (".tar", ".zip", ".parquet", ".csv", ".jsonl", ".txt", ".tsv", "")

    def run(data: bytes) -> None:
        kind = kinds[data[0] % len(kinds)] if data else ""
        file = folder / f"fuzzed{kind}"
        if kind:
            file.write_bytes(data[1:])
        source = str(file) if kind else f"{folder}/x/{data[1:200].decode('utf-8', 'surrogateescape')}"
        if not kind and (".." in source or "~" in source):
            return
        reader = Reader()
        with contextlib.suppress(MiclZooError):
            for piece in list_source(source):
                for entry in piece.entries():
                    with contextlib.suppress(Refused):
                        reader.read(entry)

    return run


def configuration_target(folder: Path) -> Target:
    """A safetensors file, or a config.json beside sound weights, or an ONNX file: read as `load` does."""
    from micl_zoo.encoders.load import load
    from micl_zoo.errors import MiclZooError

    good = _encoder(folder / "good")
    (folder / "bad").mkdir()

    def run(data: bytes) -> None:
        first, rest = (data[0] % 3, data[1:]) if data else (0, b"")
        shutil.copy(good / "model.safetensors", folder / "bad")
        (folder / "bad" / "config.json").write_bytes(rest if first == 0 else (good / "config.json").read_bytes())
        if first == 0:
            _without_header(folder / "bad" / "model.safetensors")
        if first == 1:
            (folder / "bad" / "model.safetensors").write_bytes(rest)
        if first == 2:
            (folder / "bad" / "model.onnx").write_bytes(rest)
        with contextlib.suppress(MiclZooError):
            load(folder / "bad", device="cpu", backend="onnx" if first == 2 else "torch")

    return run


def store_target(folder: Path) -> Target:
    """One file of a store changed, its kind by the first byte: manifest, part, index, ledger; then all is read."""
    from micl_zoo.stores.search import search
    from micl_zoo.stores.store import open_store
    from micl_zoo.stores.verify import verify

    good = _store(folder)
    names = ("manifest.json", "part-00000.parquet", "index/part-00000.parquet", "errors.jsonl")
    actions: tuple[Callable[[], object], ...] = (
        lambda: verify(good, sample=0),
        lambda: open_store(good).embeddings,
        lambda: open_store(good).to_arrow(),
        lambda: search(good, ids=["000.jpg"]),
    )
    return _one_file_changed(good, names, actions)


def checkpoint_target(folder: Path) -> Target:
    """One file of a training run changed, its kind by the first byte; then it is loaded, reported and resumed."""
    from micl_zoo.training.pretraining.report import _read_history
    from micl_zoo.training.recipes import recorded_recipe
    from micl_zoo.training.release.trained import run_record
    from micl_zoo.training.run.record import read_run
    from micl_zoo.zoo.weights import local_weights

    good = _run(folder)
    newest = sorted(good.glob("checkpoints/*.safetensors"))[-1].relative_to(good).as_posix()
    names = ("run.json", "metrics.jsonl", newest, f"{newest}.sha256")
    actions: tuple[Callable[[], object], ...] = (
        lambda: recorded_recipe(read_run(good) or {}),
        lambda: _read_history(good / "metrics.jsonl"),
        lambda: local_weights(good / newest),
        lambda: run_record(good),
    )
    return _one_file_changed(good, names, actions)


def _one_file_changed(good: Path, names: tuple[str, ...], actions: tuple[Callable[[], object], ...]) -> Target:
    """Put an input in the place of one file of a sound folder, by its first byte, and do all that reads it."""
    from micl_zoo.errors import MiclZooError

    sound = {name: (good / name).read_bytes() for name in names}

    def run(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else names[0]
        (good / name).write_bytes(data[1:])
        try:
            for action in actions:
                with contextlib.suppress(MiclZooError):
                    action()
        finally:
            (good / name).write_bytes(sound[name])

    return run


TARGETS: dict[str, Callable[[Path], Target]] = {
    "decode": decode_target,
    "listing": listing_target,
    "configuration": configuration_target,
    "store": store_target,
    "checkpoint": checkpoint_target,
}


def seeds(target: str, folder: Path) -> Iterator[bytes]:
    """Good inputs, from which the others are mutated."""
    if target == "decode":
        yield from (data for _, data in _images())
    elif target == "listing":
        png = dict(_images())["png"]
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("a.png", png)
            packed.writestr("b/c.png", png, zipfile.ZIP_DEFLATED)
        yield b"\1" + archive.getvalue()
        yield from _tars(png)
        yield from _parquets(png)
        yield from (b"\3id,path\n1,a.png\n", b'\4{"path": "a.png", "id": 1}\n', b"\5a.png\n", b"\6path\ta\n")
        yield from (b"\7" + text for text in (b"*.png", b"**/a.p*g", b"{a,b}.png", b"{000..009}.tar", b"[a]?.png"))
    elif target == "configuration":
        good = _encoder(folder / "seed")
        yield b"\0" + (good / "config.json").read_bytes()
        yield b"\1" + (good / "model.safetensors").read_bytes()
        yield b"\2" + _onnx(folder, good)
    elif target == "store":
        good = _store(folder)
        for number, name in enumerate(
            ("manifest.json", "part-00000.parquet", "index/part-00000.parquet", "errors.jsonl")
        ):
            yield bytes([number]) + (good / name).read_bytes()
    else:
        good = _run(folder)
        newest = sorted(good.glob("checkpoints/*.safetensors"))[-1].relative_to(good).as_posix()
        for number, name in enumerate(("run.json", "metrics.jsonl", newest, f"{newest}.sha256")):
            yield bytes([number]) + (good / name).read_bytes()


def _images() -> list[tuple[str, bytes]]:
    from damaged import whole_files

    return list(whole_files().items())


def _tars(png: bytes) -> Iterator[bytes]:
    import tarfile

    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            for name in ("a.png", "é" * 80 + "/b.png"):
                member = tarfile.TarInfo(name)
                member.size = len(png)
                tar.addfile(member, io.BytesIO(png))
        yield b"\0" + out.getvalue()


def _parquets(png: bytes) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for column in (pa.array([png, None]), pa.array([{"bytes": png, "path": None}] * 2, struct)):
        out = io.BytesIO()
        pq.write_table(pa.table({"id": ["a", "b"], "image": column}), out)
        yield b"\2" + out.getvalue()


def _encoder(folder: Path) -> Path:
    from conftest import TWIN, small_vit

    from micl_zoo.training.recipes import get_recipe
    from micl_zoo.training.run.rundir import encoder_config
    from micl_zoo.zoo.weights import save_weights

    recipe = get_recipe("vit_ti16.tin200", TWIN)
    save_weights(folder, small_vit().state_dict(), encoder_config(recipe), {"recipe": "none"}, "float32")
    return folder


def _onnx(folder: Path, encoder: Path) -> bytes:
    from micl_zoo.export import to_onnx

    return to_onnx(weights=encoder, out=folder / "onnx", images=_pictures(folder), show=False).path.read_bytes()


def _pictures(folder: Path) -> Path:
    from conftest import picture

    for number in range(10):
        file = folder / "images" / f"{number:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file)
    return folder / "images"


def _store(folder: Path) -> Path:
    from micl_zoo.extraction.extract import extract

    images = _pictures(folder)
    (images / "bad.jpg").write_bytes(b"")
    options: dict[str, Any] = {"weights": _encoder(folder / "encoder"), "workers": 0, "precision": "fp32"}
    return extract(images, folder / "store", shard_rows=5, show=False, **options).store.path


def _run(folder: Path) -> Path:
    from conftest import TWIN

    from micl_zoo.training.pretraining.pretrain import pretrain

    options: dict[str, Any] = {"device": "cpu", "workers": 0, "overrides": TWIN}
    pretrain("vit_ti16.tin200", _pictures(folder), folder / "run", **options)
    return folder / "run"


def _without_header(file: Path) -> None:
    """Take the package's own header out, so that config.json decides."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(file), file)


NASTY = (
    None,
    True,
    -1,
    0,
    10**12,
    10**40,
    1e-300,
    float("nan"),
    "",
    "x\x1b[2J\n",
    "../../x",
    [],
    [[]],
    {},
    {"a": None},
)


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """Change one value of the JSON in an input, else bytes as libFuzzer does."""
    import atheris

    random = Random(seed)
    head = 9 if data[:1] == b"\1" and data[9:10] == b"{" else 1  # a safetensors header has its length before it
    end = 9 + int.from_bytes(data[1:9], "little") if head == 9 else len(data)
    try:
        body = json.loads(data[head:end])
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, most))
    if random.random() < 0.3 or not isinstance(body, dict | list) or not body:
        return bytes(atheris.Mutate(data, most))
    holder = body
    while True:
        key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
        below = holder[key]
        if not isinstance(below, dict | list) or not below or random.random() < 0.3:
            break
        holder = below
    if isinstance(holder, dict) and random.random() < 0.2:
        del holder[key]
    else:
        holder[key] = random.choice(NASTY)
    text = json.dumps(body).encode()
    length = len(text).to_bytes(8, "little") if head == 9 else b""
    return (data[:1] + length + text + data[end:])[:most]


def fuzz(name: str, folder: Path, seconds: float, findings: Path) -> None:
    """Run one target in this process until the time is over, or a hang or too much memory ends it."""
    import atheris

    with atheris.instrument_imports(include=["micl_zoo", "PIL", "tarfile", "zipfile"]):
        (folder / "work").mkdir()
        target = TARGETS[name](folder / "work")
    seen: set[str] = set()

    def run(data: bytes) -> None:
        try:
            target(data)
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
            if f"{type(error).__name__} {where}" not in seen:
                seen.add(f"{type(error).__name__} {where}")
                with findings.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"error": f"{error!r:.300}", "at": where, "input": data[:4000].hex()}) + "\n")

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    options = [
        f"-max_total_time={int(seconds)}",
        f"-timeout={HANG}",
        f"-rss_limit_mb={used + MEMORY}",
        "-max_len=65536",
    ]
    options += [f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], run, custom_mutator=mutated)
    atheris.Fuzz()


def run_target(name: str, seconds: float, show: bool = False) -> dict[str, Any]:
    """Fuzz a target in a child process, started again where it hung or took too much memory."""
    end, runs, crashes, largest = time.monotonic() + seconds, 0, list[str](), 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "corpus").mkdir()
        (folder / "seeds").mkdir()
        for number, data in enumerate(seeds(name, folder / "seeds")):
            (folder / "corpus" / f"seed-{number}").write_bytes(data)
        findings = folder / "findings.jsonl"
        while (left := end - time.monotonic()) > 1 and len(crashes) < 20:
            shutil.rmtree(folder / "work", ignore_errors=True)
            words = [sys.executable, __file__, name, "--seconds", str(left), "--inside", str(folder)]
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
            if show:
                print(done.stderr[-3000:], file=sys.stderr)
            runs += sum(int(count) for count in re.findall(r"number_of_executed_units: *(\d+)", done.stderr))
            largest = max([largest, *(int(mb) for mb in re.findall(r"peak_rss_mb: *(\d+)", done.stderr))])
            crashes += [
                f"{file.name}: {file.read_bytes()[:2000].hex()}" for file in folder.glob("*-*") if file.is_file()
            ]
            for file in folder.glob("*-*"):
                file.unlink()
            if done.returncode and not runs:
                raise SystemExit(f"the fuzzer did not start:\n{done.stderr[-2000:]}")
        foreign = [json.loads(line) for line in findings.read_text("utf-8").splitlines()] if findings.exists() else []
    return {
        "target": name,
        "runs": runs,
        "seconds": round(seconds),
        "peak_mb": largest,
        "foreign": foreign,
        "hangs_and_memory": crashes,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=float, default=120, help="per target")
    parser.add_argument("-o", "--out", type=Path, help="record to write")
    parser.add_argument("--show", action="store_true", help="print what libFuzzer says")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if asked.inside:
        fuzz(asked.target, asked.inside, asked.seconds, asked.inside / "findings.jsonl")
    else:
        found = [run_target(name, asked.seconds, asked.show) for name in TARGETS if asked.target in (name, "all")]
        for one in found:
            print(json.dumps(one))
        if asked.out:
            import torch

            from micl_zoo.training.run.provenance import made_with

            command = f"python tests/fuzz.py {asked.target} --seconds {asked.seconds:g}"
            record = {"command": command, **made_with(torch.device("cpu")), "hang_seconds": HANG, "memory_mb": MEMORY}
            asked.out.write_text(json.dumps(record | {"targets": found}, indent=2) + "\n", encoding="utf-8")
        sys.exit(any(one["foreign"] or one["hangs_and_memory"] for one in found))
