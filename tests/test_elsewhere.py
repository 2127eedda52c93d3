"""The exported file outside micl_zoo, by the programs in docs/elsewhere: Python, Node.js, a page in Chromium."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageCms

import micl_zoo

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from micl_zoo.export import to_onnx
from micl_zoo.export.check import PHOTOGRAPHS

ELSEWHERE = Path(__file__).parent.parent / "docs" / "elsewhere"
MODEL = "model_with_preprocess.onnx"
PUPPETEER = "puppeteer-core@24.43.1"
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(["torch", "timm", "micl_zoo"]))  # to import them raises
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(command: list[Any], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=300).stdout


def worst_cosine(found: list[dict[str, Any]], expected: np.ndarray) -> float:
    """Of the embeddings (n, D) to what the encoder gives, both of unit length."""
    rows = np.array([one["embedding"] for one in found])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    return float((rows * expected).sum(1).min())


def unusual(folder: Path) -> list[Path]:
    """Turned by EXIF, with a profile that exchanges red and green, clear in places, larger than a canvas, a strip."""
    cat, coffee = (Image.open(PHOTOGRAPHS / name) for name in ("cat.jpg", "coffee.jpg"))
    files = [folder / name for name in ("turned.jpg", "profile.jpg", "clear.png", "large.jpg", "strip.png")]
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.save(files[0], quality=95, exif=exif)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"----"), (b"gXYZ", b"rXYZ"), (b"----", b"gXYZ")):
        profile = profile.replace(old, new)
    coffee.save(files[1], quality=95, icc_profile=profile)
    clear = coffee.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(files[2])
    coffee.resize((4000, 3000)).save(files[3], quality=90)
    picture(5, 900, 60).save(files[4])
    return files


@pytest.mark.parametrize("with_preprocess", [True, False])
def test_plain_python_needs_neither_torch_nor_us(
    encoder_folder: Path, image_folder: Callable[..., Path], tmp_path: Path, with_preprocess: bool
) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    made = to_onnx(encoder, tmp_path, with_preprocess=with_preprocess, show=False)
    files = [*sorted(image_folder(4).rglob("*.jpg")), *unusual(tmp_path)[:3]]
    lines = run([sys.executable, "-c", WITHOUT, ELSEWHERE / "plain.py", made.path, *files], tmp_path).splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["image"] for one in found] == [str(file) for file in files]
    assert worst_cosine(found, encoder.embed(files)) >= 0.9999


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """docs/elsewhere as a reader has it after the commands of docs/onnx.md."""
    folder = tmp_path_factory.mktemp("elsewhere") / "elsewhere"
    shutil.copytree(ELSEWHERE, folder, ignore=shutil.ignore_patterns("node_modules", "model*"))
    shutil.copy(Path(__file__).with_name("elsewhere.mjs"), folder)
    run(["npm", "install", "--no-audit", "--no-fund"], folder)
    run(["npm", "install", "--no-audit", "--no-fund", "--no-save", PUPPETEER], folder)
    to_onnx("vit_ti16.tin200", folder, with_preprocess=True, show=False)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [*sorted(PHOTOGRAPHS.glob("*.jpg")), *unusual(tmp_path_factory.mktemp("images"))]


@pytest.fixture(scope="module")
def expected(images: list[Path]) -> np.ndarray:
    rows: np.ndarray = micl_zoo.load(device="cpu", backend="torch").embed(images)
    return rows


@pytest.fixture(scope="module")
def site(installed: Path) -> Iterator[str]:
    """The folder on a web server on loopback."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(installed))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def in_chromium(installed: Path, url: str, *files: Path) -> dict[str, Any]:
    """What the page shows; its saved embeddings lie in `installed`."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    assert chromium, f"no Chromium: install one of {', '.join(names)}, or set CHROMIUM to its path"
    shown: dict[str, Any] = json.loads(run(["node", "elsewhere.mjs", chromium, url, installed, *files], installed))
    return shown


@pytest.mark.elsewhere
def test_node(installed: Path, images: list[Path], expected: np.ndarray) -> None:
    lines = run(["node", "embed.mjs", MODEL, *images], installed).splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["image"] for one in found] == [str(image) for image in images]
    cosine = worst_cosine(found, expected)
    print(f"Node.js: cosine {cosine:.7f} at least")
    assert cosine >= 0.9999


@pytest.mark.elsewhere
def test_the_page(installed: Path, site: str, images: list[Path], expected: np.ndarray, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    shown = in_chromium(installed, f"{site}/index.html", images[0], bad, *images[1:])
    found = json.loads((installed / "embeddings.json").read_text(encoding="utf-8"))["images"]
    names = [image.name for image in images]
    assert [one["image"] for one in found] == names
    cosine = worst_cosine(found, expected)
    print(f"Chromium: cosine {cosine:.7f} at least, {shown['seconds'] / len(images):.2f} s an image")
    assert cosine >= 0.9999

    cosines = expected @ expected[0]
    assert shown["order"] == [names[place] for place in np.argsort(-cosines)]
    np.testing.assert_allclose([float(text) for text in shown["cosines"][1:]], -np.sort(-cosines)[1:], atol=1e-3)
    assert shown["wrong"] == ["bad.jpg: not an image, or of a format that this browser does not read"]
    assert not shown["problems"]
    assert all(request.startswith((f"GET {site}/", f"GET blob:{site}/")) for request in shown["requests"])


@pytest.mark.elsewhere
def test_the_page_without_a_model(installed: Path, site: str) -> None:
    (text,) = in_chromium(installed, f"{site}/index.html?model=other.onnx")["wrong"]
    assert f"no model at {site}/other.onnx (404)" in text
    assert "--with-preprocess" in text
