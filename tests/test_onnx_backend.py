"""An exported file embeds as its encoder does, through load and through extract; and says what it cannot do."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import picture

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.encoders.onnx_session import OnnxSession, choose_providers, local_onnx, open_session
from micl_zoo.errors import MiclZooError, UsageError, WeightsError
from micl_zoo.extraction.extract import extract
from micl_zoo.extraction.runner import Model
from micl_zoo.stores.search import search
from micl_zoo.stores.store import open_store
from micl_zoo.stores.verify import verify
from micl_zoo.zoo import ours
from micl_zoo.zoo.hub import embedded_file
from micl_zoo.zoo.pools import Pool

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from micl_zoo.export import to_onnx

POOLS: list[Pool] = ["cls", "mean", "cls+mean", "patches"]


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> Encoder:
    return micl_zoo.load(weights=encoder_folder, device="cpu")


@pytest.fixture(scope="module")
def exported(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(encoder, tmp_path_factory.mktemp("onnx"), outputs=("cls", "patches")).path


@pytest.fixture(scope="module")
def opened(exported: Path) -> Encoder:
    return micl_zoo.load(weights=exported, backend="onnx")


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_is_torch_s(encoder: Encoder, opened: Encoder, pool: Pool) -> None:
    images = [picture(number, 50 + number, 40) for number in range(5)]
    found = opened.embed(images, pool=pool, batch_size=2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, encoder.embed(images, pool=pool), rtol=0, atol=1e-5)


def test_the_default_comes_with_the_package() -> None:
    opened = micl_zoo.load(backend="onnx", device="cpu")
    images = [picture(number, 300, 240) for number in range(3)]
    np.testing.assert_allclose(opened.embed(images), micl_zoo.load(device="cpu").embed(images), rtol=0, atol=1e-4)
    record = ours.RECORDS[ours.DEFAULT]
    assert record.onnx is not None
    assert opened.weights_sha256 == record.onnx.sha256
    assert opened.record is record
    assert opened.precision == record.onnx.precision
    assert opened.card
    assert opened.card.weights_sha256 == record.sha256
    assert opened.card.config.license == record.license
    assert micl_zoo.load(device="cpu").card is None
    assert embedded_file(record.onnx.file).stat().st_size == record.onnx.bytes


def test_changed_bytes_of_the_package_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    record = ours.RECORDS[ours.DEFAULT]
    assert record.onnx is not None
    other = dataclasses.replace(record, onnx=dataclasses.replace(record.onnx, sha256="0" * 64))
    monkeypatch.setitem(ours.RECORDS, ours.DEFAULT, other)
    with pytest.raises(WeightsError, match=r"are not the published ones: sha256 .*, expected 0000"):
        micl_zoo.load(backend="onnx")


def test_features_are_torch_s(encoder: Encoder, opened: Encoder) -> None:
    pixels = torch.stack([encoder.transform(picture(1)), encoder.transform(picture(2))])
    with torch.no_grad():
        for mine, theirs in zip(opened.features(pixels), encoder.features(pixels), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
        with pytest.raises(UsageError, match=r"pixel_values must be \(B, 3, 32, 32\)"):
            opened(pixels[..., :16])


def test_what_an_exported_encoder_cannot_do(opened: Encoder, encoder: Encoder, tmp_path: Path) -> None:
    assert opened.backend == "onnx"
    assert opened.device.type == "cpu"
    with pytest.raises(UsageError, match="backend onnx computes no gradients"):
        opened(torch.zeros(1, 3, 32, 32))
    with pytest.raises(AttributeError, match="load with backend='torch'"):
        _ = opened.vit
    with pytest.raises(AttributeError, match="no attribute 'vti'"):
        _ = opened.vti
    with pytest.raises(UsageError, match="the onnx backend compiles by itself"):
        opened.compile_blocks(4)
    with pytest.raises(UsageError, match="an encoder of backend onnx cannot be exported"):
        to_onnx(opened, tmp_path)
    mean = micl_zoo.load(weights=to_onnx(encoder, tmp_path, outputs=("mean",)).path, backend="onnx")
    with pytest.raises(UsageError, match="no pool 'cls': take one of mean or export the encoder again with --outputs"):
        mean.embed([picture(0)], pool="cls")
    assert (mean.pool, mean.embed([picture(0)]).shape) == ("mean", (1, 32))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "float16"}, "keeps weights in the precision of the file, not in 'float16'"),
        ({"pretrained": False}, "backend onnx runs exported files"),
        ({"device": "mps"}, "backend onnx runs on cpu and cuda, not on 'mps'"),
        ({"providers": ["xpu"]}, r"this ONNX Runtime has no xpu provider, it has .*CPUExecutionProvider"),
        ({"backend": "torch", "providers": ["cpu"]}, "providers are ONNX Runtime's"),
        ({"name": "vit_l16"}, r"no ONNX file of vit_l16.in1k comes with micl-zoo: micl-zoo export vit_l16.in1k"),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(MiclZooError, match=text):
        micl_zoo.load(**{"backend": "onnx", **options})


def test_files_that_cannot_be(exported: Path, encoder: Encoder, tmp_path: Path) -> None:
    import onnx

    with pytest.raises(WeightsError, match='is an ONNX file: load it with backend="onnx"'):
        micl_zoo.load(weights=exported)
    with pytest.raises(UsageError, match="'vit_l16' was asked for, but the weights are those of"):
        micl_zoo.load("vit_l16", weights=exported, backend="onnx")
    with pytest.raises(WeightsError, match=r"needs an .onnx file that `micl-zoo export` wrote"):
        local_onnx(tmp_path)
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"no graph")
    with pytest.raises(WeightsError, match=r"give one of a.onnx, b.onnx"):
        local_onnx(tmp_path)
    with pytest.raises(WeightsError, match=r"cannot open .*a.onnx"):
        micl_zoo.load(weights=tmp_path / "a.onnx", backend="onnx")
    model = onnx.load(exported)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match="does not say which encoder it holds"):
        micl_zoo.load(weights=tmp_path / "a.onnx", backend="onnx")
    inside = to_onnx(encoder, tmp_path, with_preprocess=True)
    with pytest.raises(WeightsError, match="has the transform inside"):
        micl_zoo.load(weights=inside.path, backend="onnx")
    assert local_onnx(exported.parent) == exported


def test_no_onnx_runtime_or_half_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"backend onnx needs ONNX Runtime .*: pip install 'micl-zoo\[onnx\]'"):
        micl_zoo.load(backend="onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(UsageError, match="installed in part only: `micl-zoo doctor`"):
        micl_zoo.load(backend="onnx")


def test_a_gpu_that_became_a_cpu_is_said(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class Fell:  # what ONNX Runtime does where CUDA's libraries do not load
        def __init__(self, *_: object, **__: object) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    both = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fell)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    for options in ({"device": "cuda:1"}, {"providers": ["tensorrt"]}):
        with pytest.raises(UsageError, match=r"was asked for, but ONNX Runtime fell back to CPUExecutionProvider"):
            micl_zoo.load(weights=exported, backend="onnx", **options)  # type: ignore[arg-type]
    assert choose_providers("cuda:1")[0] == ("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})
    assert choose_providers("auto", ["TensorRT", "CUDAExecutionProvider"])[0][0] == "TensorrtExecutionProvider"


def test_a_gpu_that_onnx_runtime_cannot_use_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert choose_providers("auto") == [("CPUExecutionProvider", {})]
    assert "there is a GPU, but ONNX Runtime has no CUDAExecutionProvider" in caplog.text


def test_memory_that_is_short_halves_the_batch(opened: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(opened.runtime, OnnxSession)
    session = opened.runtime.session

    class Small:
        def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> Any:
            if len(inputs["pixel_values"]) > 2:
                raise Exception("Failed to allocate memory for requested buffer of size 1")
            return session.run(names, inputs)

    monkeypatch.setattr(opened.runtime, "session", Small())
    model = Model(opened, pool="cls", normalize=True, autocast=None)
    pixels = np.stack([opened.transform.pixels(picture(number)) for number in range(5)])
    rows = model.finish(*model.launch(pixels))
    assert model.images_at_once == 2
    monkeypatch.setattr(opened.runtime, "session", session)
    np.testing.assert_allclose(rows, opened.embed_pixels(pixels), rtol=0, atol=1e-6)


def test_extract_verify_and_search(
    image_folder: Callable[..., Path], encoder_folder: Path, exported: Path, tmp_path: Path
) -> None:
    images, out = image_folder(9), tmp_path / "embeddings"
    said: list[str] = []
    extract(images, out, weights=exported, devices="cpu", show=False, say=said.append, workers=0, shard_rows=4)
    store = open_store(out)
    assert store.manifest.runtime == "onnx"
    assert store.manifest.precision == "fp32"
    assert "onnx in fp32" in said[0]
    other: dict[str, Any] = {"backend": "torch", "devices": "cpu", "precision": "fp32", "workers": 0}
    extract(images, tmp_path / "torch", weights=encoder_folder, **other)
    np.testing.assert_allclose(store.embeddings, open_store(tmp_path / "torch").embeddings, rtol=0, atol=1e-5)
    again = extract(images, out, weights=exported, backend="onnx", devices="cpu", show=False, workers=0, shard_rows=4)
    assert again.computed == 0
    assert not verify(store, sample=9, weights=exported).problems
    hits = search(store, [images / "000.jpg"], k=1, weights=exported)
    assert hits[0][0].id == "000.jpg"
    with pytest.raises(WeightsError, match="that are not published"):
        verify(store)
    with pytest.raises(UsageError, match="computes in fp32, not in int8"):
        extract(images, tmp_path / "new", weights=exported, precision="int8", devices="cpu", workers=0)
    with pytest.raises(UsageError, match="int8 is a precision of ONNX files"):
        extract(images, tmp_path / "new", weights=encoder_folder, precision="int8", devices="cpu", workers=0)


def test_several_processes_and_a_loaded_encoder(
    image_folder: Callable[..., Path], exported: Path, tmp_path: Path
) -> None:
    images = image_folder(8)
    options: dict[str, Any] = {"show": False, "workers": 0, "shard_rows": 4}
    opened = micl_zoo.load(weights=exported, backend="onnx", device="cpu")
    one = extract(images, tmp_path / "one", model=opened, **options).store
    two = extract(images, tmp_path / "two", weights=exported, processes=2, devices="cpu", **options).store
    np.testing.assert_array_equal(one.embeddings, two.embeddings)
    assert one.manifest.weights_sha256 == two.manifest.weights_sha256


def test_on_the_command_line(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    words = ["extract", str(image_folder(3)), "-o", str(tmp_path / "out"), "--backend", "onnx", "--workers", "0"]
    done = CliRunner().invoke(main, [*words, "--provider", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "vit_ti16.tin200 on cpu: onnx in fp32" in done.output
    checked = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--device", "cpu"], catch_exceptions=False)
    assert "worst cosine 1.0" in checked.output
    wrong = CliRunner().invoke(main, [*words, "--provider", "npu", "--overwrite"])
    assert wrong.exit_code == 1
    assert "has no npu provider" in wrong.output


def test_a_session_names_the_file_it_cannot_open(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot open .*gone.onnx.: No such file"):
        open_session(tmp_path / "gone.onnx", choose_providers("cpu"))
