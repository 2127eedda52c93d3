"""Encoders of every family are what timm makes of the same folder: pools, pixels, sizes, stores, exports."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import picture

import micl_zoo
from micl_zoo.errors import ExportError, UsageError
from micl_zoo.extraction.extract import extract
from micl_zoo.stores.search import search
from micl_zoo.stores.verify import verify

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the installed package has no benchmarks")
BOUND = 1e-5
# One of each way to embed: pools, prefix tokens, positions, classifiers.
FAST = (
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch32_clip_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_mixed_224",
    "beit_base_patch16_224",
    "vit_base_patch16_siglip_224",
    "test_resnet",
)
HAVE_CLS = FAST[:6]


@pytest.fixture(scope="module")
def families() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("families")


@pytest.fixture(scope="module")
def saved(families: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the folder of an architecture, once."""
    made: dict[str, Path] = {}

    def save(architecture: str) -> Path:
        if architecture not in made:
            if not timm.is_model(architecture):
                pytest.skip(f"timm {timm.__version__} has no {architecture}")
            row = next(one for one in families.ROWS if one.architecture == architecture)
            made[architecture] = families.saved(row, tmp_path_factory.mktemp(architecture) / "saved")
        return made[architecture]

    return save


@pytest.mark.parametrize("architecture", FAST)
def test_pools_pixels_and_sizes_are_timm_s(families: Any, saved: Callable[[str], Path], architecture: str) -> None:
    folder = saved(architecture)
    encoder = micl_zoo.load(folder, device="cpu")
    assert max(families.pool_differences(encoder, folder).values()) <= BOUND
    assert families.pixels_equal(encoder, folder)
    row = next(one for one in families.ROWS if one.architecture == architecture)
    assert families.resized(folder, row)["largest_difference"] <= BOUND
    assert ("projection" in encoder.pools) == ("clip" in architecture)
    assert ("cls" in encoder.pools) == (architecture in HAVE_CLS)


@pytest.mark.parametrize("architecture", ["vit_base_patch16_siglip_224", "test_resnet"])
def test_stores_are_made_checked_and_searched(
    saved: Callable[[str], Path], image_folder: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    folder, images = saved(architecture), image_folder(5)
    store = extract(images, tmp_path / "store", model=str(folder), devices="cpu", workers=0, precision="fp32").store
    encoder = micl_zoo.load(folder, device="cpu")
    expected = encoder.embed([images / "000.jpg"], pool="native")
    np.testing.assert_allclose(store.embeddings[store.ids.index("000.jpg")], expected[0], rtol=0, atol=1e-6)
    assert store.manifest.pool == "native"
    assert not verify(store, sample=5, weights=folder, device="cpu").problems
    assert search(store, images / "000.jpg", 1, weights=folder, device="cpu")[0][0].id == "000.jpg"


def test_an_export_has_all_outputs_and_the_same_default(saved: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from micl_zoo.export import to_onnx

    encoder = micl_zoo.load(saved("vit_base_patch32_clip_224"), device="cpu")
    made = to_onnx(encoder, tmp_path, outputs=tuple(encoder.runtime.shapes))
    opened = micl_zoo.load(made.path, backend="onnx", device="cpu")
    assert (opened.pool, opened.pools, opened.embed_dim) == (encoder.pool, encoder.pools, encoder.embed_dim)
    images = [picture(number, 90, 70) for number in range(3)]
    for pool in encoder.pools:
        assert opened.row_shape(pool) == encoder.row_shape(pool)
        np.testing.assert_allclose(opened.embed(images, pool=pool), encoder.embed(images, pool=pool), rtol=0, atol=1e-5)


def test_what_stops_an_export_is_named_before_anything_is_written(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from micl_zoo.export import to_onnx

    encoder = micl_zoo.load(saved("test_resnet"), device="cpu")
    head: Any = encoder.model.forward_head
    monkeypatch.setattr(encoder.model, "forward_head", lambda *a, **k: torch.special.bessel_j0(head(*a, **k)))
    with pytest.raises(
        ExportError, match=r"could not export test_resnet.local .*bessel_j0.*\. Nothing was written"
    ) as caught:
        to_onnx(encoder, tmp_path / "new", outputs=("native",))
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert len("".join(capfd.readouterr())) < 2000  # torch would print the whole graph


def test_sizes_that_an_architecture_cannot_take(saved: Callable[[str], Path]) -> None:
    for architecture, side, text in (
        ("vit_small_patch14_reg4_dinov2", 64, "image_size must be a multiple of the patch size, 14; got 64"),
        ("test_resnet", 5000, "image_size is 5,?000, and must be 1 to 4,096"),
    ):
        with pytest.raises(UsageError, match=text):
            micl_zoo.load(saved(architecture), device="cpu", image_size=side)


@pytest.mark.parametrize(
    "name", ["vit_giant_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_378", "swin_tiny_patch4_window7_224"]
)
def test_configurations_that_timm_writes_are_read(families: Any, tmp_path: Path, name: str) -> None:
    assert families.configured(name, tmp_path / "config.json") is None


def test_the_record_has_every_architecture_within_its_bounds(families: Any) -> None:
    found = json.loads(sorted((BENCHMARKS / "records").glob("*-families.json"))[-1].read_text(encoding="utf-8"))
    assert [row["architecture"] for row in found["rows"]] == [row.architecture for row in families.ROWS]
    assert found["architectures"] == found["within_bound"] == found["pixels_equal"] >= 40
    for row in found["rows"]:
        assert row["largest_difference"] == max(row["differences"].values()) <= BOUND
        assert row["store"]["problems"] == []
        assert row["store"]["finds_itself"]
        if isinstance(onnx := row.get("onnx", {}), str):
            assert "Nothing was written" in onnx
        elif onnx:
            assert onnx["fp32"]["outside_of_its_bounds"] == []
    assert {row["family"] for row in found["rows"] if "onnx" in row} == {row.family for row in families.ROWS}


@pytest.mark.slow
def test_every_architecture_of_the_table(families: Any) -> None:
    for place, row in enumerate(families.ROWS):
        found = families.compared(place)
        assert found["largest_difference"] <= BOUND, row
        assert found["pixels_equal"], row
        assert (found["store"]["problems"], found["store"]["finds_itself"]) == ([], True), row


@pytest.mark.slow
def test_every_configuration_that_timm_writes(families: Any) -> None:
    found = families.configurations(timm.list_models())
    assert found["load"] >= 0.98 * found["architectures"]
    for why in found["refused"].values():  # parts of language models, whose features are no rows
        assert "cannot take images" in why or "no row of numbers" in why, why
