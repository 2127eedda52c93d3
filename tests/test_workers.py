"""Processes that decode: what they deliver, and what it costs when one dies or hangs."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import picture

import micl_zoo
from micl_zoo.errors import MiclZooError
from micl_zoo.extraction.decoders import Batch, Decoders
from micl_zoo.images.decode import Decoding, decode
from micl_zoo.images.transform import Transform
from micl_zoo.sources.index import Entry

TRANSFORM = Transform((32, 24), (36, 27), "border")


def decoders(workers: int = 2, batch_size: int = 12, image_timeout: float = 60) -> Decoders:
    return Decoders(TRANSFORM, Decoding(), workers=workers, batch_size=batch_size, image_timeout=image_timeout)


def entries(folder: Path) -> list[Entry]:
    return list(micl_zoo.index_source(folder).entries())


def taken(pool: Decoders, batches: list[list[Entry]]) -> Iterator[tuple[Batch, np.ndarray]]:
    """With copies of the pixels, whose place is used again."""
    for tag, batch in enumerate(batches):
        if not pool.room:
            found = pool.take()
            yield found, found.pixels.copy()
        pool.submit(tag, batch)
    while pool.pending:
        found = pool.take()
        yield found, found.pixels.copy()


def test_a_system_without_files_in_memory(image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    with decoders(workers=1) as pool:
        ((batch, pixels),) = taken(pool, [entries(image_folder(3))])
    assert not batch.refused
    assert pixels.shape == (3, 32, 24, 3)
    assert pixels.any()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_and_whole(image_folder: Callable[..., Path], workers: int) -> None:
    folder = image_folder(50)
    (folder / "007-bad.jpg").write_bytes(b"no")
    all_of_them = entries(folder)
    asked = [all_of_them[start : start + 12] for start in range(0, 51, 12)]
    with decoders(workers) as pool:
        found = list(taken(pool, asked))
    assert [batch.tag for batch, _ in found] == list(range(5))
    assert [list(batch.entries) for batch, _ in found] == asked
    bad = [(batch.tag, place, refused.reason) for batch, _ in found for place, refused in batch.refused.items()]
    assert [(asked[tag][place].id, reason) for tag, place, reason in bad] == [("007-bad.jpg", "not_an_image")]
    good = [entry for entry in all_of_them if entry.id != "007-bad.jpg"]
    expected = np.stack([TRANSFORM.pixels(decode(Path(entry.uri).read_bytes())) for entry in good])
    np.testing.assert_array_equal(np.concatenate([pixels for _, pixels in found]), expected)
    assert all(batch.decode_seconds > 0 and batch.read_seconds > 0 for batch, _ in found)


def test_a_killed_process_costs_nothing(image_folder: Callable[..., Path]) -> None:
    some = entries(image_folder(60))
    with decoders(workers=2) as pool:
        found = []
        for batch, _ in taken(pool, [some[start : start + 12] for start in range(0, 60, 12)]):
            found.append(len(batch.pixels))
            if len(found) in (1, 3):
                os.kill(pool._processes[len(found) % 2].process.pid, signal.SIGKILL)
    assert found == [12] * 5


@pytest.fixture
def hostile_readers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes that die of a file named die.jpg, and hang over one named hang.jpg, as by a fault in a decoder."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "def hook(event, args):\n"
        "    if event == 'open' and str(args[0]).endswith('die.jpg'):\n"
        "        os.kill(os.getpid(), 11)\n"
        "    if event == 'open' and str(args[0]).endswith('hang.jpg'):\n"
        "        time.sleep(600)\n"
        "sys.addaudithook(hook)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


@pytest.mark.usefixtures("hostile_readers")
def test_the_image_that_kills_or_hangs_is_the_one_that_is_refused(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(20)
    for name in ("004-die.jpg", "009-hang.jpg"):
        picture(1).save(folder / name)
    some = entries(folder)
    start = time.monotonic()
    with decoders(workers=2, batch_size=22, image_timeout=1.5) as pool:
        ((batch, pixels),) = taken(pool, [some])
    assert {some[place].id: refused.reason for place, refused in batch.refused.items()} == {
        "004-die.jpg": "crashed",
        "009-hang.jpg": "timeout",
    }
    assert "signal 11, 2 times" in batch.refused[[e.id for e in some].index("004-die.jpg")].detail
    assert len(pixels) == 20
    assert time.monotonic() - start < 40


def test_processes_that_cannot_start_are_an_error(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with decoders() as pool, pytest.raises(MiclZooError, match="could not start: it ended with code 7"):
        list(taken(pool, [entries(image_folder(2))]))


TOO_MUCH = (
    "import sys, builtins\n"
    "def hook(event, args):\n"
    "    if event == 'open' and str(args[0]).endswith('heavy.jpg'):\n"
    "        bytearray(8 << 30)\n"
    "sys.addaudithook(hook)\n"
)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_an_image_that_takes_all_memory_is_refused_and_the_limit_named(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(TOO_MUCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    folder = image_folder(5)
    picture(1).save(folder / "002-heavy.jpg")
    some = entries(folder)
    with decoders(workers=1) as pool:
        ((batch, pixels),) = taken(pool, [some])
    ((place, refused),) = batch.refused.items()
    assert (some[place].id, refused.reason, len(pixels)) == ("002-heavy.jpg", "memory", 5)
    assert re.search(r"may have [\d,]+ MiB, more under a higher --max-pixels", refused.detail)


def test_they_end_with_their_parent(image_folder: Callable[..., Path]) -> None:
    with decoders(workers=2) as pool:
        list(taken(pool, [entries(image_folder(3))]))
        processes = [process.process for process in pool._processes]
    assert all(process.poll() is not None for process in processes)
