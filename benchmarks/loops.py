"""Embed a folder of photographs the way people write it by hand: contenders of benchmarks/extract.py.

    python benchmarks/loops.py plain PHOTOS --weights ENCODER_FOLDER
    python benchmarks/loops.py onnx PHOTOS --weights ENCODER_FOLDER --onnx model.onnx

Each is a process of its own and prints one JSON object: images and seconds from the first finished batch to the end.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import micl_zoo

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@click.group()
def main() -> None:
    """Embed PHOTOS without micl-zoo's extract, or run the model alone."""


photos = click.argument("folder", type=click.Path(path_type=Path))
weights = click.option("--weights", required=True, type=click.Path(path_type=Path), help="An encoder folder.")
device = click.option("--device", default="cpu", show_default=True)
precision = click.option("--precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
batch_size = click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
workers = click.option("--workers", type=click.IntRange(0), default=0, show_default=True)
onnx = click.option("--onnx", "file", required=True, type=click.Path(path_type=Path), help="The exported model.")


@main.command()
@photos
@weights
@device
@precision
@batch_size
@workers
@torch.inference_mode()
def plain(folder: Path, weights: Path, device: str, precision: str, batch_size: int, workers: int) -> None:
    """Use timm's model and transform, a DataLoader, and torch as it comes."""
    model = timm_model(weights).to(device)
    kind = DTYPES[precision]

    def embed(images: Tensor) -> np.ndarray:
        with torch.autocast(torch.device(device).type, kind or torch.bfloat16, enabled=kind is not None):
            tokens = model.forward_features(images.to(device, non_blocking=True))  # (B, 1 + N, D)
        return tokens[:, 0].float().cpu().numpy()

    embed_all(loader(folder, model, batch_size, workers, pin=device.startswith("cuda")), embed)


@main.command("onnx")
@photos
@weights
@device
@batch_size
@workers
@onnx
def onnx_loop(folder: Path, weights: Path, device: str, batch_size: int, workers: int, file: Path) -> None:
    """Use ONNX Runtime in the place of torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CUDAExecutionProvider"] if device.startswith("cuda") else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(file), options, providers=providers)

    def embed(images: Tensor) -> np.ndarray:
        return cast(np.ndarray, session.run(None, {"pixel_values": images.numpy()})[0])

    embed_all(loader(folder, timm_model(weights), batch_size, workers), embed)


@main.command()
@weights
@onnx
def export(weights: Path, file: Path) -> None:
    """Write the model for ONNX Runtime: pixel_values (B, 3, S, S) -> class tokens (B, D)."""
    from micl_zoo.export.graph import encoder_graph
    from micl_zoo.export.write import OPSET

    graph = encoder_graph(micl_zoo.load(weights=weights, device="cpu"), ("cls",), OPSET)
    file.write_bytes(graph.SerializeToString())


@main.command()
@weights
@device
@precision
@batch_size
@click.option("--backend", default="torch", show_default=True)
@click.option("--seconds", type=click.FloatRange(0), default=20, show_default=True)
def model(weights: Path, device: str, precision: str, batch_size: int, backend: Any, seconds: float) -> None:
    """Run the encoder alone, on random pixels in memory; measure the device's matrix rate before and after it."""
    from micl_zoo.training.pretraining.bench import matrix_rate, settle

    encoder = micl_zoo.load(weights=weights, device=device, backend=backend)
    size, kind = encoder.transform.size, DTYPES[precision]
    pixels = torch.randint(256, (batch_size, *size, 3), dtype=torch.uint8, device=encoder.device)
    for _ in range(2):
        encoder.embed_tensor(pixels, autocast=kind)
    settle(encoder.device)
    matrix = matrix_rate(encoder.device, kind or torch.float32)
    start, batches = time.perf_counter(), 0
    while batches < 2 or time.perf_counter() - start < seconds:
        encoder.embed_tensor(pixels, autocast=kind)
        settle(encoder.device)
        batches += 1
    spent = time.perf_counter() - start
    matrix = max(matrix, matrix_rate(encoder.device, kind or torch.float32))
    print(json.dumps({"images": batches * batch_size, "seconds": spent, "matrix_tflops": matrix / 1e12}))


class Photos(Dataset[Tensor]):
    """A folder of images, in order of name."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.transform = sorted(path for path in folder.rglob("*") if path.is_file()), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.files[index]).convert("RGB"))


def timm_model(weights: Path) -> VisionTransformer:
    """Timm's model with the weights of an encoder folder, and their transform in its pretrained_cfg."""
    config = json.loads((weights / "config.json").read_text())
    made = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    made.load_state_dict(load_file(weights / "model.safetensors"))
    made.pretrained_cfg = config["pretrained_cfg"]
    return made.eval()


def loader(
    folder: Path, model: VisionTransformer, batch_size: int, workers: int, pin: bool = False
) -> DataLoader[Tensor]:
    """Batches (B, 3, S, S) through timm's own evaluation transform."""
    config = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    transform = timm.data.create_transform(**config, is_training=False)
    return DataLoader(Photos(folder, transform), batch_size=batch_size, num_workers=workers, pin_memory=pin)


def embed_all(batches: DataLoader[Tensor], embed: Callable[[Tensor], np.ndarray]) -> None:
    """Embed all batches, keep the rows until the end, save them; print the rate after the first batch."""
    rows = [embed(images) for images in clock(batches)]
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, np.concatenate(rows))


def clock(batches: DataLoader[Tensor]) -> Iterator[Tensor]:
    """Hand on each batch; when the last has been used, print what the time from the first one's end came to."""
    start, images = 0.0, 0
    for number, batch in enumerate(batches):
        yield batch
        if number == 0:
            start = time.perf_counter()  # the first batch is done: what comes is the rate while running
        else:
            images += len(batch)
    print(json.dumps({"images": images, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
