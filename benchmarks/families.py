"""Compare encoders of every family with timm itself: pools, pixels, stores, exports; writes a record.

    python benchmarks/families.py -o benchmarks/records/families.json

Each architecture at a small size and with random weights, written by timm's own `save_for_hf` with its classifier left
on, and loaded from that folder. The oracle is what timm makes of the same folder. Besides, the configuration that timm
writes for each of its architectures at full size is read, and the model built without memory for its weights.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import onnx
import timm
import torch
from PIL import Image
from record import made_on, missing
from record import write as write_record
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from toys import photographs as write_photographs

import micl_zoo
from micl_zoo import Encoder, MiclZooError
from micl_zoo.encoders.build import _check_model, _create, _Shapes
from micl_zoo.encoders.device import ONNX_PRECISIONS
from micl_zoo.export import write
from micl_zoo.export.check import BATCHES, measure, photographs
from micl_zoo.export.graph import encoder_graph
from micl_zoo.export.quantize import CONVERSIONS
from micl_zoo.progress import progress
from micl_zoo.stores.search import search
from micl_zoo.stores.verify import verify
from micl_zoo.zoo.pools import Pool
from micl_zoo.zoo.weights import EncoderConfig

BOUND = 1e-5  # of the difference of two pooled numbers
SIZES = [(48, 40), (40, 48), (333, 250), (250, 333), (65, 64), (31, 200), (301, 40), (2, 3)]  # width, height
IMAGES = 6  # of a store
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 2}
STAGES = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}


@dataclass(frozen=True)
class Row:
    """An architecture at a small size."""

    family: str
    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)  # for timm
    overlay: dict[str, Any] = field(default_factory=dict)  # over timm's entry of its transform
    image_size: int | None = None  # another that it can take, in pixels

    @property
    def name(self) -> str:
        """The architecture, and what is asked of it where it stands in the table twice."""
        given = "".join(f" {key}={value}" for key, value in (self.overlay | self.arguments).items() if key not in VIT)
        return f"{self.architecture}{given}"


def _vit(family: str, architecture: str, side: int, larger: int | None, **others: Any) -> Row:
    overlay = others.pop("overlay", {})
    return Row(family, architecture, {"img_size": side, **VIT, **others}, overlay, larger)


ROWS = (
    _vit("ViT", "vit_base_patch16_224", 64, 96),
    _vit("ViT", "vit_base_patch32_224", 64, 96),
    _vit("ViT", "vit_base_patch8_224", 40, 56),
    Row("ViT", "vit_small_patch16_224", {"img_size": (64, 96), **VIT}, {"input_size": (3, 64, 96)}, 64),
    _vit("AugReg", "vit_tiny_patch16_224", 64, 96),
    _vit("MAE", "vit_base_patch16_224.mae", 64, 96),
    _vit("DINO", "vit_small_patch8_224.dino", 40, 56),
    _vit("DINOv2", "vit_base_patch14_dinov2", 56, 84),
    _vit("DINOv2, registers", "vit_small_patch14_reg4_dinov2", 56, 84),
    Row("DINOv2, giant", "vit_giant_patch14_dinov2", {"img_size": 56, **VIT}, {}, 84),
    _vit("DINOv3", "vit_small_patch16_dinov3", 64, 96),
    _vit("DINOv3, SwiGLU", "vit_7b_patch16_dinov3", 64, 96),
    _vit("CLIP", "vit_base_patch32_clip_224", 64, 96, num_classes=512),
    _vit("CLIP, quickgelu", "vit_base_patch32_clip_quickgelu_224", 64, 96, num_classes=512),
    Row("CLIP, ResNet", "resnet50_clip", {"num_classes": 1024}),
    _vit("SigLIP", "vit_base_patch16_siglip_224", 64, 96, overlay={"crop_mode": "squash", "crop_pct": 1.0}),
    _vit("SigLIP, gap", "vit_base_patch16_siglip_gap_224", 64, 96),
    _vit("PE", "vit_pe_core_base_patch16_224", 64, 96, num_classes=1024),
    _vit("PE, spatial", "vit_pe_spatial_base_patch16_512", 64, 96),
    _vit("TIPSv2", "vit_base_patch14_reg1_tipsv2", 56, 84),
    _vit("DeiT-3", "deit3_small_patch16_224", 64, 96),
    _vit("DeiT, distilled", "deit_tiny_distilled_patch16_224", 64, 96),
    _vit("EVA", "eva_giant_patch14_224", 56, 84),
    _vit("EVA-02", "eva02_tiny_patch14_224", 56, 84),
    _vit("EVA-02 CLIP", "eva02_base_patch16_clip_224", 64, 96, num_classes=512),
    _vit("BEiT", "beit_base_patch16_224", 64, 96),
    _vit("BEiT v2", "beitv2_base_patch16_224", 64, 96),
    _vit("AIMv2", "aimv2_large_patch14_224", 56, 84),
    Row("NaFlex", "naflexvit_base_patch16_gap", {**VIT}, {"input_size": (3, 96, 96), "crop_mode": "border"}, 64),
    Row("RADIO", "naflexvit_base_patch16_radio_v3", {**VIT}, {"input_size": (3, 64, 64)}, 96),
    Row("MobileCLIP", "fastvit_mci0", {"layers": (1, 1, 1, 1), "num_classes": 512}, {"input_size": (3, 64, 64)}, 96),
    Row("MobileCLIP, ViT", "vit_base_mci_224", {"depth": 2, "num_classes": 512}),
    _vit("ViT, relative positions", "vit_relpos_small_patch16_224", 64, None),
    _vit("ViT, SAM", "samvit_base_patch16_224", 64, None),
    Row("timm's own ViTs", "test_vit", {}, {}, 96),
    Row("timm's own ViTs", "test_vit2", {}, {}, 96),
    Row("timm's own ViTs", "test_vit3", {}, {}, 96),
    Row("timm's own ViTs", "test_vit4", {}, {}, 96),
    Row("ConvNeXt", "test_convnext", {}, {}, 96),
    Row("ConvNeXt", "convnext_atto", {"depths": (1, 1, 1, 1)}, {"input_size": (3, 64, 64)}, 96),
    Row("ConvNeXt v2", "convnextv2_atto", {"depths": (1, 1, 1, 1)}, {"input_size": (3, 64, 64)}, 96),
    Row("ResNet", "test_resnet", {}, {"input_size": (3, 96, 64)}, 96),
    Row("ResNet", "resnet18", {"layers": (1, 1, 1, 1)}, {"input_size": (3, 64, 64)}, 96),
    Row("Swin", "swin_tiny_patch4_window7_224", {"img_size": 112, **STAGES}, {}, 224),
    Row("Swin v2", "swinv2_tiny_window8_256", {"img_size": 128, **STAGES}, {}, 256),
    Row("EfficientNet", "test_efficientnet", {}, {}, 96),
    Row("EfficientNet", "tf_efficientnet_lite0", {}, {"input_size": (3, 64, 64)}, 96),
    Row("MobileNetV3", "mobilenetv3_small_050", {}, {"input_size": (3, 64, 64)}, 96),
    Row("Hiera", "hiera_tiny_224", {"embed_dim": 24}),
    _vit("XCiT", "xcit_nano_12_p16_224", 64, None),
    Row("MambaOut", "test_mambaout", {}, {}, 96),
    Row("RegNet", "regnety_002", {}, {"input_size": (3, 64, 64)}, 96),
    Row("NFNet", "test_nfnet", {}, {}, 96),
    Row("ByobNet", "test_byobnet", {}, {}, 96),
    Row("MobileViT", "mobilevit_xxs", {}, {"input_size": (3, 64, 64)}, 128),
    Row("CaiT", "cait_xxs24_224", {"img_size": 64, **VIT}),
    Row("MLP-Mixer", "mixer_s32_224", {"img_size": 64}),
    Row("EfficientViM", "efficientvim_m1", {}, {"input_size": (3, 64, 64)}, 128),
    _vit("ViT with learned RoPE", "vit_small_patch16_rope_mixed_224", 64, 96),
)
# Of which OpenVINO and torch.compile are tried: one compilation takes a minute.
COMPILED = ("test_vit", "vit_small_patch16_dinov3", "test_convnext", "test_efficientnet")


@click.command()
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Record to write; rows that it has are measured anew."
)
@click.option("--only", multiple=True, help="Architecture to measure; none is all.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option("--configurations", "full", is_flag=True, help="Read those of all of timm's architectures instead.")
def main(out: Path | None, only: tuple[str, ...], jobs: int, full: bool) -> None:
    """Measure every architecture of the table."""
    if full:
        record = configurations(only or timm.list_models())
    else:
        there = json.loads(out.read_text())["rows"] if only and out is not None and out.exists() else []
        record = summarised([*there, *families(only, jobs)])
    command = "python benchmarks/families.py" + " --configurations" * full
    write_record({**record, "command": command, **made_on(torch.device("cpu"))}, out)


def families(only: Collection[str], jobs: int) -> list[dict[str, Any]]:
    """Compare architectures of the table with timm."""
    places, measured = [at for at, row in enumerate(ROWS) if row.architecture in (only or [row.architecture])], []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn) as pool, progress("comparing with timm", len(places)) as tick:
        for done in as_completed([pool.submit(compared, at) for at in places]):
            measured.append(done.result())
            click.echo(line(measured[-1]))
            tick(1)
    return measured


def summarised(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest figures of each architecture, in the table's order."""
    newest = {one["place"]: one for one in measured}
    rows = [newest[place] for place in sorted(newest)]
    return {
        "architectures": len(rows),
        "families": len({one["family"] for one in rows}),
        "bound": BOUND,
        "within_bound": sum(one["largest_difference"] <= BOUND for one in rows),
        "pixels_equal": sum(one["pixels_equal"] for one in rows),
        "rows": rows,
    }


def compared(place: int) -> dict[str, Any]:
    """All that is measured of one architecture of the table."""
    row = ROWS[place]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's and torch's own
        folder = saved(row, Path(scratch) / "saved")
        encoder = micl_zoo.load(folder, device="cpu")
        differences = pool_differences(encoder, folder)
        return {
            "place": place,
            "family": row.family,
            "architecture": row.architecture,
            "arguments": row.arguments | row.overlay,
            "parameters": sum(one.numel() for one in encoder.model.parameters()),
            "size": list(encoder.transform.size),
            "pool": encoder.pool,
            "shapes": {pool: list(encoder.row_shape(pool)) for pool in encoder.pools},
            "differences": {pool: float(f"{one:.2e}") for pool, one in differences.items()},
            "largest_difference": float(f"{max(differences.values()):.2e}"),
            "transform": encoder.transform.id,
            "pixels_equal": pixels_equal(encoder, folder),
            "image_size": or_why_not(lambda: resized(folder, row)),
            "store": or_why_not(lambda: stored(folder, Path(scratch))),
            **({"onnx": or_why_not(lambda: exported(encoder, Path(scratch)))} if is_first(row) else {}),
            **(ahead(encoder, folder) if row.architecture in COMPILED else {}),
        }


def is_first(row: Row) -> bool:
    """Whether it is its family's first: the others are exported no other way."""
    return next(one for one in ROWS if one.family == row.family) is row


def ahead(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """What is compiled before it runs."""
    return {
        "openvino": or_why_not(lambda: converted(encoder, folder)),
        "compiled": or_why_not(lambda: compiled(encoder)),
    }


def or_why_not(measured: Callable[[], Any]) -> Any:
    """What a function gives, or the sentence of its error."""
    try:
        return measured()
    except MiclZooError as error:
        return str(error)


def saved(row: Row, folder: Path) -> Path:
    """Write a model with random weights as timm does, its classifier on."""
    torch.manual_seed(0)
    name, _, tag = row.architecture.partition(".")
    model = timm.create_model(f"{name}.{tag}" if tag else name, pretrained_cfg_overlay=row.overlay, **row.arguments)
    for one in model.parameters():
        if one.ndim > 1 and not one.detach().any():  # as positions are before training: a wrong one would not be seen
            nn.init.normal_(one, std=0.02)
    with quiet():
        save_for_hf(model, folder, model_args=dict(row.arguments), safe_serialization=True)
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what timm says while it writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_timm(folder: Path, **options: Any) -> Any:
    """The same folder as timm loads it."""
    with quiet():
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


@torch.no_grad()
def pool_differences(encoder: Encoder, folder: Path, side: int | None = None) -> dict[Pool, float]:
    """Largest difference of a number to timm's, by pool; the pixels are as large as normalised ones."""
    pixels = torch.randn(2, 3, *encoder.transform.size, generator=torch.Generator().manual_seed(1))
    bare, whole = in_timm(folder, num_classes=0), in_timm(folder)
    if side is not None and hasattr(bare, "set_input_size"):
        with quiet():
            for model in (bare, whole):
                model.set_input_size(img_size=encoder.transform.size)
    expected = {pool: by_timm(bare, whole, pixels, pool) for pool in encoder.pools}
    return {pool: apart(encoder(pixels, pool), expected[pool]) for pool in encoder.pools}


def by_timm(bare: Any, whole: Any, pixels: Tensor, pool: Pool) -> Tensor:
    """What timm itself gives for a pool."""
    if pool == "native":
        return cast(Tensor, bare(pixels))
    if pool == "projection":
        return cast(Tensor, whole(pixels))
    if pool == "cls":
        return cast(Tensor, bare.forward_features(pixels)[:, 0])
    if pool == "cls+mean":
        return torch.cat([by_timm(bare, whole, pixels, one) for one in ("cls", "mean")], dim=1)
    (last,) = bare.forward_intermediates(
        pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
    )  # (B, D, h, w)
    return cast(Tensor, last.mean((2, 3)) if pool == "mean" else last.permute(0, 2, 3, 1))


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two numbers; infinite where the shapes differ."""
    return float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")


def pixels_equal(encoder: Encoder, folder: Path) -> bool:
    """Whether the transform gives the pixels of timm's, for pictures of odd sizes."""
    oracle: Any = create_transform(**resolve_data_config(model=in_timm(folder)))
    *steps, _, _ = oracle.transforms  # before it makes a tensor and normalises it
    for seed, size in enumerate(SIZES):
        picture = expected = noise(seed, *size)
        for step in steps:
            expected = step(expected)
        same = np.array_equal(encoder.transform.pixels(picture), np.asarray(expected))
        if not same or not torch.allclose(encoder.transform(picture), oracle(picture), rtol=1e-6, atol=1e-6):
            return False
    return True


def noise(seed: int, width: int, height: int) -> Image.Image:
    """A picture in which every pixel counts."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def resized(folder: Path, row: Row) -> dict[str, Any]:
    """Take images of another size, as timm's `set_input_size` makes the model do."""
    side = row.image_size or 96
    encoder = micl_zoo.load(folder, device="cpu", image_size=side)
    return {"side": side, "largest_difference": float(f"{max(pool_differences(encoder, folder, side).values()):.2e}")}


def stored(folder: Path, scratch: Path) -> dict[str, Any]:
    """Embed a folder of images into a store, check it, and search it for one of them."""
    images = write_photographs(scratch / "images", IMAGES)
    options: dict[str, Any] = {"devices": "cpu", "workers": 0, "precision": "fp32", "show": False}
    store = micl_zoo.extract(images, scratch / "store", model=folder, **options).store
    checked = verify(store, sample=IMAGES, weights=folder, device="cpu")
    found = search(store, images / "0003.jpg", 2, weights=folder, device="cpu")
    return {
        "images": IMAGES,
        "problems": list(checked.problems),
        "finds_itself": found[0][0].id == "0003.jpg",
        "cosine": round(found[0][0].cosine, 6),
    }


def exported(encoder: Encoder, scratch: Path) -> dict[str, Any]:
    """Export all outputs in each precision; the drift from PyTorch on photographs, or why not."""
    outputs = list(encoder.runtime.shapes)
    traced = encoder_graph(encoder, write.ordered(encoder, outputs), write.OPSET).SerializeToString()
    return {one: or_why_not(partial(drift, encoder, one, traced, scratch)) for one in ONNX_PRECISIONS}


def drift(encoder: Encoder, precision: Any, traced: bytes, scratch: Path) -> dict[str, Any]:
    """Write one precision, open the file by `load`, and compare."""
    row, outputs = CONVERSIONS[precision], write.ordered(encoder, list(encoder.runtime.shapes))
    file = scratch / f"{precision}.onnx"
    write.save(row.convert(onnx.load_from_string(traced)), write.make_card(encoder, precision, outputs, False), file)
    pictures = photographs()
    found = measure(file, encoder, pictures if row.bounds.neighbour_agreement else pictures[: sum(BATCHES)])
    opened = micl_zoo.load(file, backend="onnx", device="cpu")
    assert (opened.pool, opened.row_shape()) == (encoder.pool, encoder.row_shape())
    return {
        "bytes": file.stat().st_size,
        "cosine_min": round(found.cosine_min, 6),
        "max_difference": float(f"{found.max_difference:.2e}"),
        "outside_of_its_bounds": row.bounds.broken_by(found),
    }


@torch.no_grad()
def converted(encoder: Encoder, folder: Path) -> Any:
    """The largest difference of OpenVINO's rows of unit length to torch's."""
    if why := missing("openvino"):
        return f"left out, {why}"
    twin = micl_zoo.load(folder, backend="openvino")
    pictures = [noise(seed, 300, 200) for seed in range(3)]
    differences = (
        np.abs(twin.embed(pictures, pool=pool) - encoder.embed(pictures, pool=pool)).max() for pool in encoder.pools
    )
    return float(f"{max(differences):.2e}")


def compiled(encoder: Encoder) -> Any:
    """The largest difference of compiled rows of unit length to the same not compiled; the encoder stays compiled."""
    pictures = [noise(seed, 300, 200) for seed in range(3)]
    before = encoder.embed(pictures)
    encoder.compile_blocks(2)
    return float(f"{np.abs(encoder.embed(pictures, batch_size=2) - before).max():.2e}")


def configurations(names: Collection[str]) -> dict[str, Any]:
    """Read what timm writes for architectures at full size, and build the models without memory for weights."""
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch, progress("reading configurations", len(names)) as tick:
        for name in names:
            if (why := configured(name, Path(scratch) / "config.json")) is not None:
                refused[name] = why
            tick(1)
    return {"architectures": len(names), "load": len(names) - len(refused), "refused": refused}


def configured(name: str, file: Path) -> str | None:
    """Why the configuration that timm writes for an architecture is refused; None: it is not."""
    with quiet(), _Shapes():
        try:
            save_config_for_hf(timm.create_model(name), str(file))
            config = EncoderConfig.from_dict(json.loads(file.read_text()), where=name)
            _check_model(_create(config, name, head=False), config, name)
        except MiclZooError as error:
            return str(error)
        except Exception as error:  # of timm
            return f"{type(error).__name__}: {error}"
    return None


def line(found: dict[str, Any]) -> str:
    """One architecture, for a person."""
    pixels = "same pixels" if found["pixels_equal"] else "OTHER PIXELS"
    pools = ", ".join(f"{pool} {shape[-1]}" for pool, shape in found["shapes"].items())
    parts = [f"{found['architecture']:40}{found['largest_difference']:8.0e} {pixels}", pools]
    parts += [f"{name} {found[name]}" for name in ("image_size", "store", "openvino", "compiled") if name in found]
    if isinstance(exports := found.get("onnx", "not exported"), str):
        return " | ".join([*parts, exports])
    drifts = (f"{name} {one['cosine_min']:.5f}" if isinstance(one, dict) else one for name, one in exports.items())
    return " | ".join([*parts, *drifts])


if __name__ == "__main__":
    main()
