"""Damaged files: none stops a run or hangs it, none is embedded where its damage can be told."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from conftest import picture
from damaged import NO_CHECKSUM, Damaged, bombs, chunk, corpus, encoded, png, whole_files
from PIL import Image

import micl_zoo
from micl_zoo.errors import Refused
from micl_zoo.extraction.extract import extract
from micl_zoo.images.decode import Decoding, decode, decode_pixels
from micl_zoo.images.transform import Transform

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::Warning:PIL.Image")


@pytest.fixture(scope="module")
def damaged() -> list[Damaged]:
    return corpus()


@pytest.fixture
def time_limit() -> Iterator[None]:
    """A minute, after which whatever hangs is an error."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(_: int, frame: FrameType | None) -> None:
        raise TimeoutError("a test of damaged files hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def verdict(decoding: Callable[[bytes], object], data: bytes) -> str:
    try:
        decoding(data)
    except Refused as refused:
        return refused.reason
    return "decoded"


def test_the_corpus_is_large_and_its_undamaged_files_decode(damaged: list[Damaged]) -> None:
    assert len(damaged) >= 300
    assert len({file.name for file in damaged}) == len(damaged)
    whole = whole_files()
    assert whole.keys() >= NO_CHECKSUM - {"avif", "jpeg2000"}
    for data in whole.values():
        assert decode(data).mode == "RGB"


def test_all_damage_that_can_be_told_is_refused_and_nothing_else_is_raised(damaged: list[Damaged]) -> None:
    decoded = {file.name for file in damaged if verdict(decode, file.data) == "decoded"}
    assert not decoded & {file.name for file in damaged if file.certain}
    kinds = {name.partition("-flipped")[0].partition("-without")[0] for name in decoded}
    unneeded = {"png-text-bomb", "jpeg-tags"}  # what is wrong there does not reach the decoder
    assert kinds - unneeded <= NO_CHECKSUM  # of these formats only, and there only changed bytes: nothing is cut off


def test_the_fast_path_refuses_the_same_files(damaged: list[Damaged]) -> None:
    transform, fast = Transform.square(32, 32), Decoding(fast=True)
    for file in damaged:
        exact, scaled = (
            verdict(decode, file.data),
            verdict(lambda data: decode_pixels(data, transform, fast), file.data),
        )
        # A JPEG that is decoded at a scale may be larger.
        assert scaled == exact or (exact == "too_large" and file.name.startswith("jpeg") and scaled != "decoded"), file


def ledger(store: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (store / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line["detail"] for line in lines)
    found = {line["id"]: line["reason"] for line in lines}
    assert len(found) == len(lines)
    return found


def test_a_folder_of_damaged_files_is_embedded_to_its_end(
    damaged: list[Damaged], encoder_folder: Path, tmp_path: Path, time_limit: None
) -> None:
    folder, alone = tmp_path / "folder", tmp_path / "alone"
    folder.mkdir()
    alone.mkdir()
    for file in damaged:
        (folder / f"{file.name}.jpg").write_bytes(file.data)
    good = {f"{number:02}-{kind}.jpg": data for number, (kind, data) in enumerate(whole_files().items())}
    for name, data in good.items():
        (folder / name).write_bytes(data)
        (alone / name).write_bytes(data)
    others = _odd_entries(folder)
    summary = extract(
        folder, tmp_path / "s", weights=encoder_folder, workers=2, shard_rows=100, batch_size=16, precision="fp32"
    )
    extract(alone, tmp_path / "t", weights=encoder_folder, workers=0, shard_rows=1, batch_size=1, precision="fp32")
    store, refused = micl_zoo.open_store(tmp_path / "s"), ledger(tmp_path / "s")
    assert summary.images == len(damaged) + len(good) + len(others) == len(store) + len(refused)
    assert not set(store.ids) & refused.keys()
    assert {f"{file.name}.jpg" for file in damaged if file.certain} <= refused.keys()
    assert {name for name, reason in others.items() if reason == "unreadable"} <= refused.keys()
    rows = dict(zip(store.ids, store.embeddings, strict=True))
    single = micl_zoo.open_store(tmp_path / "t")
    assert set(single.ids) == good.keys() <= rows.keys()
    for name, row in zip(single.ids, single.embeddings, strict=True):
        np.testing.assert_allclose(rows[name], row, atol=1e-5, err_msg=name)


def _odd_entries(folder: Path) -> dict[str, str]:
    """What a folder may hold besides; by id, with the reason of those that are listed and cannot be read."""
    (folder / "a-folder.jpg").mkdir()  # not an image: not listed
    found = {}
    if os.name == "posix":
        (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(encoded(picture(0), "JPEG"))
        (folder / os.fsdecode(b"caf\xe9-cut.jpg")).write_bytes(encoded(picture(0), "JPEG")[:400])
        (folder / "dangling.jpg").symlink_to("nowhere.jpg")
        found = {"caf\\xe9.jpg": "decoded", "caf\\xe9-cut.jpg": "truncated", "dangling.jpg": "unreadable"}
    if os.name == "posix" and os.geteuid() != 0:  # root reads everything
        (folder / "forbidden.jpg").write_bytes(encoded(picture(0), "JPEG"))
        (folder / "forbidden.jpg").chmod(0)
        found["forbidden.jpg"] = "unreadable"
    return found


EXTRACT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))  # what reads without end must not take the machine with it
from micl_zoo.extraction.extract import extract
print(extract(sys.argv[1], sys.argv[2], weights=sys.argv[3], workers=2, batch_size=4).embedded)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs its devices, and its limit of memory")
def test_what_is_no_regular_file_is_left_out_or_refused(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder = image_folder(4)
    os.mkfifo(folder / "pipe.jpg")  # nobody will ever write to it
    for name, target in {"endless": "/dev/zero", "nothing": "/dev/null", "itself": "itself.jpg"}.items():
        (folder / f"{name}.jpg").symlink_to(target)
    command = [sys.executable, "-c", EXTRACT, str(folder), str(tmp_path / "s"), str(encoder_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            said, _ = run.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # and its workers
            raise
    assert (run.returncode, said) == (0, "4\n")
    assert ledger(tmp_path / "s").keys() <= {"pipe.jpg", "endless.jpg", "nothing.jpg", "itself.jpg"}


MEMORY = """
import resource, sys, warnings
from pathlib import Path
from micl_zoo.errors import Refused
from micl_zoo.images.decode import decode
warnings.simplefilter("ignore")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        decode(path.read_bytes())
    except Refused:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "torch" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_no_bomb_takes_much_memory(tmp_path: Path) -> None:
    for file in bombs():
        (tmp_path / file.name).write_bytes(file.data)
    (tmp_path / "png-of-deep-zeros").write_bytes(png(9, 9, pixels=bytes(100_000_000)))  # a picture, with more behind it
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    megabytes, torch_is_loaded = run.stdout.split()
    assert int(megabytes) < 80
    assert torch_is_loaded == "False"


def large_jpeg(**options: object) -> bytes:
    noise = np.random.default_rng(3).integers(-12, 12, (300, 400, 3))
    image = (np.asarray(picture(5, 400, 300), dtype=int) + noise).clip(0, 255).astype(np.uint8)
    return encoded(Image.fromarray(image), "JPEG", quality=90, **options)


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"optimize": True}, {"progressive": True}, {"restart_marker_blocks": 7}]
)
def test_checks_leave_a_jpeg_s_pixels_as_they_are(options: dict[str, object]) -> None:
    for width, height in [(400, 300), (17, 9), (8, 8), (3, 2), (255, 33)]:
        for mode in ("RGB", "L", "CMYK"):
            image = picture(4, 400, 300).resize((width, height)).convert(mode)
            data = encoded(image, "JPEG", **options)
            plain = Image.open(io.BytesIO(data)).convert("RGB")
            for ending in (b"", b"\0\0\0", b"what a phone puts behind a picture \xff\xd8\xff\xda"):
                assert np.array_equal(np.asarray(decode(data + ending)), np.asarray(plain))
            padded = data[:-2] + b"\0" * 5 + b"\xff\xff" + data[-2:]  # some cameras do
            assert np.array_equal(np.asarray(decode(padded)), np.asarray(plain))


def test_bytes_lost_or_overwritten_within_a_jpeg_are_seen() -> None:
    data, seeded = large_jpeg(), random.Random(0)
    first = data.index(b"\xff\xda") + 14
    seen = {"lost": 0, "zeroed": 0, "replaced": 0}
    for _ in range(40):
        at = seeded.randrange(first, len(data) - 600)
        seen["lost"] += verdict(decode, data[:at] + data[at + seeded.randrange(1, 500) :]) != "decoded"
        seen["zeroed"] += verdict(decode, data[:at] + bytes(512) + data[at + 512 :]) != "decoded"
        seen["replaced"] += verdict(decode, data[:at] + seeded.randbytes(512) + data[at + 512 :]) != "decoded"
    # Not all: after some bytes the codes fall into step again, and some of these end where the picture does.
    assert min(seen.values()) >= 30, seen


def test_a_progressive_jpeg_without_its_last_scans_is_refused() -> None:
    data = large_jpeg(progressive=True)
    scans = [at for at in range(len(data)) if data.startswith(b"\xff\xda", at)]
    assert len(scans) > 5
    for at in scans[1:]:
        ended = data[:at] + b"\xff\xd9"
        assert verdict(decode, ended) == "truncated"
        Image.open(io.BytesIO(ended)).load()  # a picture to Pillow, of less detail
    assert verdict(decode, data) == "decoded"


def of_single_scans(planes: list[Image.Image], frame: int = 0xC0) -> list[bytes]:
    """The head of a JPEG and each of its scans, one per component."""
    jpegs = [encoded(plane.convert("L"), "JPEG", quality=90) for plane in planes]
    frames, scans = [jpeg.index(b"\xff\xc0") for jpeg in jpegs], [jpeg.index(b"\xff\xda") for jpeg in jpegs]
    sizes, number = jpegs[0][frames[0] + 5 : frames[0] + 9], len(planes)
    header = struct.pack(">BBHB", 0xFF, frame, 8 + 3 * number, 8) + sizes + bytes([number])
    header += b"".join(bytes([one + 1, 0x11, 0]) for one in range(number))
    tables = jpegs[0][: frames[0]] + header + jpegs[0][frames[0] + 13 : scans[0]]
    starts = [b"\xff\xda\0\x08\x01" + bytes([one + 1]) + b"\0\0\x3f\0" for one in range(number)]
    return [tables, *(start + jpeg[at + 10 : -2] for start, jpeg, at in zip(starts, jpegs, scans, strict=True))]


@pytest.mark.parametrize("number", [3, 4])
def test_a_jpeg_of_a_scan_per_component_has_them_all(number: int) -> None:
    head, *scans = of_single_scans([picture(one, 64, 48) for one in range(number)])
    assert decode(b"".join([head, *scans, b"\xff\xd9"])).size == (64, 48)
    for kept in ([0], [0, 1], [1, 2], [0, 0, 0], [0, 2, 2]):
        ended = b"".join([head, *(scans[one] for one in kept), b"\xff\xd9"])
        Image.open(io.BytesIO(ended)).load()  # a picture to Pillow, without a colour
        assert verdict(decode, ended) == "truncated", kept


@pytest.mark.parametrize("frame", [0xC2, 0xCA])
def test_a_progressive_jpeg_has_all_its_components(frame: int) -> None:
    head, *scans = of_single_scans([picture(0, 64, 48)] * 3, frame)
    assert verdict(decode, b"".join([head, *scans[:2], b"\xff\xd9"])) == "truncated"


def test_a_file_of_restart_marks_takes_no_memory_for_them() -> None:
    jpeg = encoded(picture(0), "JPEG")
    start = jpeg.index(b"\xff\xda")
    marks = bytes(byte for mark in range(0xD0, 0xD8) for byte in (0xFF, mark)) * 500_000
    data = jpeg[:start] + b"\xff\xdd\0\4\0\1" + jpeg[start : start + 14] + marks + b"\xff\xd9"
    tracemalloc.start()
    assert verdict(decode, data) == "damaged"
    assert tracemalloc.get_traced_memory()[1] < 2 * len(data)
    tracemalloc.stop()


@pytest.mark.skipif(version("pillow") < "10.2", reason="Pillow writes no restart marks before 10.2")
def test_a_jpeg_that_misses_an_interval_between_restarts_is_refused() -> None:
    data = large_jpeg(restart_marker_rows=1)
    third, fourth = data.index(b"\xff\xd2"), data.index(b"\xff\xd3")
    assert verdict(decode, data[:third] + data[fourth:]) == "damaged"
    assert verdict(decode, data) == "decoded"


def test_every_changed_byte_of_a_png_is_seen() -> None:
    data = whole_files()["png"]
    for at in range(8, len(data), 7):
        flipped = bytearray(data)
        flipped[at] ^= 1
        assert verdict(decode, bytes(flipped)) != "decoded", at


PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png_of_rows(width: int, height: int, bits: int, colours: int, rows: int, interlaced: bool, value: int) -> bytes:
    """A PNG that has the first rows alone; -1: all of them."""
    step = bits * {2: 3, 4: 2, 6: 4}.get(colours, 1)
    found = []
    for left, top, across, down in PASSES if interlaced else ((0, 0, 1, 1),):
        columns, lines = -(-(width - left) // across), -(-(height - top) // down)
        found += [b"\0" + bytes([value]) * -(-columns * step // 8)] * lines if columns > 0 else []
    packed = zlib.compress(b"".join(found[:rows] if rows >= 0 else found))
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(range(6))) if colours == 3 else b""
    chunks = chunk(b"IHDR", header) + palette + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("bits", "colours"), [(1, 0), (16, 0), (1, 3), (8, 2), (16, 2), (8, 4), (8, 6)])
def test_a_png_has_all_its_rows(bits: int, colours: int, interlaced: bool) -> None:
    for width, height in [(2, 2), (2, 3), (3, 2), (9, 8), (8, 9)]:
        whole = [png_of_rows(width, height, bits, colours, -1, interlaced, value) for value in (0, 0x55)]
        if colours != 3:
            assert [verdict(decode, data) for data in whole] == ["decoded", "decoded"]
        for rows in range(height if not interlaced else height - height // 2):
            for value in (0, 0x55):
                short = png_of_rows(width, height, bits, colours, rows, interlaced, value)
                assert verdict(decode, short) == "truncated", (width, height, rows, value)
    without = png_of_rows(40, 40, 8, 2, 20, interlaced, 9)
    start = without.index(b"IDAT")
    packed = without[start + 4 : -20]  # the end of the stream is missing, too
    assert verdict(decode, without[: start - 4] + chunk(b"IDAT", packed) + without[-12:]) == "truncated"


def test_a_gif_is_whole_to_the_end_of_a_block() -> None:
    data = whole_files()["gif-frames"]
    assert all(verdict(decode, data[:stop]) == "truncated" for stop in range(len(data) // 2, len(data), 40))
    assert verdict(decode, data[:-2]) == "truncated"
    assert verdict(decode, data[:-1]) == "decoded"  # all but the end mark, as some writers leave it
    assert verdict(decode, data + b"anything behind it") == "decoded"
