"""The embedded encoder gives the published numbers, in PyTorch and in ONNX Runtime, and what does not is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import micl_zoo
from micl_zoo import doctor
from micl_zoo.encoders.device import Backend
from micl_zoo.encoders.golden import NUMBERS, TOLERANCE, golden_difference, golden_file, golden_images, write_golden
from micl_zoo.zoo.ours import DEFAULT, RECORDS

FILE = golden_file(RECORDS[DEFAULT])


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_the_published_numbers(backend: Backend) -> None:
    encoder = micl_zoo.load(backend=backend, device="cpu")
    assert golden_difference(encoder, FILE) <= TOLERANCE == 1e-4


def test_the_file_is_small_and_of_the_published_weights() -> None:
    golden = json.loads(FILE.read_text())
    assert FILE.stat().st_size <= 20_000
    assert golden["weights_sha256"] == RECORDS[DEFAULT].sha256
    assert {name: len(row) for name, row in golden["embeddings"].items()} == dict.fromkeys(
        golden_images(32, 32), NUMBERS
    )


def test_the_images_differ_and_are_never_resized() -> None:
    encoder = micl_zoo.load(device="cpu")
    images = golden_images(*encoder.transform.size)
    assert len({image.tobytes() for image in images.values()}) == len(images)
    for image in images.values():
        assert (encoder.transform.pixels(Image.fromarray(image)) == image).all()
    rows = encoder.embed(list(images.values()))
    assert (rows @ rows.T - torch.eye(len(rows)).numpy()).max() < 0.999  # no two alike to the encoder either


def test_a_changed_weight_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = micl_zoo.load(device="cpu")
    with torch.no_grad():
        encoder.vit.blocks[5].mlp.fc1.weight[0] += 0.5
    assert golden_difference(encoder, FILE) > TOLERANCE
    monkeypatch.setattr("micl_zoo.encoders.load.load", lambda name: encoder)
    (found,) = doctor.golden_embeddings()
    assert found.state == "problem"
    assert "torch" in found.text
    assert found.commands == doctor.torch_again()


def test_a_file_of_other_weights(tmp_path: Path, encoder_folder: Path) -> None:
    file, encoder = tmp_path / "golden.json", micl_zoo.load(weights=encoder_folder, device="cpu")
    write_golden(encoder, file)
    assert json.loads(file.read_text())["weights_sha256"] == encoder.weights_sha256
    assert golden_difference(encoder, file) <= 1e-6
