"""Loading: the table, files, the hub on loopback, and what is said when there is nothing to load."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from conftest import picture
from safetensors.torch import load_file

import micl_zoo
from micl_zoo import weights as weights_module
from micl_zoo.errors import UsageError, WeightsError
from micl_zoo.weights import file_sha256, header
from micl_zoo.zoo import ARCHS, DEFAULT, RECORDS, find_record, timm_architecture

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_names() -> None:
    assert micl_zoo.list_models() == sorted(RECORDS)
    assert set(micl_zoo.list_models(published_only=True)) == {n for n, r in RECORDS.items() if r.published}
    assert find_record("vit_l16").name == "vit_l16.in1k"
    with pytest.raises(UsageError, match=r"unknown model 'vit_l61'\. Did you mean vit_l16"):
        micl_zoo.load("vit_l61")


def test_every_record_is_whole() -> None:
    for name, record in RECORDS.items():
        assert record.name == name
        assert record.arch in ARCHS
        if record.published:
            assert len(record.sha256 or "") == 64
            assert record.bytes
            assert record.embedded or len(record.hub_commit or "") == 40
            assert record.metrics
        else:
            assert "no weights published yet" in record.summary


def test_the_shapes_are_timm_s() -> None:
    for arch in ARCHS.values():
        vit = timm.create_model(arch.timm_name, num_classes=0)
        assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (
            arch.embed_dim,
            arch.depth,
            arch.num_heads,
        )
        shape = {key: value for key, value in vars(arch).items() if key != "timm_name"}
        assert timm_architecture(**shape) == (arch.timm_name, {})


@pytest.mark.parametrize("name", ["vit_b16.in1k", "vit_l16"])
def test_unpublished_weights_give_the_three_ways_on(name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        micl_zoo.load(name)
    text = str(caught.value)
    assert "no weights of" in text
    for way in ("micl-zoo train vit_", "weights=", "pretrained=False"):
        assert way in text


def test_the_embedded_default_loads_and_its_bytes_are_the_table_s() -> None:
    record = RECORDS[DEFAULT]
    encoder = micl_zoo.load(device="cpu")
    assert encoder.record is record
    assert encoder.weights_sha256 == record.sha256
    file = Path(micl_zoo.__file__).parent / "embedded" / str(record.embedded)
    assert file.stat().st_size == record.bytes
    provenance = header(file)["provenance"]
    assert provenance["recipe"]["name"] == record.recipe
    assert provenance["data"]["images"] == 100_000
    rows = encoder.embed([picture(0, 300, 200), picture(0, 300, 200), picture(1, 300, 200)])
    assert rows.shape == (3, 192)
    assert rows[0] @ rows[1] == pytest.approx(1, abs=1e-5)
    assert rows[0] @ rows[2] < 0.99


def test_changed_embedded_bytes_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = RECORDS[DEFAULT]
    source = Path(micl_zoo.__file__).parent / "embedded" / str(record.embedded)
    data = bytearray(source.read_bytes())
    data[-1] ^= 1
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / source.name).write_bytes(data)
    monkeypatch.setattr(weights_module, "__file__", str(tmp_path / "weights.py"))
    with pytest.raises(WeightsError, match="are not the published ones: sha256"):
        micl_zoo.load()


def test_a_folder_or_a_file_of_your_own(encoder_folder: Path, tmp_path: Path) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    assert (encoder.record, encoder.embed_dim, encoder.transform.size) == (None, 32, 32)
    assert encoder.weights_sha256 == file_sha256(encoder_folder / "model.safetensors")
    alone = tmp_path / "alone.safetensors"
    shutil.copy(encoder_folder / "model.safetensors", alone)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(encoder(pixels), micl_zoo.load(weights=alone, device="cpu")(pixels))


def test_equal_to_timm_on_the_same_weights(encoder_folder: Path) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    config = json.loads((encoder_folder / "config.json").read_text())
    oracle = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
    oracle.load_state_dict(load_file(encoder_folder / "model.safetensors"))
    pixels = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(pixels), oracle(pixels), rtol=1e-5, atol=1e-5)
        tokens = oracle.forward_features(pixels)
        features = encoder.features(pixels)
        torch.testing.assert_close(features.cls, tokens[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.patches[:, 1, 2], tokens[:, 1 + 4 + 2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder(pixels, "mean"), tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-5)


def test_embed_takes_what_people_have(encoder_folder: Path, tmp_path: Path) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    image = picture(4)
    file = tmp_path / "a.png"
    image.save(file)
    rows = encoder.embed([file, str(file), file.read_bytes(), image, np.asarray(image)], batch_size=2)
    assert rows.shape == (5, 32)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, rows[:1].repeat(5, 0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encoder.embed(image)[0], rows[0], atol=1e-6)
    raw = encoder.embed(image, normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw), rows[:1], atol=1e-6)
    assert encoder.embed([]).shape == (0, 32)


def test_embed_names_the_image_it_cannot_read(encoder_folder: Path, tmp_path: Path) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    (tmp_path / "b.jpg").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"image 1 \(.*b\.jpg\): .*\[not_an_image\]"):
        encoder.embed([picture(0), tmp_path / "b.jpg"])
    with pytest.raises(UsageError, match=r"image 0 \(ndarray\): an array must be \(H, W, 3\) uint8"):
        encoder.embed(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(UsageError, match=r"pixel_values must be \(B, 3, 32, 32\)"):
        encoder(torch.zeros(1, 3, 64, 64))


def test_random_weights_only_when_asked_for() -> None:
    encoder = micl_zoo.load("vit_ti16", pretrained=False, device="cpu")
    assert encoder.weights_sha256 is None
    with pytest.raises(UsageError, match="contradict each other"):
        micl_zoo.load("vit_ti16", weights="x", pretrained=False)


def test_wrong_files_are_refused(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights at"):
        micl_zoo.load(weights=tmp_path)
    pickle = tmp_path / "model.pth"
    pickle.write_bytes(b"\x80\x04")
    with pytest.raises(WeightsError, match=r"not a \.safetensors file. Other formats can run code"):
        micl_zoo.load(weights=pickle)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((encoder_folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="damaged or no safetensors file"):
        micl_zoo.load(weights=cut)
    with pytest.raises(UsageError, match="'vit_l16' was asked for, but the weights are those of vit_ti16"):
        micl_zoo.load("vit_l16", weights=encoder_folder)
    with pytest.raises(UsageError, match="unknown dtype 'int3'"):
        micl_zoo.load(weights=encoder_folder, dtype="int3")
    with pytest.raises(UsageError, match="device 'cuda:99' cannot be used here"):
        micl_zoo.load(weights=encoder_folder, device="cuda:99")


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download by commit needs."""

    content: ClassVar[bytes] = b""
    requests: ClassVar[list[str]] = []

    def answer(self, *, body: bool) -> None:
        type(self).requests.append(f"{self.command} {self.path}")
        found = self.path == f"/micl/tiny/resolve/{COMMIT}/model.safetensors"
        self.send_response(200 if found else 404)
        content = self.content if found else b""
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(encoder_folder: Path) -> Iterator[str]:
    Hub.content = (encoder_folder / "model.safetensors").read_bytes()
    Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LOAD_FROM_HUB = """
import dataclasses, json, sys
import micl_zoo
from micl_zoo.zoo import RECORDS
for line in sys.stdin:
    RECORDS["vit_ti16.hub"] = dataclasses.replace(
        RECORDS["vit_ti16.tin200"],
        name="vit_ti16.hub", embedded=None, hub_repo="micl/tiny", hub_commit=sys.argv[1], sha256=line.strip(),
        transform=micl_zoo.Transform(32, 32),
    )
    try:
        encoder = micl_zoo.load("vit_ti16.hub", device="cpu")
        print(json.dumps({"dim": encoder.embed_dim, "sha256": encoder.weights_sha256}), flush=True)
    except micl_zoo.WeightsError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""


@contextmanager
def loads_from_hub(endpoint: str, cache: Path, **environment: str) -> Iterator[Callable[[str], dict[str, object]]]:
    """A process with hub settings of its own, which hold from its import on: loads what should have a sha256."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-c", LOAD_FROM_HUB, COMMIT],
        env={**os.environ, **settings, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout

        def loaded(sha256: str) -> dict[str, object]:
            print(sha256, file=process.stdin, flush=True)
            return dict(json.loads(process.stdout.readline()))  # type: ignore[union-attr]

        yield loaded


def test_the_hub_by_commit_offline_damaged_wrong_and_nowhere(hub: str, tmp_path: Path) -> None:
    right, wrong = hashlib.sha256(Hub.content).hexdigest(), hashlib.sha256(b"something else").hexdigest()
    good = {"dim": 32, "sha256": right}
    with (
        loads_from_hub(hub, tmp_path) as online,
        loads_from_hub(hub, tmp_path, HF_HUB_OFFLINE="1") as offline,
        loads_from_hub(hub, tmp_path / "other", HF_HUB_OFFLINE="1") as nowhere,
    ):
        assert online(right) == good
        assert all(COMMIT in request for request in Hub.requests)
        before = len(Hub.requests)
        assert offline(right) == good
        assert len(Hub.requests) == before
        blob = next(path for path in tmp_path.rglob("model.safetensors")).resolve()
        blob.write_bytes(Hub.content[:-7] + b"garbage")
        assert "are not the published ones" in str(offline(right)["error"])
        assert online(right) == good
        assert f"sha256 {right}, expected {wrong}" in str(online(wrong)["error"])
        error = str(nowhere(right)["error"])
    assert "cannot fetch vit_ti16.hub from micl/tiny" in error
    assert 'micl_zoo.load("vit_ti16.hub", weights="FOLDER")' in error


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORDS[DEFAULT].sha256 = "0"  # type: ignore[misc]
