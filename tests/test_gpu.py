"""The same numbers on a CUDA device as on the CPU: `pytest -m gpu`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TWIN, picture, small_vit

import micl_zoo
from micl_zoo.extraction.extract import extract
from micl_zoo.sources.listing import index_source
from micl_zoo.training.micl import MiCL
from micl_zoo.training.pretraining.data import MemoryCorpus
from micl_zoo.training.pretraining.pretrain import pretrain
from micl_zoo.training.recipes import Recipe

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_loss_and_gradients(twin: Recipe) -> None:
    on_cpu = MiCL(small_vit(), mask_ratio=twin.mask_ratio)
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE)
    pixels, noise = torch.randn(16, 3, 32, 32), torch.rand(16, 16)
    losses = [on_cpu(pixels, noise).loss, on_gpu(pixels.to(DEVICE), noise.to(DEVICE)).loss]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-4)
    for (name, there), here in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True):
        if here.grad is not None:
            assert there.grad is not None, name
            torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_visible_patches(image_folder: Callable[..., Path], twin: Recipe) -> None:
    corpus = MemoryCorpus.load(index_source(image_folder(8)), twin.source_size)
    _, *on_cpu = next(corpus.batches(twin, 0, 1))
    corpus.images = corpus.images.to(DEVICE)
    _, *on_gpu = next(corpus.batches(twin, 0, 1))
    assert on_gpu[0].device.type == DEVICE
    for there, here in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("precision", "cosine"), [("fp32", 0.99999), ("bf16", 0.999), ("fp16", 0.999)])
def test_embeddings(tmp_path: Path, precision: str, cosine: float) -> None:
    (tmp_path / "images").mkdir()
    for number in range(6):
        picture(number, 300, 260).save(tmp_path / "images" / f"{number}.png")
    options = {"workers": 2, "batch_size": 4}
    extract(tmp_path / "images", tmp_path / "cpu", devices="cpu", precision="fp32", **options)  # type: ignore[arg-type]
    extract(tmp_path / "images", tmp_path / "gpu", devices=DEVICE, precision=precision, **options)  # type: ignore[arg-type]
    cpu, gpu = (micl_zoo.open_store(tmp_path / name).embeddings for name in ("cpu", "gpu"))
    assert (cpu * gpu).sum(1).min() > cosine
    assert np.isfinite(gpu).all()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own doings
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_run_learns_goes_on_and_leaves_an_encoder(
    image_folder: Callable[..., Path], tmp_path: Path, compiled: str
) -> None:
    settings = [*TWIN, "precision=auto", "epochs=20", "base_lr=0.05", f"compile={compiled}"]
    folder, run = image_folder(32), tmp_path / "run"
    assert pretrain("vit_ti16.tin200", folder, run, overrides=settings, device=DEVICE, max_steps=30) == run
    made = pretrain("vit_ti16.tin200", folder, run, overrides=settings, device=DEVICE)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(80))
    first, last = (sum(line["loss"] for line in part) / 8 for part in (lines[:8], lines[-8:]))
    assert last < first - 0.3
    record = json.loads((run / "run.json").read_text())
    assert record["machine"]["card"] == torch.cuda.get_device_name()
    assert micl_zoo.load(weights=made.parent, device="cpu").embed(picture(0)).shape == (1, 32)
