"""Encoders changed in memory: noticed by whatever way, saved for `load` and timm, and known again by their stores."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import picture
from timm.models import save_for_hf
from torch import Tensor

import micl_zoo
from micl_zoo.encoders.build import fingerprint
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import StoreError, UsageError, WeightsError
from micl_zoo.files import file_sha256
from micl_zoo.zoo.weights import header


@pytest.fixture
def encoder(encoder_folder: Path) -> Encoder:
    return micl_zoo.load(encoder_folder, device="cpu")


def train(encoder: Encoder, optimizer: torch.optim.Optimizer) -> None:
    """Take one step, as somebody who fine-tunes does."""
    encoder(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).sum().backward()
    optimizer.step()


def flip(tensor: Tensor, axis: int) -> None:
    tensor.copy_(tensor.flip(axis))


def inference_step(encoder: Encoder) -> None:
    with torch.inference_mode():
        encoder.vit.norm.weight.mul_(1.001)


CHANGES: dict[str, Callable[[Encoder], object]] = {
    "sgd": lambda encoder: train(encoder, torch.optim.SGD(encoder.parameters(), 1e-3)),
    "fused adam": lambda encoder: train(encoder, torch.optim.AdamW(encoder.parameters(), 1e-5, fused=True)),
    "data": lambda encoder: encoder.vit.blocks[1].mlp.fc2.weight.data[3, 7].mul_(1.01),
    "numpy": lambda encoder: encoder.vit.pos_embed.detach().numpy().__setitem__((0, 0, 0), 9),
    "inference mode": inference_step,
    "rows change places": lambda encoder: flip(encoder.vit.pos_embed.data, -2),
    "columns change places": lambda encoder: flip(encoder.vit.pos_embed.data, -1),
    "state": lambda encoder: encoder.load_state_dict({key: one * 2 for key, one in encoder.state_dict().items()}),
    "parameter": lambda encoder: setattr(encoder.vit, "cls_token", torch.nn.Parameter(torch.zeros(1, 1, 32))),
    "model": lambda encoder: setattr(encoder, "model", copy.deepcopy(encoder.vit).half()),
    "empty": lambda encoder: encoder.to_empty(device="cpu").vit.norm.bias.data.fill_(7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_weights_does_not_keep_their_name(encoder: Encoder, change: str) -> None:
    assert (encoder.changed, encoder.identity()) == (False, (encoder.name, encoder.weights_sha256))
    CHANGES[change](encoder)
    assert (encoder.changed, encoder.weights_sha256) == (True, None)
    name, sha256 = encoder.identity()
    assert name == f"{encoder.name}-changed"
    assert encoder.identity() == (name, sha256)


def test_what_does_not_change_weights_keeps_their_name(encoder: Encoder, encoder_folder: Path) -> None:
    sha256 = file_sha256(encoder_folder / "model.safetensors")
    encoder.embed(picture(0))
    encoder(torch.zeros(1, 3, 32, 32)).sum().backward()
    encoder.train().eval().requires_grad_(False).to("cpu", memory_format=torch.channels_last)
    encoder.model = copy.deepcopy(encoder.model)
    for twin in (encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)), encoder.half().bfloat16()):
        assert twin.weights_sha256 == sha256
    assert micl_zoo.load(encoder_folder, device="cpu", dtype="bfloat16").to(torch.float16).weights_sha256 == sha256
    encoder.vit.norm.weight.data += 1
    assert encoder.float().weights_sha256 is None  # changed stays changed
    random = micl_zoo.load(pretrained=False, device="cpu")
    assert (random.changed, random.weights_sha256, random.identity()[0]) == (False, None, random.name)


def test_fingerprints_are_of_all_kinds_of_tensors() -> None:
    model = torch.nn.BatchNorm1d(3)
    seen = {fingerprint(model)}
    for tensor in (model.num_batches_tracked, model.running_mean, model.weight.data):
        tensor.add_(1)
        seen.add(fingerprint(model))
    seen |= {fingerprint(model.to(kind)) for kind in (torch.float64, torch.bfloat16)}
    assert len(seen) == 6


def test_a_changed_encoder_is_saved_for_load_and_timm(encoder: Encoder, encoder_folder: Path, tmp_path: Path) -> None:
    loaded_from = encoder.weights_sha256
    CHANGES["sgd"](encoder)
    file = encoder.save(tmp_path / "mine")
    assert encoder.identity() == (f"{encoder.name}-changed", file_sha256(file))
    again = micl_zoo.load(tmp_path / "mine", device="cpu")
    assert (again.name, again.weights_sha256, again.changed) == (*encoder.identity(), False)
    assert again.transform == encoder.transform
    np.testing.assert_array_equal(again.embed(picture(1)), encoder.embed(picture(1)))
    source = {"encoder": encoder.name, "source": None, "encoder_sha256": loaded_from}
    assert header(file)["provenance"] == source | {"changed": True}
    pixels = torch.randn(2, 3, 32, 32)
    model = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels), encoder(pixels), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match=r"mine/model.safetensors' exists: take another folder, or overwrite=True"):
        encoder.save(tmp_path / "mine")
    encoder.to(torch.bfloat16).save(tmp_path / "mine", overwrite=True)
    assert micl_zoo.load(tmp_path / "mine", device="cpu").vit.norm.weight.equal(encoder.vit.norm.weight.float())
    again.save(tmp_path / "copy")
    assert header(tmp_path / "copy" / "model.safetensors")["provenance"]["changed"] is False
    published = micl_zoo.load(device="cpu")
    assert published.record is not None
    said = micl_zoo.load(published.save(tmp_path / "published"), device="cpu").config
    assert (said.name, said.license) == (published.name, published.record.license)  # which its own file leaves out
    (tmp_path / "file").touch()
    for place, said in ((tmp_path / "file" / "below", "cannot write to"), ("s3://bucket/mine", "is an address")):
        with pytest.raises(UsageError, match=said):
            again.save(place)


CLIP = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("architecture", "classes", "args"),
    [
        ("test_resnet", 10, {}),  # batch norm, which counts batches in whole numbers
        ("test_vit", 10, {}),
        ("vit_base_patch32_clip_224", 512, CLIP),  # its classifier is its projection
        ("vit_base_patch32_clip_224", 0, CLIP),
    ],
)
def test_any_architecture_is_saved(architecture: str, classes: int, args: dict[str, Any], tmp_path: Path) -> None:
    made = timm.create_model(architecture, num_classes=classes, **args)
    side = args.get("img_size", 160)
    config = {"input_size": (3, side, side), "num_classes": classes}
    save_for_hf(made, tmp_path / "timm", model_config=config, model_args=args or None, safe_serialization=True)
    encoder = micl_zoo.load(tmp_path / "timm", device="cpu")
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.1)
    encoder.save(tmp_path / "mine")
    again = micl_zoo.load(tmp_path / "mine", device="cpu")
    assert (again.name, again.weights_sha256, again.pools) == (*encoder.identity(), encoder.pools)
    assert ("projection" in again.pools) == (classes == 512)
    assert again.pool == encoder.pool
    pixels = torch.randn(2, 3, side, side)
    model = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    with torch.inference_mode():
        for pool in encoder.pools:
            torch.testing.assert_close(again(pixels, pool), encoder(pixels, pool), rtol=0, atol=0)
        expected = encoder(pixels, "projection" if classes == 512 else "native")
        torch.testing.assert_close(model(pixels), expected, rtol=1e-5, atol=1e-5)


def test_an_exported_file_is_not_saved(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(UsageError, match="no torch model to save"):
        micl_zoo.load(backend="onnx", device="cpu").save(tmp_path / "s")


def test_the_store_of_a_changed_encoder_knows_it_again(
    image_folder: Callable[..., Path], encoder: Encoder, encoder_folder: Path, tmp_path: Path
) -> None:
    images, out = image_folder(5), tmp_path / "s"
    CHANGES["sgd"](encoder)
    store = micl_zoo.extract(images, out, encoder=encoder, workers=0).store
    name, sha256 = encoder.identity()
    assert (store.manifest.model, store.manifest.weights_sha256) == (name, sha256)
    assert f"--model {name}" in store.manifest.command
    for weights, said in (
        (None, r"weights=; `encoder.save\(FOLDER\)` writes them"),
        (encoder_folder, "weights of sha256"),
    ):
        with pytest.raises(WeightsError, match=said):
            micl_zoo.search(out, images / "000.jpg", weights=weights, device="cpu")
    with pytest.raises(StoreError, match=r"model: .*-changed' in the store"):
        micl_zoo.extract(images, out, weights=encoder_folder, workers=0)
    [hits] = micl_zoo.search(out, images / "000.jpg", 2, encoder=encoder)
    assert (hits[0].id, hits[0].cosine) == ("000.jpg", pytest.approx(1, abs=1e-5))
    assert micl_zoo.verify(out, encoder=encoder, sample=3).problems == []
    with pytest.raises(WeightsError, match="weights of sha256"):
        micl_zoo.verify(out, encoder=micl_zoo.load(encoder_folder, device="cpu"))
    for arguments, said in (
        ({"encoder": "mine"}, "encoder must be an Encoder, it is 'mine'"),
        ({"encoder": encoder, "weights": encoder_folder}, "an encoder has its weights: leave that argument out"),
        ({"encoder": encoder, "device": "cpu"}, "an encoder has its device"),
    ):
        with pytest.raises(UsageError, match=said):
            micl_zoo.search(out, images / "000.jpg", **arguments)
    encoder.save(tmp_path / "mine")
    [hits] = micl_zoo.search(out, images / "000.jpg", 2, weights=tmp_path / "mine", device="cpu")
    assert (hits[0].id, hits[0].cosine) == ("000.jpg", pytest.approx(1, abs=1e-5))
    assert micl_zoo.verify(out, weights=tmp_path / "mine", sample=3, device="cpu").problems == []
    (out / "part-00000.parquet").unlink()
    options = {"model": encoder.name, "weights": tmp_path / "mine"}
    summary = micl_zoo.extract(images, out, workers=0, backend="torch", **options)  # type: ignore[arg-type]
    assert (summary.shards_before, summary.embedded) == (0, 5)
    with pytest.raises(UsageError, match="two words for the same"):
        micl_zoo.extract(images, out, encoder=encoder, model="vit_ti16")
    with pytest.raises(UsageError, match=r"model must be .*Encoder, it is 7"):
        micl_zoo.extract(images, out, encoder=7)


@pytest.fixture
def resnet(tmp_path: Path) -> Encoder:
    save_for_hf(timm.create_model("test_resnet"), tmp_path / "resnet", safe_serialization=True)
    return micl_zoo.load(tmp_path / "resnet", device="cpu")


def test_rows_are_those_of_eval_mode_also_while_somebody_trains(resnet: Encoder) -> None:
    """Else a batch's own statistics would be in the rows, and embedding would change the weights."""
    pictures = [picture(number) for number in range(3)]
    expected = resnet.embed(pictures)
    resnet.train()
    np.testing.assert_array_equal(resnet.embed(pictures), expected)
    assert resnet.model.training
    assert not resnet.changed


def test_a_new_head_is_saved_and_left_out_of_the_rows(resnet: Encoder, tmp_path: Path) -> None:
    resnet.model.reset_classifier(10)  # type: ignore[operator]
    resnet.save(tmp_path / "mine")
    assert timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).num_classes == 10
    found = micl_zoo.load(tmp_path / "mine", device="cpu")
    np.testing.assert_array_equal(found.embed([picture(1)]), resnet.embed([picture(1)]))


def test_what_no_configuration_says_is_a_change_and_not_saved(resnet: Encoder, tmp_path: Path) -> None:
    hook = resnet.model.layer4.register_forward_hook(lambda *_: None)  # type: ignore[operator, union-attr]
    assert resnet.changed
    hook.remove()
    assert not resnet.changed
    resnet.model.reset_classifier(0, "max")  # type: ignore[operator]
    assert resnet.changed
    with pytest.raises(UsageError, match="not what timm makes of test_resnet any more"):
        resnet.save(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_pool_and_a_size_that_were_chosen_are_saved(encoder: Encoder, encoder_folder: Path, tmp_path: Path) -> None:
    encoder.pool = "mean"
    encoder.save(tmp_path / "mean")
    other = micl_zoo.load(encoder_folder, image_size=64, device="cpu")
    other.save(tmp_path / "large")
    for folder, one in (("mean", encoder), ("large", other)):
        found = micl_zoo.load(tmp_path / folder, device="cpu")
        assert (found.pool, found.transform) == (one.pool, one.transform)
        np.testing.assert_array_equal(found.embed([picture(1)]), one.embed([picture(1)]))


def test_half_precision_in_memory_makes_no_store(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    images, half = image_folder(2), micl_zoo.load(encoder_folder, dtype="bfloat16", device="cpu")
    with pytest.raises(UsageError, match=r"weights are in bfloat16.*float32"):
        micl_zoo.extract(images, tmp_path / "s", encoder=half, workers=0)
    assert not (tmp_path / "s").exists()
    micl_zoo.extract(images, tmp_path / "s", weights=encoder_folder, workers=0)
    with pytest.raises(UsageError, match="weights are in bfloat16"):
        micl_zoo.search(tmp_path / "s", images / "000.jpg", encoder=half)


def test_the_row_of_a_distilled_vit_is_timm_s(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **sizes).eval()
    save_for_hf(model, tmp_path / "deit", model_args=sizes, safe_serialization=True)
    encoder, pixels = micl_zoo.load(tmp_path / "deit", device="cpu"), torch.randn(2, 3, 32, 32)
    assert encoder.pool == "native"
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(encoder(pixels), expected, rtol=0, atol=1e-6)
